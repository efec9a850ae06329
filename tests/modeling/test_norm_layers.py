"""The norms against golden vectors, numerical gradients and their own definition."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import llmnorm.modeling
from llmnorm.modeling.lipschitz import FloorNorm
from llmnorm.modeling.norms import (
    NORMS,
    LlmNormLayerNorm,
    LlmNormRMSNorm,
    layer_norm,
    make_norm,
    rms_norm,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "norms.json").read_text())


def _leaf(values: list[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# fp64: the vectors carry 8 digits. fp32: a few roundings of 6e-8 on values up to 3.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_o1_rms_norm_golden(dtype: torch.dtype, tolerance: float) -> None:
    x, gain = _leaf(GOLDEN["x"], dtype), _leaf(GOLDEN["gain"], dtype)
    y = rms_norm(x, gain, GOLDEN["eps"])
    y.backward(torch.tensor(GOLDEN["dy"], dtype=dtype))
    for name, value in (("y", y), ("dx", x.grad), ("dgain", gain.grad)):
        expected = torch.tensor(GOLDEN["rmsnorm"][name], dtype=dtype)
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_o1_layer_norm_golden(dtype: torch.dtype, tolerance: float) -> None:
    x, gain, shift = (_leaf(GOLDEN[name], dtype) for name in ("x", "gain", "shift"))
    y = layer_norm(x, gain, shift, GOLDEN["eps"])
    y.backward(torch.tensor(GOLDEN["dy"], dtype=dtype))
    for name, value in (("y", y), ("dx", x.grad), ("dgain", gain.grad), ("dshift", shift.grad)):
        expected = torch.tensor(GOLDEN["layernorm"][name], dtype=dtype)
        torch.testing.assert_close(value, expected, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("kind", NORMS)
def test_o2_first_and_second_gradients(kind: str, scale: float) -> None:
    torch.manual_seed(0)
    norm = make_norm(kind, 5, 1e-3, scale).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *norm.parameters())

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        names = [name for name, _ in norm.named_parameters()]
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_dtype_follows_x_with_one_rounding(kind: str, gain_dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = make_norm(kind, 64, 1e-6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=1.0)
    norm.to(gain_dtype)
    x = (3 + torch.randn(8, 64)).to(x_dtype).requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.dtype == x_dtype
    assert x.grad is not None
    assert x.grad.dtype == x_dtype
    assert {parameter.grad.dtype for parameter in norm.parameters() if parameter.grad is not None} == {
        gain_dtype
    }

    exact = make_norm(kind, 64, 1e-6).double()
    exact.load_state_dict(norm.state_dict())
    # Rounding the exact result once to bf16's 8 bits is off by at most 2^-8 of it; every further rounding, as
    # in gain * bf16(xhat), would add up to as much again. fp32: a few roundings of 6e-8.
    relative = 2.0**-8 + 1e-5 if x_dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(y.double(), exact(x.detach().double()), rtol=relative, atol=2e-6)


def test_layer_norm_variance_is_two_pass() -> None:
    """mean(x^2) - mean(x)^2 in fp32 would be off by 1e-3 here."""
    torch.manual_seed(0)
    x = 50 + 0.8 * torch.randn(16, 768)
    y = make_norm("layernorm", 768, 1e-6)(x)
    exact = make_norm("layernorm", 768, 1e-6).double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", NORMS)
def test_scaled_norm_is_the_norm_times_the_constant(kind: str) -> None:
    plain, scaled = make_norm(kind, 16, 1e-6), make_norm(kind, 16, 1e-6, scale=0.25)
    torch.manual_seed(0)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(scaled(x), 0.25 * plain(x))  # a power of two rounds nothing
    assert dict(scaled.named_buffers()) == {}


def test_class_names_say_which_norms_may_be_replaced() -> None:
    """Serving engines replace *RMSNorm and *LayerNorm by plain kernels, which would drop a scale."""
    folder = Path(llmnorm.modeling.__file__).parent
    modules = [importlib.import_module(f"llmnorm.modeling.{path.stem}") for path in folder.glob("*.py")]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    ours = [c for c in classes if issubclass(c, nn.Module) and c.__module__.startswith("llmnorm")]
    assert len(ours) > 20
    replaceable = {c for c in ours if "RMSNorm" in c.__name__ or "LayerNorm" in c.__name__}
    assert replaceable == {LlmNormRMSNorm, LlmNormLayerNorm}
    assert {plain for plain, _ in NORMS.values()} == replaceable | {FloorNorm}  # a floor is no plain RMSNorm


@pytest.mark.parametrize("kind", NORMS)
def test_statistics_do_not_overflow_in_low_precision(kind: str) -> None:
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    x[:, ::2] *= -1
    y = make_norm(kind, 64, 1e-6)(x)  # 300^2 exceeds fp16
    torch.testing.assert_close(y.float(), torch.sign(x).float(), rtol=0, atol=1e-3)
