"""The fake-quantization kernel is bit-equal to its reference."""

from __future__ import annotations

import pytest
import torch

import llmnorm_kernels as kernels
from llmnorm_kernels import use_backend
from llmnorm_kernels.quantize import FIXED_GROUPS, FORMATS

CASES = [
    (name, group, outliers)
    for name in FORMATS
    for group in ((FIXED_GROUPS[name],) if name in FIXED_GROUPS else (16, 100, 256))
    for outliers in (0, 2)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "group", "outliers"), CASES)
def test_bit_equal(device, name, group, outliers, dtype):
    x = torch.randn(5, 300, device=device).to(dtype)
    x[0], x[1, 20:40], x[2] = 0.0, 1e-30, 1e4 * x[2]
    # Exact halves of a step, where ties decide.
    x[3] = torch.arange(300, device=device) % 15 * 0.5 - 3.5
    fused = kernels.fake_quantize(x, name, group, outliers=outliers)
    with use_backend("torch"):
        assert torch.equal(fused, kernels.fake_quantize(x, name, group, outliers=outliers))
    assert fused.isfinite().all() and fused.dtype == dtype


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_is_bit_equal(device, name):
    x = torch.randn(3, 100, device=device)
    x[1] = 0.0
    fused = kernels.fake_quantize(x, name, outliers=2, seed=7, step=3)
    with use_backend("torch"):
        assert torch.equal(fused, kernels.fake_quantize(x, name, outliers=2, seed=7, step=3))
        assert not torch.equal(fused, kernels.fake_quantize(x, name, outliers=2, seed=7, step=4))
        assert not torch.equal(fused, kernels.fake_quantize(x, name, outliers=2))


def test_strides_gradient_compile_and_opcheck(device):
    x = torch.randn(40, 6, device=device).t().requires_grad_()
    y = kernels.fake_quantize(x, "fp4", 16)
    up = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, up)[0], up)
    assert kernels.fake_quantize(x[:0]).shape == (0, 40)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: kernels.fake_quantize(x, "fp4", 16), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), y)
    torch.library.opcheck(torch.ops.llmnorm_kernels.fake_quantize.default, (x.detach(), "nvfp4", 16, 0))
