"""Parts whose Lipschitz constant is finite, and the config key `architecture` that asks for nothing but them.

    floor-RMSNorm      y = gain * x / max(rms(x), floor)        max|gain| / floor, and rms(y) <= max|gain|
    convex residual    x' = (1 - a) x + a f(x)                  1 - a + a L_f      (`placements.convex_layer`)
    scaled activation  act(x) / max|act'|                       1                  (`mlp.LlmNormPlainMLP`)
    clipped GLU        act(clip(g)) * clip(u)                   |clip| (1 + max|act'|)

in max-token RMS, rms(x) = ||x|| / sqrt(d). The norm-free transformer is that of Training Transformers with
Enforced Lipschitz Constants (arXiv 2507.13338). x / sqrt(mean(x^2) + eps) has slope 1 / sqrt(eps) at 0, which
is why a floor takes the place of the epsilon: below the floor the norm is linear.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig
    from .equation import ResidualPlan, Sublayer

# The kind of norm, as `norm_options.norm_type` says it.
FLOOR_RMSNORM = "floor_rmsnorm"

# `hidden_act` -> an upper bound of its slope, as the paper divides by 1.1289 where tanh-GELU's is 1.128993.
# Each also has |act(x)| <= |x|.
MAX_SLOPES = {
    "gelu": 1.1290,
    "gelu_pytorch_tanh": 1.1290,
    "silu": 1.09984,
    "swish": 1.09984,
    "relu": 1.0,
    "tanh": 1.0,
}

# architecture -> the values of keys that are not given
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"norm": "pre_rmsnorm", "mlp": "gated", "hidden_act": "silu", "init": "hf_llama"},
    "lipschitz": {"norm": "convex", "mlp": "plain", "hidden_act": "gelu", "init": "orthogonal"},
}
# The same for options of softmax attention.
ARCHITECTURE_ATTENTION: dict[str, dict[str, Any]] = {
    "llama": {},
    "lipschitz": {"logits_over": "head_dim", "output_factor": 1 / 3},
}
# Kinds of norm with a bounded slope.
BOUNDED_NORMS = (FLOOR_RMSNORM, "dyt", "affine", "centering", "width_scale", "learned_embedding_scale")


def floor_rms_norm(x: Tensor, gain: Tensor, floor: float, scale: float = 1.0) -> Tensor:
    """y = scale * gain * x / max(rms(x), floor): the projection onto the ball of RMS `floor`, over `floor`.

    A projection onto a convex set moves no two points apart, so y is (max|gain| scale / floor)-Lipschitz.
    x [..., d], gain [d]; computed in fp32 or wider, y has the shape and dtype of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
    return (wide * (scale / rms.clamp_min(floor)) * gain).to(x.dtype)


class FloorNorm(nn.Module):
    """floor-RMSNorm with a learned gain `weight`; see `floor_rms_norm`. `eps` is not used."""

    initial_values: ClassVar[dict[str, float]] = {"weight": 1.0}

    def __init__(self, hidden_size: int, eps: float, scale: float = 1.0, *, floor: float = 1.0) -> None:
        super().__init__()
        self.floor, self.scale = floor, scale
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return floor_rms_norm(x, self.weight, self.floor, self.scale)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, floor={self.floor}, scale={self.scale:.6g}"


class WidthFloorNorm(FloorNorm):
    """floor-RMSNorm over all heads at once, x [..., heads, head_dim] taken as [..., heads * head_dim]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-2)).view_as(x)


def check_architecture(config: LlmNormConfig, plan: ResidualPlan) -> None:
    """Raises ValueError for a part without a Lipschitz constant under architecture=lipschitz.

    Every part it lets through is Lipschitz on streams of bounded RMS, and keeps a stream's RMS bounded.
    """
    if config.architecture != "lipschitz":
        return
    for key, holds, rule in _parts(config):
        if not holds:
            value = getattr(config, key)
            raise ValueError(f"{key}={value!r} has no Lipschitz certificate (architecture=lipschitz): {rule}")
    ends = (("embedding's norm", plan.embedding_norm), ("final norm", plan.final_norm))
    kinds = [(place, kind) for place, kind in ends if kind is not None]
    for number, layer in enumerate(plan.layers):
        for spec in (layer.attention, layer.mlp):
            kinds += [(f"norm of layers.{number}", kind) for kind in _norm_kinds(spec)]
    for place, kind in kinds:
        if kind not in BOUNDED_NORMS:
            raise ValueError(
                f"norm={config.norm!r} has no Lipschitz certificate (architecture=lipschitz): its {place} is "
                f"{kind}, whose slope near 0 is unbounded or 1/sqrt(eps); use norm=convex, or a placement "
                f"with norm_options.norm_type={FLOOR_RMSNORM}, such as qk_norm"
            )


def _parts(config: LlmNormConfig) -> list[tuple[str, bool, str]]:
    """(key, whether it may stand, rule and remedy) of what is no norm."""
    return [
        (
            "attention",
            set(config.layer_attentions) == {"softmax"},
            "a denominator of linear attention may come near 0; use softmax",
        ),
        ("hidden_act", config.hidden_act in MAX_SLOPES, f"use one of {', '.join(MAX_SLOPES)}"),
        ("quantization", config.quantization is None, "rounding jumps; remove it"),
    ]


def _norm_kinds(spec: Sublayer) -> list[str]:
    inside = spec.projection_norm.kind if spec.projection_norm is not None else None
    return [kind for kind in (spec.norm_in, spec.norm_out, spec.norm_post, inside) if kind is not None]
