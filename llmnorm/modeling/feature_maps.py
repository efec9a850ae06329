"""Feature maps of linear attention: queries and keys to features whose inner products are not negative.

A normalized linear attention with a homogeneous map (ReLU, |x|^p) gives the same output for q and for c q:
the norm of a query, which sets the temperature of softmax, is lost. NaLaFormer (arXiv 2506.21137) puts it
into the exponent, where it survives:

    phi_q(q) = split(q, |q^|^p(||q||)),   phi_k(k) = split(k, |k|^3),   q^ = q / ||q||

    relu_split    split(x, f) = [f 1(x > 0); f 1(x < 0)]             the released code, features >= 0
    cosine        split(x, f) = [f cos t(x); f sin t(x)],            the paper, inner products >= 0
                  t(x) = (pi / 4) tanh(alpha x / ||x||), alpha = 20
    relu          phi(x) = relu(x)                                   SLA (arXiv 2405.11582): no norm at all

relu_split is the limit of cosine for alpha to infinity; at alpha = 20 their scores differ by about 1e-3 of
the largest. A constant feature `floor` may be joined to both maps, which adds floor^2 to every score. d =
head_dim, features K = 2 d (relu: d) and one for the floor, everything in fp32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LOG_FLOOR = 1e-30  # below this share of the largest entry a query's entry counts as 0
SHARPNESS = 20.0


def _power(q: Tensor, p: Tensor) -> Tensor:
    log_r, _, _ = _log_ratios(q)
    return log_r.mul_(p).exp_().masked_fill_(q == 0, 0.0)


def _power_backward(q: Tensor, p: Tensor, df: Tensor) -> tuple[Tensor, Tensor]:
    """With f_i = r_i^p, r_i = |q_i| / m and m = max_j |q_j|:

        dp = sum_i df_i f_i log r_i
        dq_i = sign(q_i) (df_i p r_i^(p-1) - 1(i is the largest) sum_j df_j p f_j) / m

    At q_i = 0 the gradient is 0, the limit for p > 1.
    """
    log_r, m, largest = _log_ratios(q)
    df = df.masked_fill(q == 0, 0.0)
    slope = df * (log_r * (p - 1)).exp_() * p  # df p r^(p-1)
    pull = slope * log_r.exp()  # df p f
    dp = (pull * log_r).sum(-1, keepdim=True) / p
    slope.scatter_add_(-1, largest, -pull.sum(-1, keepdim=True))
    return slope.mul_(q.sign()).div_(m), dp


class _StablePower(torch.autograd.Function):
    """`stable_power`, keeping q and p for the backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(q, p)
        return _power(q, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        q, p = ctx.saved_tensors
        return _power_backward(q, p, grad_outputs[0])


class _SplitPower(torch.autograd.Function):
    """split(q, stable_power(q, p)) of relu_split, keeping q and p for the backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor, floor: float) -> Tensor:
        ctx.save_for_backward(q, p)
        f = _power(q, p)
        return _with_floor((torch.where(q > 0, f, 0.0), torch.where(q < 0, f, 0.0)), floor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        q, p = ctx.saved_tensors
        above, below, *_ = grad_outputs[0].split(q.shape[-1], -1)
        return *_power_backward(q, p, torch.where(q > 0, above, below)), None


def _with_floor(parts: tuple[Tensor, ...], floor: float) -> Tensor:
    """The parts joined, and a constant feature unless it is 0."""
    if floor:
        parts = (*parts, parts[0].new_full((*parts[0].shape[:-1], 1), floor))
    return torch.cat(parts, -1)


def _log_ratios(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log r, m and the index of the largest entry; a zero query has m = LOG_FLOOR."""
    magnitude = q.abs()
    m, largest = magnitude.max(-1, keepdim=True)
    m = m.clamp_min(LOG_FLOOR)
    return (magnitude / m).clamp_min_(LOG_FLOOR).log_(), m, largest


def stable_power(q: Tensor, p: Tensor) -> Tensor:
    """|q^|^p over its own largest entry, (|q_i| / max_j |q_j|)^p; q [..., d], p [..., 1] > 0 -> [..., d].

    The plain power is tiny, 8.6e-5 for d = 64 and p = 4.5. Its scale cancels in the normalizer, and with it
    the division by ||q||, so this one always has a feature 1 and gives the same output. A zero query has
    features 0.
    """
    return _StablePower.apply(q, p)


def direct_power(q: Tensor, p: Tensor) -> Tensor:
    """|q^|^p as it is written; the oracle of `stable_power`."""
    length = torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(1e-12)
    return (q / length).abs().clamp_min(LOG_FLOOR).log().mul(p).exp()


class _SplitCube(torch.autograd.Function):
    """[relu(k)^3; relu(-k)^3], keeping k: dk = 3 k^2 (d+ 1(k > 0) - d- 1(k < 0))."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, floor: float) -> Tensor:
        ctx.save_for_backward(k)
        cube = k * k * k
        return _with_floor((cube.clamp_min(0.0), cube.neg().clamp_min_(0.0)), floor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (k,) = ctx.saved_tensors
        above, below, *_ = grad_outputs[0].split(k.shape[-1], -1)
        return torch.where(k > 0, above, -below).mul_(k * k).mul_(3.0), None


def _turned(x: Tensor, f: Tensor, sharpness: float, floor: float) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
    angle = (math.pi / 4) * torch.tanh(x * (sharpness / length))
    return _with_floor((f * angle.cos(), f * angle.sin()), floor)


def relu_split_query(q: Tensor, p: Tensor, floor: float = 0.0) -> Tensor:
    """phi_q of relu_split; q [..., d] and p [..., 1] -> [..., 2 d], and one more for a floor."""
    return _SplitPower.apply(q, p, floor)


def relu_split_key(k: Tensor, floor: float = 0.0) -> Tensor:
    """phi_k of relu_split, [relu(k)^3; relu(-k)^3]; k [..., d] -> [..., 2 d], and one more for a floor."""
    return _SplitCube.apply(k, floor)


def cosine_query(q: Tensor, p: Tensor, floor: float = 0.0, sharpness: float = SHARPNESS) -> Tensor:
    """phi_q of cosine, like `relu_split_query`; its second half may be negative."""
    return _turned(q, stable_power(q, p), sharpness, floor)


def cosine_key(k: Tensor, floor: float = 0.0, sharpness: float = SHARPNESS) -> Tensor:
    """phi_k of cosine, of norm || |k|^3 || but for the floor; k [..., d] -> [..., 2 d], and one more."""
    return _turned(k, (k * k * k).abs(), sharpness, floor)


def _relu_query(q: Tensor, p: Tensor | None, floor: float = 0.0) -> Tensor:
    return _relu_key(q, floor)


def _relu_key(k: Tensor, floor: float = 0.0) -> Tensor:
    return F.pad(k.relu(), (0, 1), value=floor) if floor else k.relu()


class FeatureMap(NamedTuple):
    """phi_q(q, p, floor), phi_k(k, floor), whether p is read (else it is None), features per entry of q, and
    its name in `llmnorm_kernels.linear_attention` if that can form it inside the sum."""

    query: Callable[..., Tensor]
    key: Callable[..., Tensor]
    norm_aware: bool
    widening: int
    fused: str | None = None


FEATURE_MAPS: dict[str, FeatureMap] = {
    "relu_split": FeatureMap(
        relu_split_query, relu_split_key, norm_aware=True, widening=2, fused="relu_split"
    ),
    "cosine": FeatureMap(cosine_query, cosine_key, norm_aware=True, widening=2),
    "relu": FeatureMap(_relu_query, _relu_key, norm_aware=False, widening=1, fused="relu"),
}


def exponent(length: Tensor, lambda_: float, tau: float) -> Tensor:
    """p(n) = lambda (tau + tanh n), in [lambda tau, lambda (tau + 1)] for n >= 0 (NaLaFormer: 3 and 0.5).

    Never below 1, where the slope of |q_i|^p is infinite at 0; a learned scale or shift can make n negative.
    """
    return (lambda_ * (tau + torch.tanh(length))).clamp_min(1.0)
