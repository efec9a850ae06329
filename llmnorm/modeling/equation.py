"""The block equation: which norms, scales and shortcut a sublayer has, and how a block gets them.

For each sublayer f (attention or MLP); every N may be absent, every scale defaults to 1:

    z  = s_in * N_in(x)          norm_in, norm_in_scale
    y  = N_out(f(z))             norm_out
    xs = x  or  N_in(x)          shortcut
    u  = a * xs + b * y          shortcut_scale, branch_scale
    x' = c * N_post(u)           norm_post, output_scale

b may be learned (learned_branch_scale), u or xs may pass a gate (gate), and attention may normalize its
queries and keys (projection_norm). The forward pass never asks which placement it computes: `attach` gives
every layer the same few callables, an absent norm is the identity function, and a scale that equals 1 is not
multiplied.

Parameter names. A norm is named after its place, whatever the placement:

                 attention                        MLP
    norm_in      input_layernorm                  post_attention_layernorm     (Llama's names)
    norm_out     post_self_attn_layernorm         post_mlp_layernorm           (GLM-4's names)
    norm_post    attention_residual_norm          mlp_residual_norm
    learned b    attention_sum.scale              mlp_sum.scale
    gate         attention_sum.gate               (the same)
    nGPT's       attention_sum.weight             mlp_sum.weight
                 self_attn.query_scale.weight     mlp.gate_scale.weight and up_scale.weight
    in f         self_attn.q_norm and k_norm                                   (Qwen 3's and OLMo 2's names)

`post_attention_layernorm` is always the norm before the MLP, as in Llama. Other code uses that name for the
norm after the residual sum (Mix-LN) or for the norm of the attention output (Gemma 2, OLMo 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .hypersphere import StepOnSphere
from .norms import Settings, make_norm
from .sums import GATED_SUMS, LearnedScaleSum, weighted_sum

NORM_NAMES = {
    "attention": {
        "norm_in": "input_layernorm",
        "norm_out": "post_self_attn_layernorm",
        "norm_post": "attention_residual_norm",
    },
    "mlp": {
        "norm_in": "post_attention_layernorm",
        "norm_out": "post_mlp_layernorm",
        "norm_post": "mlp_residual_norm",
    },
}


@dataclass(frozen=True)
class LearnedScale:
    """A learned b: its initial value, and what shares one number of it."""

    initial: float
    per: Literal["feature", "sublayer", "layer"]


@dataclass(frozen=True)
class ProjectionNorm:
    """N on queries and keys (and values) before rotary positions, over each head or over all heads at
    once.
    """

    kind: str
    over: Literal["head", "width"]
    projections: tuple[str, ...] = ("q", "k")
    settings: Settings = ()


@dataclass(frozen=True)
class Sublayer:
    """One sublayer's terms of the block equation; a norm is a key of `norms.NORMS`, or None (absent).

    `norm_settings` are those of its norms, where they take some.
    """

    norm_in: str | None = None
    norm_out: str | None = None
    norm_post: str | None = None
    shortcut: Literal["raw", "normed"] = "raw"
    norm_in_scale: float = 1.0
    shortcut_scale: float = 1.0
    branch_scale: float = 1.0
    output_scale: float = 1.0
    learned_branch_scale: LearnedScale | None = None  # instead of branch_scale
    projection_norm: ProjectionNorm | None = None  # inside f, attention only
    gate: Literal["sum", "shortcut"] | None = None  # GPAS; both sublayers of a layer share it
    norm_settings: Settings = ()
    sphere_step: float | None = None  # nGPT: u = xs + alpha * (y - xs), alpha learned from this value on

    def __post_init__(self) -> None:
        if self.learned_branch_scale is not None:
            fixed = (self.shortcut_scale, self.branch_scale, self.output_scale)
            assert fixed == (1.0, 1.0, 1.0), "a learned b stands alone"
            assert self.gate is None, "a learned b stands alone"
        assert self.sphere_step is None or (self.learned_branch_scale is None and self.gate is None), (
            "one sum"
        )
        assert self.norm_in is not None or self.norm_in_scale == 1.0, "s_in scales N_in, which is absent"
        assert self.norm_in is not None or self.shortcut == "raw", "a normed shortcut needs N_in"
        assert self.norm_in_scale == 1.0 or self.shortcut == "raw", "a normed shortcut would carry s_in"


@dataclass(frozen=True)
class Layer:
    attention: Sublayer
    mlp: Sublayer
    on_sphere: bool = False  # unit weights and what goes with them, see `hypersphere.put_on_sphere`

    def __post_init__(self) -> None:
        assert self.mlp.projection_norm is None, "an MLP has no queries and keys"
        assert self.attention.gate is None or self.attention == self.mlp, "a layer has one gate"


@dataclass(frozen=True)
class ResidualPlan:
    """Every layer of a model, first to last, the kinds of its final norm and of the norm on its embedding
    (None: there is none), and whether its stream is compressed (`zero_mean.py`).
    """

    layers: tuple[Layer, ...]
    final_norm: str | None
    embedding_norm: str | None = None
    final_norm_settings: Settings = ()
    embedding_norm_settings: Settings = ()
    compressed: bool = False
    unit_embeddings: bool = False  # rows of embedding and head have unit length
    scaled_logits: bool = False  # each logit times a learned number


def identity(x: Tensor) -> Tensor:
    """An absent norm, or a cast that is not needed."""
    return x


def _raw(x: Tensor, z: Tensor) -> Tensor:
    return x


def _normed(x: Tensor, z: Tensor) -> Tensor:
    return z


SHORTCUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"raw": _raw, "normed": _normed}


def attach(
    block: Any, place: Literal["attention", "mlp"], spec: Sublayer, hidden_size: int, eps: float
) -> None:
    """Give `block` the callables of one sublayer's equation: three norms, `<place>_shortcut` and
    `<place>_sum`.

    The norms go by NORM_NAMES. The scale c joins N_post where there is one, and otherwise a and b, so it
    costs nothing.
    """
    scales = {"norm_in": spec.norm_in_scale, "norm_out": 1.0, "norm_post": spec.output_scale}
    for slot, name in NORM_NAMES[place].items():
        kind = getattr(spec, slot)
        norm = make_norm(kind, hidden_size, eps, scales[slot], spec.norm_settings) if kind else identity
        setattr(block, name, norm)
    setattr(block, f"{place}_shortcut", SHORTCUTS[spec.shortcut])
    setattr(block, f"{place}_sum", _residual_sum(block, spec, hidden_size))
    if spec.projection_norm is not None:
        projection = spec.projection_norm
        block.self_attn.add_norms(
            projection.kind, projection.over, projection.projections, eps, projection.settings
        )


def _residual_sum(block: nn.Module, spec: Sublayer, hidden_size: int) -> Callable[[Tensor, Tensor], Tensor]:
    learned, first = spec.learned_branch_scale, getattr(block, "attention_sum", None)
    if first is not None and (spec.gate is not None or (learned is not None and learned.per == "layer")):
        return first.forward  # one parameter for both sublayers, under one name
    if learned is not None:
        return LearnedScaleSum(hidden_size if learned.per == "feature" else 1, learned.initial)
    if spec.sphere_step is not None:
        return StepOnSphere(hidden_size, spec.sphere_step)
    c = 1.0 if spec.norm_post else spec.output_scale
    total = weighted_sum(c * spec.shortcut_scale, c * spec.branch_scale)
    return total if spec.gate is None else GATED_SUMS[spec.gate](total)
