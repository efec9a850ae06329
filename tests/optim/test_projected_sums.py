"""Accumulation without a gradient buffer: sums of projections against ordinary accumulation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer, fused_backward_of
from llmnorm.optim.lowrank import find_basis
from llmnorm.optim.projected_sums import ProjectedSums

RANK, MICRO_BATCHES = 4, 3


def loss_of(model: nn.Module, step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + micro)
    ids = torch.randint(0, 40, (2, 9), generator=generator)
    return model(input_ids=ids, labels=ids, use_cache=False).loss / MICRO_BATCHES


def make(
    llama: Callable, fused: bool, dtype: torch.dtype = torch.float64, **options
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = llama(False).to(dtype)
    options = {"rank": RANK, "update_proj_gap": 2, **options}
    return model, create_optimizer("galore", model, lr=1e-2, fused_backward=fused, **options)


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    for micro in range(MICRO_BATCHES):
        loss_of(model, step, micro).backward()
    optimizer.step()


def sum_projections(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, whole_refresh: bool = False
) -> None:
    with fused_backward_of(optimizer).accumulating(whole_refresh):
        for micro in range(MICRO_BATCHES):
            loss_of(model, step, micro).backward()
    optimizer.step()


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)


# The model's norms and attention compute in fp32 whatever its dtype, so weights that differ in the last of 53
# bits give gradients that differ in the last of 24. Updates are 2.5e-3.
ROUNDING = 2e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "paper", "moments": "transport", "weight_decay": 0.1},
        {"side": "auto", "projection": "gram", "stagger": True},
        {"projection": "random", "side": "right"},
        {"lazy_refresh": True, "projection_bits": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "released",
)
def test_o26_summed_projections_are_ordinary_accumulation(llama, options):
    plain, summed = make(llama, False, **options), make(llama, True, **options)
    start = copy.deepcopy(plain[0])
    for step in range(4):
        accumulate(*plain, step)
        sum_projections(*summed, step, whole_refresh=True)
    assert largest_difference(*(model for model, _ in (plain, summed))) < ROUNDING
    assert largest_difference(plain[0], start) > 1e-3, "and something has moved"
    for a, b in zip(plain[0].parameters(), summed[0].parameters(), strict=True):
        assert plain[1].state[a].keys() == summed[1].state[b].keys()
        assert int(summed[1].state[b]["step"]) == 4


def test_a_basis_that_is_due_comes_from_the_first_micro_batch_and_the_rest_is_ordinary(llama):
    model, optimizer = make(llama, True, update_proj_gap=100)
    alone = copy.deepcopy(model)
    for parameter in alone.parameters():
        parameter._post_accumulate_grad_hooks = None
    loss_of(alone, 0, 0).backward()
    sum_projections(model, optimizer, 0)
    group = next(group for group in optimizer.param_groups if group["role"] == "hidden_matrix")
    gradients = {name: p.grad for name, p in alone.named_parameters()}
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        right = parameter.shape[0] >= parameter.shape[1]
        expected = find_basis(gradients[name], right, RANK, {**group, "name": name}, 0, None)
        torch.testing.assert_close(optimizer.state[parameter]["basis"], expected, rtol=0, atol=1e-9)
    plain = make(llama, False, update_proj_gap=100)
    plain[0].load_state_dict(model.state_dict())
    plain[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in (1, 2):
        accumulate(*plain, step)
        sum_projections(model, optimizer, step)
    assert largest_difference(plain[0], model) < ROUNDING


def test_only_projections_and_what_is_not_projected_is_held(llama):
    model, optimizer = make(llama, True)
    fused = fused_backward_of(optimizer)
    sums = ProjectedSums(fused)
    alive = []

    def add(parameter: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters()))
        sums.add(parameter)

    with fused.receiving(add):
        for micro in range(2):
            loss_of(model, 0, micro).backward()
    assert set(alive) == {1} and all(p.grad is None for p in model.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            hidden = group["role"] == "hidden_matrix"
            expected = RANK * max(parameter.shape) if hidden else parameter.numel()
            assert sums.totals[parameter].numel() == expected
            if hidden:
                assert sums.totals[parameter].nbytes == optimizer.projected_bytes(group, parameter)


def test_an_update_that_is_dropped_leaves_state_and_weights_alone(llama):
    model, optimizer = make(llama, True, lazy_refresh=True)
    for step in range(2):
        sum_projections(model, optimizer, step)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    sums = ProjectedSums(fused_backward_of(optimizer))
    with fused_backward_of(optimizer).receiving(sums.add):
        loss_of(model, 2, 0).backward()  # step 3: every basis is due
    sums.clear()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][key], after[i][key]) for i in state for key in state[i])
    assert any(int(kept["next_refresh"]) == 3 for kept in state.values() if "next_refresh" in kept)


def test_a_first_gradient_that_is_not_finite_gives_a_norm_that_is_not(llama):
    """And no basis is looked for in it, which would raise."""
    model, optimizer = make(llama, True)
    fused = fused_backward_of(optimizer)
    sums = ProjectedSums(fused)

    def poison(parameter: Tensor) -> None:
        parameter.grad.fill_(math.nan)
        sums.add(parameter)

    with fused.receiving(poison):
        loss_of(model, 0, 0).backward()
    assert all(total.isnan().all() for total in sums.totals.values())


def test_int8_weights_move_by_summed_projections(llama):
    """One step's update may land on the neighboring code, where rounding at random meets a rounded sum."""
    options = {"weights": "int8", "state_bits": 8, "update_proj_gap": 100}
    plain = make(llama, False, torch.bfloat16, **options)
    summed = make(llama, True, torch.bfloat16, **options)
    start = [p.detach().float() for p in plain[0].parameters()]
    accumulate(*plain, 0)
    sum_projections(*summed, 0, whole_refresh=True)
    for before, a, b in zip(start, plain[0].parameters(), summed[0].parameters(), strict=True):
        moved, apart = (before - a.detach().float()).norm(), (a.detach().float() - b.detach().float()).norm()
        assert moved > 0 and apart < 0.25 * moved


@pytest.mark.parametrize("name", ["fira", "apollo", "gradnorm_lorp", "adamw"])
def test_methods_that_read_whole_gradients_are_refused_by_name(llama, name):
    optimizer = create_optimizer(name, llama(False), lr=1e-2, fused_backward=True)
    kind = type(optimizer).__name__
    with (
        pytest.raises(UserError, match=f"{kind} needs whole gradients.* use galore"),
        fused_backward_of(optimizer).accumulating(),
    ):
        pass
