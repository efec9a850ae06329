"""The torch reference of the norm family: what it equals, its derivatives, and the inputs it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import llmnorm_kernels as kernels


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str
)
def test_rms_norm_is_llamas_bit_for_bit(dtypes):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    dtype, gain_dtype = (getattr(torch, name) for name in dtypes)
    torch.manual_seed(0)
    stock = LlamaRMSNorm(96, eps=1e-5).to(gain_dtype)
    torch.nn.init.normal_(stock.weight)
    x = torch.randn(3, 7, 96).to(dtype)
    ours = kernels.rms_norm(x, stock.weight, 1e-5)
    assert ours.dtype == stock(x).dtype
    assert torch.equal(ours, stock(x))


def test_layer_norm_is_torchs():
    x, weight, bias = (
        torch.randn(5, 33, dtype=torch.float64),
        torch.randn(33).double(),
        torch.randn(33).double(),
    )
    torch.testing.assert_close(
        kernels.layer_norm(x, weight, bias, 1e-5), F.layer_norm(x, (33,), weight, bias, 1e-5)
    )


def test_crms_norm_is_the_layer_norm_of_the_lifted_vector():
    x = torch.randn(5, 31, dtype=torch.float64)
    lifted = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    expected = F.layer_norm(lifted, (32,), eps=1e-6)[:, :31]
    torch.testing.assert_close(kernels.crms_norm(x, eps=1e-6), expected)


def test_fusions_equal_their_parts():
    torch.manual_seed(0)
    x, residual, weight, bias = (torch.randn(4, 32, dtype=torch.float64) for _ in range(4))
    weight, bias = weight[0], bias[0]
    s = 1.5 * residual + x
    y, kept = kernels.add_rms_norm(x, residual, weight, residual_scale=1.5, scale=0.5)
    torch.testing.assert_close(kept, s)
    torch.testing.assert_close(y, 0.5 * kernels.rms_norm(s, weight))
    torch.testing.assert_close(
        kernels.add_layer_norm(x, residual, weight, bias)[0], kernels.layer_norm(residual + x, weight, bias)
    )
    torch.testing.assert_close(
        kernels.norm_add(x, residual, weight, residual_scale=1.5), kernels.rms_norm(s, weight)
    )
    expected = 0.5 * residual + kernels.layer_norm(x, weight, bias, 1e-6)
    torch.testing.assert_close(
        kernels.sandwich_add(x, residual, weight, bias, kind="layernorm", residual_scale=0.5), expected
    )
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, zero_centered=True), kernels.rms_norm(x, 1 + weight)
    )


def test_add_rms_norm_reads_the_rounded_sum():
    """In bfloat16 the statistics are those of the stream as stored, so the fused and the two-step block agree
    bit for bit."""
    x, residual = torch.randn(8, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    weight = torch.randn(64).bfloat16()
    y, s = kernels.add_rms_norm(x, residual, weight)
    assert torch.equal(s, x + residual)
    assert torch.equal(y, kernels.rms_norm(x + residual, weight))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "crmsnorm"])
@pytest.mark.parametrize("function", [kernels.norm_add, kernels.sandwich_add])
def test_gradcheck(function, kind):
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    call = lambda *given: function(*given, kind=kind, residual_scale=1.5, scale=0.5)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, residual, weight, bias))


X, G = torch.randn(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.rms_norm(X.long(), G), r"x has dtype torch.int64; it takes float32"),
        (lambda: kernels.rms_norm(X, torch.ones(7)), r"weight has shape \(7,\); it must be \(8,\)"),
        (lambda: kernels.rms_norm(X, G, -1e-6), r"eps=-1e-06 must be zero or positive"),
        (lambda: kernels.rms_norm(X, G, float("nan")), r"eps=nan"),
        (lambda: kernels.rms_norm(torch.empty(3, 0)), r"x has shape \(3, 0\)"),
        (
            lambda: kernels.rms_norm(X, G, cast="gemma"),
            r"cast='gemma' is unknown; choose one of llama, float32",
        ),
        (
            lambda: kernels.rms_norm(X, G, out_dtype=torch.int32),
            r"out_dtype=torch.int32 must be a floating-point dtype",
        ),
        (lambda: kernels.layer_norm(X, G, torch.ones(3, 8)), r"bias has shape \(3, 8\)"),
        (lambda: kernels.add_rms_norm(X, X[:2], G), r"residual has shape \(2, 8\) but x has \(3, 8\)"),
        (lambda: kernels.norm_add(X, X, G, kind="batchnorm"), r"kind='batchnorm' is unknown"),
        (lambda: kernels.rms_norm(X, G.to("meta")), r"weight is on meta but x is on cpu"),
        (lambda: kernels.rms_norm([1.0]), r"x must be a torch.Tensor, not list"),
    ],
)
def test_refused_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
