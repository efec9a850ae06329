"""bf16 weights rounded stochastically: right on average, the same after a resume and on shards."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from matrix_cases import gradients, groups, make_parameters, run
from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer, routing_table
from llmnorm.optim.adamw import MatrixAdamW
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.registry import MATRIX_METHODS
from llmnorm.optim.stochastic_rounding import next_rounding
from llmnorm_kernels.optimizer_steps import round_stochastically, rounding_key

BF16 = torch.bfloat16
METHODS: dict[str, type[MatrixOptimizer]] = {"adamw": MatrixAdamW, **MATRIX_METHODS}


# It rounds the tangent of a gradient to the gradient's own dtype, bf16 here, and Adam's first direction is a
# sign, which that may flip: one step of lr.
LOOSE = {"gradnorm_lorp": 1e-2}


def build(name: str, parameters: dict[str, Tensor], **options) -> MatrixOptimizer:
    options = {"lr": 1e-2, "stochastic_rounding": True, "state_dtype": "fp32", **options}
    return METHODS[name](groups(parameters), **options)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_rounded_weights_are_the_fp32_update_of_the_bf16_weights_rounded_once(name):
    """Oracle: the same method on fp32 copies of the bf16 weights; the two neighbors of its result are all
    that may come out, and the result itself wherever bf16 holds it."""
    rounded = make_parameters(dtype=BF16)
    exact = {key: p.detach().float().requires_grad_() for key, p in rounded.items()}
    first, second = build(name, rounded), METHODS[name](groups(exact), lr=1e-2)
    for grads in gradients(2):
        for parameters, dtype in ((rounded, BF16), (exact, torch.float32)):
            for key, parameter in parameters.items():
                parameter.grad = grads[key].to(BF16).to(dtype)
        for key, parameter in exact.items():
            parameter.data.copy_(rounded[key].detach())
        first.step()
        second.step()
        for key in rounded:
            target, got = exact[key].detach(), rounded[key].detach().float()
            # One spacing of bf16 is at most 2^-7 of the number; fp32 results of two paths differ by 1e-5.
            allowed = target.abs() * 2**-7 + LOOSE.get(name, 1e-5)
            assert ((got - target).abs() <= allowed).all(), key
            assert not torch.equal(got, target), "nothing was rounded"


def test_o_the_expectation_of_the_rounding_is_the_number():
    value = 1.0 + 0.3 * 2**-7
    weight = torch.ones(2**16, dtype=BF16)
    for step in (1, 2):
        kernels.round_into_(weight, torch.full((2**16,), value), seed=3, step=step)
        assert set(weight.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
        share = (weight.double().mean().item() - 1.0) * 2**7
        assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2**16)
    on_the_grid = torch.randn(1000).to(BF16)
    kept = on_the_grid.clone()
    kernels.round_into_(on_the_grid, kept.float(), seed=3, step=1)
    assert torch.equal(on_the_grid, kept)


def test_o_updates_below_half_a_spacing_accumulate_where_rounding_to_nearest_stalls():
    """100 updates of 1e-4 on weights of 1, whose spacing below is 2^-8: nearest keeps 1, SR goes down 1e-2.

    The deviation of a weight's sum of 100 roundings is at most sqrt(100) times half a spacing; their mean
    over 4096 weights is 64 times better.
    """
    moved = {}
    for stochastic in (False, True):
        weight = torch.ones(64, 64, dtype=BF16, requires_grad=True)
        optimizer = METHODS["sinkgd"](
            [("w", weight)], lr=1e-4 / 0.05, stochastic_rounding=stochastic
        )  # alpha 0.05 times a balanced gradient of ones
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[stochastic] = 1 - weight.double().mean().item()
    assert moved[False] == 0.0
    assert abs(moved[True] - 1e-2) < 4 * math.sqrt(100) * 2**-9 / 64


@pytest.mark.parametrize("name", ["adamw", "galore", "muon", "lawn", "adamw8bit"])
def test_resumed_equals_never_stopped(name):
    parameters = make_parameters(dtype=BF16)
    optimizer = build(name, parameters, seed=5)
    run(optimizer, parameters, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = {key: value.detach().clone().requires_grad_() for key, value in parameters.items()}
    again = build(name, resumed, seed=5)
    again.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, parameters, 2, seed=2)
    run(again, resumed, 2, seed=2)
    assert all(torch.equal(parameters[key], resumed[key]) for key in parameters)


def test_the_noise_is_that_of_seed_name_step_and_element_only():
    def after(seed: int, names: list[str], steps: int = 1) -> Tensor:
        weights = [torch.ones(16, 16, dtype=BF16, requires_grad=True) for _ in names]
        optimizer = METHODS["spam"](
            list(zip(names, weights, strict=True)), lr=1e-3, seed=seed, stochastic_rounding=True
        )
        for _ in range(steps):
            torch.rand(3)  # global draws do not matter
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weights[-1].detach()

    alone = after(0, ["a"])
    assert torch.equal(alone, after(0, ["b", "a"]))
    for other in (after(1, ["a"]), after(0, ["b"])):
        assert not torch.equal(alone, other)
    assert not torch.equal(alone - 1, after(0, ["a"], 2) - alone)


def test_a_part_of_a_matrix_is_rounded_as_in_the_whole():
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    key = torch.tensor(rounding_key(3, 9))
    whole = round_stochastically(x, key)
    assert torch.equal(round_stochastically(x[4:], key, first=24), whole[4:])
    part = torch.empty(3, 6, dtype=BF16)
    kernels.round_into_(part, x[4:], seed=3, step=9, first=24)
    assert torch.equal(part, whole[4:])


def test_many_pieces_are_one(monkeypatch):
    x = torch.randn(1000)
    whole, pieces = torch.empty(1000, dtype=BF16), torch.empty(1000, dtype=BF16)
    kernels.round_into_(whole, x, seed=1, step=2)
    monkeypatch.setattr("llmnorm_kernels.optimizer_steps.ROUNDED_AT_ONCE", 96)
    kernels.round_into_(pieces, x, seed=1, step=2)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_state_bytes_count_the_counter_and_a_copy_goes_on_alike(name):
    parameters = make_parameters(dtype=BF16)
    optimizer = build(name, parameters)
    planned = {p: optimizer.state_bytes(g, p) for g in optimizer.param_groups for p in g["params"]}
    run(optimizer, parameters, 1)
    for parameter in parameters.values():
        state = optimizer.state[parameter]
        assert planned[parameter] == sum(value.numel() * value.element_size() for value in state.values())
        assert state["rounding_step"].item() == 1
    copied, twin = copy.deepcopy((parameters, optimizer))
    run(optimizer, parameters, 1, seed=2)
    run(twin, copied, 1, seed=2)
    assert all(torch.equal(parameters[key], copied[key]) for key in parameters)


def test_stacked_equal_shapes_have_noise_of_their_own(monkeypatch):
    monkeypatch.setattr(MatrixOptimizer, "stack_devices", frozenset({"cpu"}))
    pair = [torch.ones(32, 32, dtype=BF16, requires_grad=True) for _ in range(2)]
    optimizer = METHODS["sinkgd"]([("a", pair[0]), ("b", pair[1])], lr=0.02, stochastic_rounding=True)
    for weight in pair:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(*pair)


def test_adamw_is_torch_s_unless_something_is_asked_that_torch_has_not(llama):
    assert type(create_optimizer("adamw", llama().to(BF16), lr=1e-3)) is torch.optim.AdamW
    assert type(create_optimizer("adamw", llama(), lr=1e-3, state_dtype="fp32")) is torch.optim.AdamW
    for options in ({"stochastic_rounding": True}, {"state_dtype": "fp32"}):
        model = llama().to(BF16)
        optimizer = create_optimizer("adamw", model, lr=1e-3, **options)
        assert type(optimizer) is MatrixAdamW
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kept = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
        assert sum(route.state_bytes for route in routing_table(optimizer)) == kept


def test_matrix_adamw_is_torch_adamw():
    ours, theirs = make_parameters(), make_parameters()
    run(MatrixAdamW(groups(ours), lr=3e-3, weight_decay=0.1, betas=(0.8, 0.95)), ours, 5)
    plain = [p for p in theirs.values() if p.ndim > 1], [p for p in theirs.values() if p.ndim == 1]
    reference = [{"params": plain[0], "weight_decay": 0.1}, {"params": plain[1], "weight_decay": 0.0}]
    run(torch.optim.AdamW(reference, lr=3e-3, betas=(0.8, 0.95), foreach=False), theirs, 5)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)


def test_weights_of_another_dtype_are_refused_if_they_are_all_and_move_as_ever_if_not():
    with pytest.raises(UserError, match=r"optimizer.stochastic_rounding=true rounds bf16 weights.*float32"):
        build("muon", make_parameters())
    weight, gain = torch.ones(4, 4, dtype=BF16, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = METHODS["muon"]([("w", weight), ("g", gain)], stochastic_rounding=True)
    weight.grad, gain.grad = torch.ones_like(weight), torch.ones_like(gain)
    optimizer.step()
    assert "rounding_step" in optimizer.state[weight] and "rounding_step" not in optimizer.state[gain]
    hyper = {"stochastic_rounding": False, "seed": 0}
    assert next_rounding("w", weight, {}, hyper) is None


@pytest.mark.parametrize("bad", [torch.zeros(4, dtype=BF16), torch.zeros(5), torch.zeros(8)[::2]])
def test_the_kernel_s_wrapper_names_what_it_cannot_take(bad):
    with pytest.raises(ValueError, match=r"bfloat16|shape|contiguous"):
        kernels.round_into_(torch.zeros(4, dtype=BF16), bad, seed=0, step=1)
