"""Dynamic Tanh: a pointwise curve where other rows have a norm, and the scale of the embedding that goes with
it (Transformers without Normalization, arXiv 2503.10622).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

Place = Literal["attention", "other"]

# hidden_size, from -> initial alpha by place: LLaMA 7B, 13B, and 34B and 70B as released. Narrower models get
# the paper's general value.
PUBLISHED_ALPHA: dict[int, dict[Place, float]] = {
    0: {"attention": 0.5, "other": 0.5},
    4096: {"attention": 0.8, "other": 0.2},
    5120: {"attention": 0.6, "other": 0.15},
    8192: {"attention": 0.2, "other": 0.05},
}


def published_alpha(hidden_size: int, place: Place) -> float:
    """The initial alpha of the released LLaMA of this width or the next narrower one."""
    return PUBLISHED_ALPHA[max(width for width in PUBLISHED_ALPHA if width <= hidden_size)][place]


class _DynamicTanhFunction(torch.autograd.Function):
    """t = tanh(alpha * x), y = gain * t, keeping only x, as it came, for the backward:

        dx = alpha * s,    dalpha = sum of s * x,    dgain = sum over tokens of dy * t

    with s = gain * dy * (1 - t^2).

    Composed by autograd the same lines keep three tensors of x's size in fp32. t is computed again in the
    backward, so that second derivatives are right.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha, gain)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * alpha).tanh_().mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, alpha, gain = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        t = torch.tanh(wide * alpha)
        dy = grad_outputs[0].to(wide.dtype)
        slope = dy * gain * (1 - t * t)
        dgain = (dy * t).reshape(-1, x.shape[-1]).sum(0)
        dalpha = (slope * wide).sum().reshape(1)
        return (slope * alpha).to(x.dtype), dalpha.to(alpha.dtype), dgain.to(gain.dtype)


def dynamic_tanh(x: Tensor, alpha: Tensor, gain: Tensor) -> Tensor:
    """DyT as in its LLaMA, y = gain * tanh(alpha * x), without the shift of its vision models.

    x [..., d], alpha [1], gain [d]; y has the shape and dtype of x.
    """
    return _DynamicTanhFunction.apply(x, alpha, gain)


class DynamicTanh(nn.Module):
    """DyT with a learned gain `weight` [d] and a learned `alpha` [1]; see `dynamic_tanh`.

    It normalizes nothing: the scale of x matters, and large x saturate. `alpha` starts at the given value, or
    at the published one for the width and place (the norm before attention, or any other).
    """

    def __init__(self, hidden_size: int, eps: float, *, place: Place, alpha: float | None = None) -> None:
        super().__init__()
        initial = published_alpha(hidden_size, place) if alpha is None else float(alpha)
        self.initial_values = {"weight": 1.0, "alpha": initial}
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.alpha = nn.Parameter(torch.full((1,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return dynamic_tanh(x, self.alpha, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, initial alpha={self.initial_values['alpha']:.6g}"


class LearnedEmbeddingScale(nn.Module):
    """y = scale * x with one learned number, sqrt(d) at first; x [..., d]."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.initial_values = {"scale": math.sqrt(hidden_size)}
        self.scale = nn.Parameter(torch.full((1,), math.sqrt(hidden_size)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x).to(x.dtype)
