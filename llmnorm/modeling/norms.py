"""Normalization layers, one small class each.

`x` is [..., d]; statistics are computed in fp32 or wider whatever the input dtype, the gain is applied in the
same precision and the result is rounded once, to the dtype of `x`. So a norm never changes the dtype of the
residual stream, even when its gain is fp32 and the stream is bf16.

A class whose name ends in RMSNorm or LayerNorm is exactly that norm: serving engines replace such classes by
their own kernels. A norm with anything more, a folded scale for instance, is named otherwise so that nothing
can drop it.

A norm states the initial value of each of its parameters in `initial_values`; see `initialization.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dynamic_tanh import DynamicTanh, LearnedEmbeddingScale
from .fused import kernels, serves
from .hypersphere import UnitNorm, WidthScale
from .lipschitz import FLOOR_RMSNORM, FloorNorm, WidthFloorNorm
from .power_norms import PowerNorm, UnifiedNorm
from .prepbn import PRepBN

Settings = tuple[tuple[str, Any], ...]  # (name, value) pairs


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm * norm / x.shape[-1] + eps).rsqrt()


class _RMSNormFunction(torch.autograd.Function):
    """xhat = x / sqrt(mean(x^2) + eps), y = gain * xhat, keeping only x, as it came, for the backward:

        dx = (gain * dy - xhat * mean(gain * dy * xhat)) / rms,    dgain = sum over tokens of dy * xhat

    It walks over memory about half as often as the same lines composed by autograd. The statistics are
    computed again in the backward, so that second derivatives are right.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * _inverse_rms(wide, eps)).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = _inverse_rms(wide, ctx.eps)
        scaled_dy = grad_outputs[0] * inverse_rms
        dgain = (scaled_dy * wide).reshape(-1, x.shape[-1]).sum(0)
        # Sums of products, not torch.mv: autocast would compute that in bf16.
        u = scaled_dy * gain.to(wide.dtype)
        projection = (u * wide).mean(-1, keepdim=True) * inverse_rms.square()
        dx = torch.addcmul(u, wide, projection, value=-1)
        return dx.to(x.dtype), dgain.to(gain.dtype), None


def rms_norm(x: Tensor, gain: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """RMSNorm, y = scale * gain * x / sqrt(mean(x^2) + eps) (Root Mean Square Layer Normalization, arXiv
    1910.07467).

    x [..., d], gain [d]; y has the shape and dtype of x.
    """
    if serves(x):
        return kernels.rms_norm(x, gain, eps, scale=scale, cast="float32", out_dtype=x.dtype)
    gain = gain if scale == 1.0 else gain * scale
    if x.is_cuda and x.dtype == gain.dtype:
        # There torch has one fused kernel each way, for equal dtypes; autocast may widen its result.
        return F.rms_norm(x, gain.shape, gain, eps).to(x.dtype)
    return _RMSNormFunction.apply(x, gain, eps)


class _CRMSNormFunction(torch.autograd.Function):
    """xhat = x / r, r^2 = (sum(x^2) + sum(x)^2) / d + eps, y = gain * xhat over the d - 1 features of gain:

        dx = (gain * dy - (xhat + sum(xhat)) * sum(gain * dy * xhat) / d) / r,    dgain = sum of dy * xhat

    Whatever lies behind the d - 1 features is neither read nor given a gradient: y and dx are zero there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        wide, inverse_rms = _compressed_statistics(x, gain, eps)
        return F.pad((wide * inverse_rms).mul_(gain).to(x.dtype), (0, x.shape[-1] - gain.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain = ctx.saved_tensors
        wide, inverse_rms = _compressed_statistics(x, gain, ctx.eps)
        scaled_dy = grad_outputs[0][..., : gain.shape[0]] * inverse_rms
        dgain = (scaled_dy * wide).reshape(-1, gain.shape[0]).sum(0)
        u = scaled_dy * gain.to(wide.dtype)
        full = wide + wide.sum(-1, keepdim=True)
        projection = (u * wide).sum(-1, keepdim=True) / (gain.shape[0] + 1) * inverse_rms.square()
        dx = torch.addcmul(u, full, projection, value=-1).to(x.dtype)
        return F.pad(dx, (0, x.shape[-1] - gain.shape[0])), dgain.to(gain.dtype), None


def _compressed_statistics(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The d - 1 features in fp32 or wider, and 1 / r [..., 1]."""
    wide = x[..., : gain.shape[0]].to(torch.promote_types(x.dtype, torch.float32))
    squares = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
    return wide, (squares / (gain.shape[0] + 1) + eps).rsqrt()


def crms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """CRMSNorm, y = gain * x / sqrt((sum(x^2) + sum(x)^2) / d + eps): RMSNorm of the zero-mean vector
    (x_1, ..., x_{d-1}, -sum of them), less its last feature (arXiv 2305.14858).

    gain [d - 1]; x [..., d - 1] or wider, with anything behind the d - 1 features. y has the shape and dtype
    of x, and zeros there.
    """
    if serves(x):
        y = kernels.crms_norm(x[..., : gain.shape[0]], gain, eps, cast="float32", out_dtype=x.dtype)
        return F.pad(y, (0, x.shape[-1] - gain.shape[0]))
    return _CRMSNormFunction.apply(x, gain, eps)


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """LayerNorm, y = scale * (gain * (x - mean(x)) / sqrt(var(x) + eps) + shift) (Layer Normalization, arXiv
    1607.06450).

    x [..., d], gain and shift [d], population variance; y has the shape and dtype of x.
    """
    if serves(x):
        return kernels.layer_norm(x, gain, shift, eps, scale=scale, cast="float32", out_dtype=x.dtype)
    if scale != 1.0:
        gain, shift = gain * scale, shift * scale
    dtype = torch.promote_types(x.dtype, gain.dtype)
    return F.layer_norm(x.to(dtype), gain.shape, gain.to(dtype), shift.to(dtype), eps).to(x.dtype)


class LlmNormRMSNorm(nn.Module):
    """RMSNorm with a learned gain `weight`; see `rms_norm`."""

    initial_values: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LlmNormLayerNorm(nn.Module):
    """LayerNorm with a learned gain `weight` and shift `bias`; see `layer_norm`."""

    initial_values: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ShiftedRMS(LlmNormRMSNorm):
    """RMSNorm(x) + bias: LayerNorm, of an x whose mean is 0; see `zero_mean.py`."""

    initial_values: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (rms_norm(wide, self.weight, self.eps) + self.bias).to(x.dtype)


class Centering(nn.Module):
    """y = x - mean(x), without parameters; the mean in fp32 or wider."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide - wide.mean(-1, keepdim=True)).to(x.dtype)


class ScaledRMS(LlmNormRMSNorm):
    """scale * RMSNorm(x), the constant folded into the gain: d multiplications for the whole batch.

    The constant is not in the state dict: code that swaps this module for a plain RMSNorm must fold it first.
    """

    def __init__(self, hidden_size: int, eps: float, scale: float) -> None:
        super().__init__(hidden_size, eps)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.6g}"


class ScaledLayer(LlmNormLayerNorm):
    """scale * LayerNorm(x), the constant folded into gain and shift; see `ScaledRMS`."""

    def __init__(self, hidden_size: int, eps: float, scale: float) -> None:
        super().__init__(hidden_size, eps)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.6g}"


class WidthRMS(LlmNormRMSNorm):
    """RMSNorm over all heads at once, x [..., heads, head_dim] taken as [..., heads * head_dim] (OLMo 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class WidthLayer(LlmNormLayerNorm):
    """LayerNorm over all heads at once; see `WidthRMS`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


class ScaleNorm(nn.Module):
    """y = g * x / max(||x||, eps), one learned number g, sqrt(d) at first (Transformers without Tears, arXiv
    1910.05895).

    The RMSNorm whose gains are all g / sqrt(d), but for the epsilon.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.initial_values = {"weight": math.sqrt(hidden_size)}
        self.weight = nn.Parameter(torch.full((1,), math.sqrt(hidden_size)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        return (wide * (self.weight / length.clamp_min(self.eps))).to(x.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


# kind -> (the norm, the norm times a constant), from (hidden_size, eps[, scale], **settings)
NORMS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = {
    "rmsnorm": (LlmNormRMSNorm, ScaledRMS),
    "layernorm": (LlmNormLayerNorm, ScaledLayer),
    FLOOR_RMSNORM: (FloorNorm, FloorNorm),
}


class CompressedRMS(nn.Module):
    """CRMSNorm over a compressed stream, with a learned gain `weight` [d - 1]; see `crms_norm`."""

    initial_values: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, stream_width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(stream_width))

    def forward(self, x: Tensor) -> Tensor:
        return crms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} of {self.weight.shape[0] + 1}, eps={self.eps}"


class ChannelAffine(nn.Module):
    """y = weight * x + bias for each feature, without a statistic: what a norm with running statistics is in
    eval mode. `eps` is not used.
    """

    initial_values: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x + self.bias).to(x.dtype)


def _prepbn(hidden_size: int, eps: float, *, norm_type: str, **settings: Any) -> PRepBN:
    return PRepBN(make_norm(norm_type, hidden_size, eps), hidden_size, eps, **settings)


# kind -> a norm with running statistics, from (hidden_size, eps, **settings)
STATISTICS_NORMS: dict[str, Callable[..., nn.Module]] = {
    "powernorm": PowerNorm,
    "unified_norm": UnifiedNorm,
    "prepbn": _prepbn,
}


# kind -> a norm that no placement multiplies by a constant
UNSCALED_NORMS: dict[str, Callable[..., nn.Module]] = {
    "centering": Centering,
    "crmsnorm": CompressedRMS,
    "shifted_rmsnorm": ShiftedRMS,
    "scalenorm": ScaleNorm,
    "dyt": DynamicTanh,
    "unit": UnitNorm,
    "width_scale": WidthScale,
    "learned_embedding_scale": LearnedEmbeddingScale,
    "affine": ChannelAffine,
    **STATISTICS_NORMS,
}


def make_norm(
    kind: str, hidden_size: int, eps: float, scale: float = 1.0, settings: Settings = ()
) -> nn.Module:
    """The norm `kind` over `hidden_size` features; the scaled class of NORMS only where `scale` is not 1.

    settings: keyword arguments of a norm that takes some. A kind `file.py:Class` is a class of the user's.
    """
    if ".py:" in kind:
        assert scale == 1.0, kind
        from .plugin_norms import make_plugin_norm  # here, as the user's file may import this one

        return make_plugin_norm(kind, hidden_size, eps, **dict(settings))
    if kind in UNSCALED_NORMS:
        assert scale == 1.0, kind
        return UNSCALED_NORMS[kind](hidden_size, eps, **dict(settings))
    plain, scaled = NORMS[kind]
    if scale == 1.0:
        return plain(hidden_size, eps, **dict(settings))
    return scaled(hidden_size, eps, scale, **dict(settings))


# kind -> the norm over all heads at once
WIDTH_NORMS: dict[str, Callable[..., nn.Module]] = {
    "rmsnorm": WidthRMS,
    "layernorm": WidthLayer,
    FLOOR_RMSNORM: WidthFloorNorm,
}


def make_projection_norm(
    kind: str, over: str, heads: int, head_dim: int, eps: float, settings: Settings = ()
) -> nn.Module:
    """The norm `kind` of queries, keys or values [..., heads, head_dim], over each head (one gain for all
    heads) or over the width of all heads.
    """
    if over == "head":
        return make_norm(kind, head_dim, eps, settings=settings)
    return WIDTH_NORMS[kind](heads * head_dim, eps, **dict(settings))
