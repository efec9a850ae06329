"""The optimizer-step kernels against their reference; the symmetric product against float64."""

from __future__ import annotations

import pytest
import torch
from comparing import relative_error

import llmnorm_kernels as kernels
from llmnorm_kernels import use_backend

OPS = torch.ops.llmnorm_kernels


def both(step, *tensors):
    """The tensors after `step` on the kernels, and after `step` on the reference, from the same start."""
    fused = [t.clone() for t in tensors]
    step(*fused)
    plain = [t.clone() for t in tensors]
    with use_backend("torch"):
        step(*plain)
    return fused, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 17, 2048, 5000])
def test_adamw(device, count, dtype):
    param, grad = (torch.randn(count, device=device).to(dtype) for _ in range(2))
    m, v = torch.randn(count, device=device), torch.rand(count, device=device)
    scale = torch.tensor(0.5, device=device)

    def step(param, grad, m, v):
        kernels.adamw_(param, grad, m, v, step=3, lr=0.1, weight_decay=0.1, grad_scale=scale)

    fused, plain = both(step, param, grad, m, v)
    assert torch.equal(fused[1], grad)
    for index, tolerance in ((0, {torch.float32: 1e-6, torch.bfloat16: 5e-4}[dtype]), (2, 1e-6), (3, 1e-6)):
        assert relative_error(fused[index], plain[index]) < tolerance


@pytest.mark.parametrize("count", [3, 256, 3000])
def test_adamw_8_bit(device, count):
    """The 8-bit path equals its reference: the codes but for the ties of another square root, the scales to
    rounding."""
    param, grad = torch.randn(count, device=device).bfloat16(), torch.randn(count, device=device).bfloat16()
    states = kernels.quantized_moments(param)

    def run(param, *states):
        for step in (1, 2, 3):
            kernels.adamw_(param, grad * step, *states[:2], step=step, lr=0.05, scales=states[2:], seed=7)

    fused, plain = both(run, param, *states)
    for a, b in zip(fused[1:3], plain[1:3], strict=True):
        assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 5e-3
    for a, b in zip(fused[3:], plain[3:], strict=True):
        assert relative_error(a, b) < 1e-5
    # The noise is the same hash, so bfloat16 params agree but where a code differed.
    assert (fused[0] != plain[0]).float().mean() < 0.02


def test_stochastic_rounding_is_bit_equal_and_leaves_non_finite(device):
    param = torch.randn(300, device=device).bfloat16()
    param[5], param[6] = float("inf"), float("nan")
    grad, zero = torch.randn(300, device=device).bfloat16(), torch.zeros(300, device=device)

    def step(param):
        kernels.adamw_(
            param, grad, zero.clone(), zero.clone() + 1.0, step=1, lr=1e-3, betas=(0.0, 0.0), seed=3
        )

    (fused,), (plain,) = both(step, param)
    finite = torch.arange(300, device=device) > 6
    assert torch.equal(fused[finite], plain[finite])
    assert fused[5].isinf() and fused[6].isnan()


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 2500)])
@pytest.mark.parametrize("rule", ["rows", "columns", "sinkgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normalized_updates(device, rule, shape, dtype):
    param, update = (torch.randn(shape, device=device).to(dtype) for _ in range(2))

    def step(param):
        if rule == "sinkgd":
            kernels.sinkgd_step_(param, update, lr=0.1, weight_decay=0.1)
        else:
            kernels.normalized_step_(param, update, dim=int(rule == "rows"), lr=0.1, weight_decay=0.1)

    (fused,), (plain,) = both(step, param)
    assert relative_error(fused, plain) < {torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]


def test_stochastic_updates_are_bit_equal(device):
    param, update = (torch.randn(9, 40, device=device).bfloat16() for _ in range(2))
    fused, plain = both(lambda p: kernels.sinkgd_step_(p, update, lr=1e-4, seed=1, step=5), param)
    # Equal but where the two float32 results differ in the last bit across a noise threshold.
    assert (fused[0] != plain[0]).float().mean() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 3), (50, 20), (64, 64), (130, 70), pytest.param(600, 100, marks=pytest.mark.slow)]
)
def test_symmetric_product(device, n, k, dtype):
    x = torch.randn(2, n, k, device=device).to(dtype)
    half = torch.randn(2, n, n, device=device)
    addend = (half + half.mT).to(dtype)
    fused = kernels.symmetric_product(x, addend, alpha=0.5, beta=-2.0)
    exact = 0.5 * x.double() @ x.double().mT - 2.0 * addend.double()
    assert (
        relative_error(fused, exact) < {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    )
    assert torch.equal(fused, fused.mT)
    strided = torch.randn(k, n, device=device).to(dtype).t()
    assert relative_error(kernels.symmetric_product(strided), strided.double() @ strided.double().t()) < 3e-3


@pytest.mark.parametrize("shape", [(20, 48), (48, 20), (2, 3, 24, 24)])
def test_newton_schulz(device, shape):
    x = torch.randn(shape, device=device)
    fused = kernels.newton_schulz(x, dtype=torch.float32)
    with use_backend("torch"):
        assert relative_error(fused, kernels.newton_schulz(x, dtype=torch.float32)) < 1e-5


def test_opcheck(device):
    x = torch.randn(1, 20, 12, device=device)
    torch.library.opcheck(OPS.symmetric_product.default, (x, None, 1.0, 0.0))
    param, grad, m, v = (torch.rand(300, device=device) for _ in range(4))
    scalars = (0.1, 0.9, 0.99, 1e-8, 1.0, 0.1, 0.1)
    torch.library.opcheck(OPS.adamw_.default, (param, grad, m, v, None, None, None, None, *scalars))
    matrix, rows = torch.randn(6, 20, device=device), torch.ones(6, device=device)
    torch.library.opcheck(OPS.scaled_squares_.default, (matrix, rows, None, 1.0, 1e-8, True, True))
    torch.library.opcheck(OPS.scaled_update_.default, (matrix.clone(), matrix, rows, None, None, 0.1, 1.0))
