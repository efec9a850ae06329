"""RMSNorm, LayerNorm and CRMSNorm, alone and fused with the residual addition before or after them.

One equation covers the family, with every sum in float32 (float64 for float64 inputs) and gain = scale *
gamma, or scale * (1 + gamma) with a zero-centered gamma:

    s = residual_scale * residual + x                     add_rms_norm, add_layer_norm, norm_add; else s = x
    RMSNorm     n = s / sqrt(mean(s^2) + eps)             Zhang and Sennrich, arXiv 1910.07467
    LayerNorm   n = (s - mean(s)) / sqrt(var(s) + eps)    Ba et al., arXiv 1607.06450
    CRMSNorm    n = s / sqrt((sum(s^2) + sum(s)^2) / (width + 1) + eps)    Jiang et al., arXiv 2305.14858
    y = gain * n + scale * beta                           (+ residual_scale * residual after it: sandwich_add)

`cast` is the order of rounding of 16-bit inputs: "llama" rounds n to the input dtype before the gain
multiplies it, as Hugging Face's LlamaRMSNorm does, and returns the promoted dtype of input and gain;
"float32" multiplies in float32 and rounds once to the input dtype, as OLMo-2 and Gemma do.

Roofline, B bytes per row-element (2 for bfloat16), M x N elements: norm forward 2 M N B bytes, backward 3 M N
B; with an addition before the norm 4 M N B each way; sandwich_add 3 M N B each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import (
    check_choice,
    check_finite,
    check_floats,
    check_given,
    check_numbers,
    check_same_shape,
    check_vector,
)
from .dispatch import accumulator, operator, register, runs_triton
from .layout import empty_rows_like

NORM_KINDS = ("rmsnorm", "layernorm", "crmsnorm")
CASTS = ("llama", "float32")


def norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: str,
    add_after: bool, eps: float, scale: float, residual_scale: float, zero_centered: bool,
    round_normalized: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, s) of the module's equation in torch operations: the specification the kernels are tested
    against."""
    s = x
    if residual is not None and not add_after:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        s = (x.to(accumulator(dtype)) + residual_scale * residual.to(accumulator(dtype))).to(dtype)
    h = s.to(accumulator(s.dtype))
    if kind == "layernorm":
        h = h - h.mean(-1, keepdim=True)
    if kind == "crmsnorm":
        variance = (h.pow(2).sum(-1, keepdim=True) + h.sum(-1, keepdim=True).pow(2)) / (h.shape[-1] + 1)
    else:
        variance = h.pow(2).mean(-1, keepdim=True)
    y = h * torch.rsqrt(variance + eps)
    if round_normalized:
        y = y.to(s.dtype).to(h.dtype)
    gain = torch.ones((), dtype=h.dtype, device=h.device) if weight is None else weight.to(h.dtype)
    if zero_centered:
        gain = 1.0 + gain
    y = scale * gain * y
    if bias is not None:
        y = y + scale * bias.to(h.dtype)
    if residual is not None and add_after:
        y = y + residual_scale * residual.to(h.dtype)
    return y.to(out_dtype), s


def _fake_forward(
    x, residual, weight, bias, kind, add_after, eps, scale, residual_scale, zero_centered, round_normalized,
    out_dtype
):  # fmt: skip
    add_before = residual is not None and not add_after
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    rows = x.numel() // x.shape[-1]
    s = empty_rows_like(x, dtype) if add_before else x.new_empty(0)
    shift = x.new_empty(0 if kind == "rmsnorm" else rows, dtype=accumulator(dtype))
    return empty_rows_like(x, out_dtype), s, shift, x.new_empty(rows, dtype=accumulator(dtype))


def _fake_backward(
    dy, ds, x, weight, bias, shift, rstd, kind, scale, residual_scale, zero_centered, round_normalized, dtype,
    residual_dtype
):  # fmt: skip
    return (
        empty_rows_like(x, dtype),
        x.new_empty(0) if residual_dtype is None else empty_rows_like(x, residual_dtype),
        x.new_empty(0) if weight is None else torch.empty_like(weight),
        x.new_empty(0) if bias is None else torch.empty_like(bias),
    )


register(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, str kind, bool add_after, "
    "float eps, float scale, float residual_scale, bool zero_centered, bool round_normalized, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    "norms_launch:launch_forward",
    _fake_forward,
)
register(
    "norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor? weight, Tensor? bias, Tensor shift, Tensor rstd, "
    "str kind, float scale, float residual_scale, bool zero_centered, bool round_normalized, "
    "ScalarType dtype, ScalarType? residual_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    "norms_launch:launch_backward",
    _fake_backward,
)


class _Norm(torch.autograd.Function):
    """(y, s) where a residual is added before the norm, else y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: str,
        add_after: bool, eps: float, scale: float, residual_scale: float, zero_centered: bool,
        round_normalized: bool, out_dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        y, s, shift, rstd = torch.ops.llmnorm_kernels.norm_forward(
            x,
            residual,
            weight,
            bias,
            kind,
            add_after,
            eps,
            scale,
            residual_scale,
            zero_centered,
            round_normalized,
            out_dtype,
        )
        add_before = residual is not None and not add_after
        ctx.save_for_backward(s if add_before else x, weight, bias, shift, rstd)
        ctx.options = (kind, scale, residual_scale, zero_centered, round_normalized)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        ctx.add_before = add_before
        ctx.set_materialize_grads(False)
        return (y, s) if add_before else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> Any:
        x, weight, bias, shift, rstd = ctx.saved_tensors
        residual_scale = ctx.options[2]
        dtype, residual_dtype = ctx.dtypes
        if dy is None:
            if ds is None:
                return (None,) * 12
            return (ds.to(dtype), (ds * residual_scale).to(residual_dtype), *(None,) * 10)
        # One tensor serves both summands of s unless they differ in scale or dtype.
        split = ctx.add_before and (residual_scale != 1.0 or residual_dtype != dtype)
        dx, dres, dw, db = torch.ops.llmnorm_kernels.norm_backward(
            dy, ds, x, weight, bias, shift, rstd, *ctx.options, dtype, residual_dtype if split else None
        )
        dresidual: Tensor | None = None
        if ctx.add_before:
            dresidual = dres if split else dx
        elif residual_dtype is not None:
            dresidual = (dy if residual_scale == 1.0 else dy * residual_scale).to(residual_dtype)
        return (dx, dresidual, None if weight is None else dw, None if bias is None else db, *(None,) * 8)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *, kind: str,
    add_after: bool = False, eps: float, scale: float, residual_scale: float = 1.0, zero_centered: bool,
    cast: str, out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_given(x=x)
    check_floats(x=x, residual=residual, weight=weight, bias=bias)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; its last dimension, the one normalized, must not be empty"
        )
    check_vector("weight", weight, x.shape[-1])
    check_vector("bias", bias, x.shape[-1])
    if residual is not None:
        check_same_shape("residual", residual, "x", x)
    check_numbers(eps=eps)
    check_finite(scale=scale, residual_scale=residual_scale)
    check_choice("cast", cast, CASTS)
    check_choice("kind", kind, NORM_KINDS)
    add_before = residual is not None and not add_after
    if out_dtype is None:
        out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        if cast == "llama" and weight is not None:
            out_dtype = torch.promote_types(out_dtype, weight.dtype)
    elif not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype={out_dtype} must be a floating-point dtype")
    options = (
        kind,
        add_after,
        float(eps),
        float(scale),
        float(residual_scale),
        zero_centered,
        cast == "llama",
        out_dtype,
    )
    if not runs_triton(x):
        return norm_reference(x, residual, weight, bias, *options)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    outputs = _Norm.apply(x, residual, weight, bias, *options)
    return outputs if add_before else (outputs, x)


@operator
def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, scale: float = 1.0, cast: str = "llama",
    zero_centered: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y = scale * gamma * x / sqrt(mean(x^2) + eps) over the last dimension (arXiv 1910.07467).

    x: (..., width), any strides; weight: (width,) or None. scale is a constant folded into the gain at no
    cost (1/sqrt(layer) for LayerNorm Scaling, arXiv 2502.05795). cast, zero_centered: see the module.
    out_dtype: dtype of y, by default the one that `cast` implies. Bytes moved: 2 M N B forward, 3 M N B
    backward. Raises ValueError for wrong shapes, dtypes, devices, eps.
    """
    return _norm(
        x, None, weight, None, kind="rmsnorm", eps=eps, scale=scale, zero_centered=zero_centered, cast=cast,
        out_dtype=out_dtype
    )[0]  # fmt: skip


@operator
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, scale: float =
    1.0, cast: str = "float32", zero_centered: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y = scale * (gamma * (x - mean(x)) / sqrt(var(x) + eps) + beta) over the last dimension (arXiv
    1607.06450).

    x: (..., width); weight, bias: (width,) or None. The variance is the biased one, of the centered row (two
    passes in registers). Bytes moved: 2 M N B forward, 3 M N B backward. Other arguments and errors as in
    `rms_norm`.
    """
    return _norm(
        x, None, weight, bias, kind="layernorm", eps=eps, scale=scale, zero_centered=zero_centered, cast=cast,
        out_dtype=out_dtype
    )[0]  # fmt: skip


@operator
def crms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, scale: float = 1.0, cast: str = "llama",
    zero_centered: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y = scale * gamma * x / sqrt((sum(x^2) + sum(x)^2) / (width + 1) + eps) (CRMSNorm, arXiv 2305.14858).

    x holds the first `width` coordinates of a zero-mean vector of width + 1, whose LayerNorm this is. Odd
    widths are fastest in tensors from `empty_padded`. Bytes moved: 2 M N B forward, 3 M N B backward.
    Arguments and errors as in `rms_norm`.
    """
    return _norm(
        x, None, weight, None, kind="crmsnorm", eps=eps, scale=scale, zero_centered=zero_centered, cast=cast,
        out_dtype=out_dtype
    )[0]  # fmt: skip


@operator
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, residual_scale: float =
    1.0, scale: float = 1.0, cast: str = "llama", zero_centered: bool = False, out_dtype: torch.dtype | None =
    None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s = residual_scale * residual + x;  y = rms_norm(s);  returns (y, s): the end of a pre-norm block and
    the next norm at once.

    x, residual: (..., width) of equal shape, possibly of two dtypes; s has the promoted dtype and y the
    statistics of the rounded s. Bytes moved: 4 M N B each way (5 unfused). Other arguments and errors as in
    `rms_norm`.
    """
    check_given(residual=residual)
    return _norm(
        x, residual, weight, None, kind="rmsnorm", eps=eps, scale=scale, residual_scale=residual_scale,
        zero_centered=zero_centered, cast=cast, out_dtype=out_dtype,
    )  # fmt: skip


@operator
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    *, residual_scale: float = 1.0, scale: float = 1.0, cast: str = "float32", zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s = residual_scale * residual + x;  y = layer_norm(s);  returns (y, s). Arguments, errors and bytes as
    in `add_rms_norm`."""
    check_given(residual=residual)
    return _norm(
        x, residual, weight, bias, kind="layernorm", eps=eps, scale=scale, residual_scale=residual_scale,
        zero_centered=zero_centered, cast=cast, out_dtype=out_dtype,
    )  # fmt: skip


@operator
def norm_add(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6,
    *, kind: str = "rmsnorm", residual_scale: float = 1.0, scale: float = 1.0, cast: str = "llama",
    zero_centered: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y = norm(residual_scale * residual + x): the end of a Post-LN block (residual_scale is DeepNorm's
    alpha, arXiv 2203.00555).

    kind: rmsnorm, layernorm or crmsnorm. The sum is kept for backward only. Bytes moved: 4 M N B forward, 3 M
    N B backward. Other arguments and errors as in `rms_norm`.
    """
    check_given(residual=residual)
    return _norm(
        x, residual, weight, bias, kind=kind, eps=eps, scale=scale, residual_scale=residual_scale,
        zero_centered=zero_centered, cast=cast, out_dtype=out_dtype,
    )[0]  # fmt: skip


@operator
def sandwich_add(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6,
    *, kind: str = "rmsnorm", residual_scale: float = 1.0, scale: float = 1.0, cast: str = "llama",
    zero_centered: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y = residual_scale * residual + norm(x): the end of a sandwich, Peri-LN (arXiv 2502.02732) or OLMo-2
    block.

    The sum is rounded once. Bytes moved: 3 M N B each way. Arguments and errors as in `norm_add`.
    """
    check_given(residual=residual)
    return _norm(
        x, residual, weight, bias, kind=kind, add_after=True, eps=eps, scale=scale,
        residual_scale=residual_scale, zero_centered=zero_centered, cast=cast, out_dtype=out_dtype,
    )[0]  # fmt: skip
