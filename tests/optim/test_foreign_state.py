"""State of another method, and groups that come later: refused by name before anything has changed."""

from __future__ import annotations

import pytest
import torch
from matrix_cases import groups, make_parameters, run

from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer
from llmnorm.optim.registry import MATRIX_METHODS


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("galore", "fira"), ("muon", "galore"), ("apollo", "apollo_mini"), ("spam", "scale")],
)
def test_state_of_another_method_is_refused_naming_both(saved, loaded):
    parameters = make_parameters()
    other = MATRIX_METHODS[saved](groups(parameters), lr=1e-2)
    run(other, parameters, 1)
    optimizer = MATRIX_METHODS[loaded](groups(parameters), lr=5e-3)
    with pytest.raises(UserError, match=rf"saved by {saved}, and this optimizer is {loaded} \(group 0"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3] * 4


def test_adamw_and_matrix_methods_refuse_each_other(llama):
    model = llama()
    adamw, muon = create_optimizer("adamw", model, lr=1e-3), create_optimizer("muon", model, lr=1e-2)
    with pytest.raises(UserError, match=r"saved by muon, and this optimizer is adamw"):
        adamw.load_state_dict(muon.state_dict())
    with pytest.raises(UserError, match=r"saved by adamw, and this optimizer is muon"):
        muon.load_state_dict(adamw.state_dict())
    adamw.load_state_dict(create_optimizer("adamw", model, lr=2e-3).state_dict())
    assert adamw.param_groups[0]["lr"] == 2e-3


def test_state_of_an_optimizer_that_names_no_method_is_refused():
    weight = torch.zeros(4, 4, requires_grad=True)
    with pytest.raises(
        UserError, match="saved by an optimizer that names no method, and this optimizer is muon"
    ):
        MATRIX_METHODS["muon"]([weight]).load_state_dict(torch.optim.SGD([weight], lr=1.0).state_dict())


def test_a_rank_above_the_smaller_side_is_refused_in_a_group_that_comes_later():
    first, second = torch.zeros(8, 8, requires_grad=True), torch.zeros(8, 3, requires_grad=True)
    optimizer = MATRIX_METHODS["galore"]([("first", first)], rank=4)
    with pytest.raises(UserError, match=r"optimizer.rank=4 exceeds min\(out, in\)=3 of second"):
        optimizer.add_param_group({"params": [("second", second)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("second", second)], "rank": 3})
    assert optimizer.param_groups[1]["rank"] == 3
