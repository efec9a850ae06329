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


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("galore", 128, "exp_avg of k_proj has shape"),  # its basis is one of the 64 inputs
        ("galore", 48, "basis of k_proj has shape"),
        ("apollo_mini", 128, "exp_avg of k_proj has shape"),
        ("adamw8bit", 128, "exp_avg_codes of k_proj has shape"),
        ("adamw8bit", 48, "exp_avg of k_proj is absent"),  # too small to be quantized
        ("spam", 128, "exp_avg of k_proj has shape"),
    ],
)
def test_state_of_another_shape_is_refused_naming_the_parameter_and_the_state(name, rows, words):
    def made(rows: int) -> tuple[torch.Tensor, torch.optim.Optimizer]:
        weight = torch.zeros(rows, 64, requires_grad=True)
        return weight, MATRIX_METHODS[name]([("k_proj", weight)], lr=1e-2)

    weight, other = made(96)
    weight.grad = torch.ones_like(weight)
    other.step()
    _, optimizer = made(rows)
    with pytest.raises(UserError, match=rf"the state {words}.* its shape \({rows}, 64\)"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state
    _, same = made(96)
    same.load_state_dict(other.state_dict())
    assert same.state


def test_an_unknown_option_is_refused_with_those_that_it_takes():
    weight = torch.zeros(4, 4)
    with pytest.raises(UserError, match=r"optimizer.rnk=2 is not an option of GaLore; it takes lr, .*rank, "):
        MATRIX_METHODS["galore"]([weight], rnk=2)
    with pytest.raises(UserError, match=r"optimizer.rank=2 is not an option of SPAM; it takes .*threshold"):
        MATRIX_METHODS["spam"]([weight], rank=2)


def test_a_rank_above_the_smaller_side_is_refused_in_a_group_that_comes_later():
    first, second = torch.zeros(8, 8, requires_grad=True), torch.zeros(8, 3, requires_grad=True)
    optimizer = MATRIX_METHODS["galore"]([("first", first)], rank=4)
    with pytest.raises(UserError, match=r"optimizer.rank=4 exceeds min\(out, in\)=3 of second"):
        optimizer.add_param_group({"params": [("second", second)]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("second", second)], "rank": 3})
    assert optimizer.param_groups[1]["rank"] == 3
