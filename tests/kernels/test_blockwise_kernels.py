"""The kernel of the block-wise quantized AdamW against its reference, and the optimizer on it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from blockwise_cases import beginning, move
from comparing import relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import llmnorm_kernels as kernels
from llmnorm.optim.adamw8bit import AdamW8bit
from llmnorm.optim.matrix import local
from llmnorm.optim.quantized_state import BLOCK, Quantized, codebook, dequantize
from llmnorm_kernels import use_backend


def both(param, grads, bits, **options):
    """(param, states) after a step for each gradient, on the kernel and on the reference."""
    results = []
    for backend in ("triton", "torch"):
        moved, states = param.clone(), beginning(param, bits)
        with use_backend(backend):
            for step, grad in enumerate(grads, start=1):
                move(moved, grad, states, bits, step, **options)
        results.append((moved, states))
    return results


def check_states(fused, plain, device):
    """Equal to the last bit where nothing contracts b M + (1 - b) g. On a GPU the last bits of a moment may
    differ (2^-23 of it), where codes are 2^-8 apart or more: a few in 2^15 fall on the other side of a
    border."""
    for one, other in zip(fused, plain, strict=True):
        if device == "cpu":
            assert torch.equal(one, other)
        elif one.dtype == torch.uint8:
            assert (one != other).float().mean() < 1e-3
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 127), (2, 129), (5, 256), (9, 601), pytest.param((40, 2817), marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4])
def test_o_reference_three_steps(device, bits, shape, dtype):
    param = torch.randn(shape, device=device).to(dtype)
    grads = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
    kept = [grad.clone() for grad in grads]
    (fused, fused_states), (plain, plain_states) = both(param, grads, bits)
    check_states(fused_states, plain_states, device)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    # 16-bit weights may fall on either side of a tie.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-4, torch.float16: 1e-4}[dtype]
    assert relative_error(fused, plain) < tolerance
    assert not torch.equal(fused, param)


@pytest.mark.parametrize("bits", [8, 4])
def test_o_reference_zeros_and_extreme_scales(device, bits):
    """Rows of zeros, below the smallest absmax, of 60 decades at once, at the borders of the map; a short
    block beside a whole one."""
    columns = BLOCK[bits] + 40
    grads = []
    for sign in (1.0, -1.0):
        grad = torch.zeros(6, columns, device=device)
        grad[1] = 1e-20 * sign
        grad[2] = sign * torch.logspace(-30, 18, columns, device=device)
        grad[3] = 1e18 * torch.randn(columns, device=device)
        values, _ = codebook(bits, True, torch.device(device))
        borders = (values[1:] + values[:-1]) / 2
        grad[4, : len(borders)] = borders
        grad[4, -1] = grad[4, BLOCK[bits] - 1] = sign
        grad[5, -1] = 1.0
        grads.append(grad)
    param = torch.randn(6, columns, device=device)
    (fused, states), (plain, plain_states) = both(param, grads, bits, betas=(0.0, 0.0))
    check_states(states, plain_states, device)
    assert states[1][0].tolist() == states[3][0].tolist() == [torch.tensor(1e-12).item()] * 2
    assert relative_error(fused, plain) < 1e-6
    assert torch.isfinite(fused).all()
    assert torch.equal(fused[0], plain[0])


def test_o_reference_nan_and_infinity(device):
    grad = torch.randn(3, 600, device=device)
    grad[0, 5], grad[1, 300], grad[2, 599] = float("nan"), float("inf"), -float("inf")
    (fused, states), (plain, plain_states) = both(torch.randn(3, 600, device=device), [grad, grad], 8)
    for one, other in zip(states, plain_states, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if device == "cpu" else 1e-6, atol=0, equal_nan=True)
    assert states[1].isnan().sum() == 3, "each of them fills its block at the second step, and no other"
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("bits", [8, 4])
def test_o_reference_stochastic_rounding_to_the_last_bit(device, bits):
    param = torch.randn(7, 300, device=device).bfloat16()
    grads = [torch.randn(7, 300, device=device).bfloat16() for _ in range(2)]
    (fused, states), (plain, plain_states) = both(param, grads, bits, seed=5, lr=1e-4)
    check_states(states, plain_states, device)
    # Equal but where two float32 results that differ in the last bit meet the noise's threshold.
    assert (fused != plain).float().mean() < 5e-3
    (nearest, _), _ = both(param, grads, bits, lr=1e-4)
    assert (fused != nearest).float().mean() > 0.01, "the noise decides somewhere"


def trained(backends, bits, device, dtype, steps=3, **options):
    """(weight, state) of a 20 x 300 matrix and a small one after some steps, each on its backend."""
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.randn(shape, generator=generator) for shape in ((20, 301), (8, 40)))
    parameters = [weight.to(device, dtype).requires_grad_() for weight in (large, small)]
    named = list(zip(("large", "small"), parameters, strict=True))
    optimizer = AdamW8bit(named, lr=0.02, weight_decay=0.1, state_bits=bits, **options)
    for step in range(steps):
        for parameter in parameters:
            grad = torch.randn(parameter.shape, generator=generator)
            grad[3] = 0
            grad[5] *= 1e-9
            parameter.grad = grad.to(device, dtype)
        with use_backend(backends[step % len(backends)]):
            optimizer.step()
    return parameters, [optimizer.state[parameter] for parameter in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_o_torch_the_optimizer_moves_and_keeps_the_same(device, bits, dtype, monkeypatch):
    """The fused path against the torch path, and both in turns, as when a run goes on elsewhere.

    torch forms M + (1 - b1) (G - M) where the kernel forms b1 M + (1 - b1) G, which moves a moment by its
    last bits and so one code in 2^15 or so across a border. Of 6,020 codes here: at most two.
    """
    launches = []
    step = kernels.adamw_blockwise_
    monkeypatch.setattr(kernels, "adamw_blockwise_", lambda *a, **k: (launches.append(a), step(*a, **k)))
    plain, plain_states = trained(["torch"], bits, device, dtype)
    assert not launches
    for backends, count in ((["triton"], 3), (["torch", "triton"], 1), (["triton", "torch"], 2)):
        launches.clear()
        fused, states = trained(backends, bits, device, dtype)
        assert len(launches) == count, "the small matrix has plain moments"
        for one, other in zip(states, plain_states, strict=True):
            assert list(one) == list(other)
            assert all(one[key].dtype == other[key].dtype for key in one)
            assert all(one[key].shape == other[key].shape for key in one)
        assert states[0]["exp_avg_codes"].shape == (20, 301 if bits == 8 else 151)
        assert set(states[1]) == {"step", "exp_avg", "exp_avg_sq"}
        check_moments(states[0], plain_states[0], bits)
        # bf16: torch rounds the decayed weight and the result, the kernel the result, of weights up to 3.
        rtol, atol = {torch.float32: (1e-5, 2e-6), torch.bfloat16: (2e-2, 2e-2)}[dtype]
        for one, other in zip(fused, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def check_moments(state, expected, bits):
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        torch.testing.assert_close(state[f"{key}_absmax"], expected[f"{key}_absmax"], rtol=1e-6, atol=0)
        moments = [
            dequantize(Quantized(s[f"{key}_codes"], s[f"{key}_absmax"]), bits, signed, 301)
            for s in (state, expected)
        ]
        apart = ~torch.isclose(*moments, rtol=1e-5, atol=0)
        assert apart.sum() <= 2, f"{int(apart.sum())} codes of {key} lie across a border"


def rows_trained(device, rank, **options):
    """Weight and state of 21 x 301 that two processes share, as the one of this rank holds them."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(21, 301, generator=generator).to(device)
    if rank is None:
        place = lambda x: x  # noqa: E731
    else:
        mesh = init_device_mesh(device, (2,))
        place = lambda x: distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)  # noqa: E731
    weight = place(whole).requires_grad_()
    optimizer = AdamW8bit([("w", weight)], lr=0.02, weight_decay=0.1, **options)
    for _ in range(2):
        weight.grad = place(torch.randn(21, 301, generator=generator).to(device))
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


@pytest.mark.parametrize("bits", [8, 4])
def test_o_whole_rows_of_two_processes(device, bits, monkeypatch):
    """11 and 10 rows, each process its own by the kernel, equal the whole matrix to the last bit. The group
    sends nothing, which is what the rule asks of it."""
    launches = []
    step = kernels.adamw_blockwise_
    monkeypatch.setattr(kernels, "adamw_blockwise_", lambda *a, **k: (launches.append(a), step(*a, **k)))
    whole, expected = rows_trained(device, None, state_bits=bits)
    launches.clear()
    parts, states = [], []
    for rank in (0, 1):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            weight, state = rows_trained(device, rank, state_bits=bits)
            parts.append(weight.to_local())
            states.append({key: local(value) for key, value in state.items()})
            assert all(isinstance(state[key], DTensor) for key in state if key != "step")
            assert state["exp_avg_absmax"].shape == expected["exp_avg_absmax"].shape
        finally:
            dist.destroy_process_group()
    assert [(launch[0].shape[0]) for launch in launches] == [11, 11, 10, 10]
    assert torch.equal(torch.cat(parts), whole)
    for key, value in expected.items():
        if key != "step":
            assert torch.equal(torch.cat([state[key] for state in states]), value), key


def test_what_the_kernel_takes(device, monkeypatch):
    """Plain decay and rows of blocks; a cautious decay stays with torch, embeddings go as they are told."""
    launches = []
    step = kernels.adamw_blockwise_
    monkeypatch.setattr(kernels, "adamw_blockwise_", lambda *a, **k: (launches.append(a), step(*a, **k)))
    trained(["triton"], 8, device, torch.bfloat16, steps=1, stochastic_rounding=True)
    assert len(launches) == 1
    trained(["triton"], 8, device, torch.float32, steps=1, cautious_weight_decay=True)
    assert len(launches) == 1
    trained(["triton"], 8, device, torch.float64, steps=1)
    assert len(launches) == 1


def test_opcheck(device):
    param = torch.rand(3, 300, device=device)
    tables = [table for signed in (True, False) for table in codebook(8, signed, torch.device(device))]
    numbers = (256, 0.1, 0.9, 0.99, 1e-8, 1.0, 0.1, 0.1)
    given = (param, torch.rand_like(param), *beginning(param, 8), *tables, None, *numbers)
    torch.library.opcheck(torch.ops.llmnorm_kernels.adamw_blockwise_.default, given)
