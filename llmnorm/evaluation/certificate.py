"""A Lipschitz certificate: an upper bound of how far the logits move when the embeddings of a text do.

    max_t |change of z_a - z_b at token t| <= L * max_t RMS(change of the embedding of token t)

for any two tokens a, b and any number of tokens, and embeddings within a ball that holds every row of the
table. It is the product of what each sublayer can do (`lipschitz_bounds`), from singular values of the
weights as they are saved. Training Transformers with Enforced Lipschitz Constants (arXiv 2507.13338) gives
the architecture; its recursion does not hold for several heads, see `lipschitz_bounds`, and is here as
formula="published".
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from llmnorm.errors import UserError
from llmnorm.evaluation import linear_attention_bounds, lipschitz_bounds, module_bounds, singular_values
from llmnorm.evaluation.linear_attention_bounds import linear_attention_bound
from llmnorm.evaluation.lipschitz_bounds import Bound, NoCertificate, added, composed
from llmnorm.evaluation.module_bounds import (
    Matrices,
    Part,
    attention_bound,
    linear_bound,
    mlp_bound,
    norm_bound,
)
from llmnorm.evaluation.singular_values import (
    LARGEST_DECOMPOSITION,
    ROUNDING,
    largest_difference_of_rows,
    largest_row,
)
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.attention import LlmNormAttention
from llmnorm.modeling.equation import NORM_NAMES, Sublayer, identity
from llmnorm.modeling.hypersphere import StepOnSphere
from llmnorm.modeling.linear_mixers import LlmNormLinearAttention
from llmnorm.modeling.residual import residual_plan
from llmnorm.modeling.sums import LearnedScaleSum

FORMULAS = {
    "per_head": "a bound: blocks of heads, singular values from above",
    "published": "NOT a bound: the recursion of arXiv 2507.13338, which does not hold for several heads",
}
INPUT_NORM = "largest RMS over tokens of the change of their embeddings"
NORM_PAIRS = {
    "logit_difference": f"{INPUT_NORM} -> largest change of a difference of two logits",
    "logits_rms": f"{INPUT_NORM} -> largest RMS over tokens of the change of their logits",
    "hidden_rms": f"{INPUT_NORM} -> largest RMS over tokens of the change of what the head reads",
}
NOT_SAID = (
    "It is about embeddings that move, not about tokens that are exchanged: another token is a jump from one "
    "row of the table to another.",
    "It is about exact arithmetic with the saved weights; rounding in bf16 or fp32 is not covered.",
    "It is for models in evaluation mode, on texts without padding.",
    "The norm is the worst token's; for the Euclidean norm of a whole text constants are larger, with "
    "sqrt(tokens).",
)


@dataclass(frozen=True)
class Step:
    """One sublayer, or a norm outside the layers.

    branch: Lipschitz constant of what is added to the stream. factor: of the stream through the sum and its
    norm. rms_in, rms_out: the stream's largest RMS before and after. matrices: norms of the weights.
    """

    name: str
    branch: float
    factor: float
    rms_in: float
    rms_out: float
    matrices: Matrices


@dataclass(frozen=True)
class Certificate:
    """log10 of the constants of NORM_PAIRS, and every factor they are made of."""

    formula: str
    log10: dict[str, float]
    radius_rms: float
    largest_embedding_rms: float
    steps: tuple[Step, ...]
    head: dict[str, Any]
    weights: str
    tokens: int | None = None  # the longest text it is for; None: any

    @property
    def log10_lipschitz(self) -> float:
        return self.log10["logit_difference"]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        total, layers = 0.0, []
        for step in self.steps:
            total += _log10(step.factor)
            layers.append({**vars(step), "log10_factor": _log10(step.factor), "log10_so_far": total})
        return {
            "log10_lipschitz": self.log10_lipschitz,
            "norm_pair": NORM_PAIRS["logit_difference"],
            "formula": self.formula,
            "formula_is": FORMULAS[self.formula],
            "formula_sha256": formula_hash(),
            "log10": self.log10,
            "norm_pairs": NORM_PAIRS,
            "domain": {
                "largest_embedding_rms_allowed": self.radius_rms,
                "largest_embedding_rms": self.largest_embedding_rms,
                "tokens": self.tokens,
            },
            "singular_values": f"fp64 decomposition of the saved weights ({self.weights}), rounded up by "
            f"{ROUNDING}; a Gram bound, at most 1 % above, beyond {LARGEST_DECOMPOSITION} rows and columns",
            "layers": layers,
            "head": self.head,
            "not_said": list(NOT_SAID),
        }


def formula_hash() -> str:
    """Of the code that the bounds are computed with."""
    files = (
        __file__,
        *(m.__file__ for m in (lipschitz_bounds, module_bounds, linear_attention_bounds, singular_values)),
    )
    content = b"".join(Path(str(file)).read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()


def _log10(value: float) -> float:
    """Of a bound, where 0 is rounded up to what JSON can hold."""
    return math.log10(max(value, 1e-300))


@torch.no_grad()
def certify(
    model: LlmNormForCausalLM, *, formula: str = "per_head", radius_rms: float | None = None
) -> Certificate:
    """The certificate of a model with the weights it holds, in whatever dtype.

    radius_rms: embeddings may have this RMS; the largest in the table unless given. formula: a key of
    FORMULAS; `published` is no bound and for comparison only.

    Raises NoCertificate, naming the part, the reason and the remedy, where a part has no useful bound (a
    norm with an epsilon, 4-bit activations); UserError for weights that are not finite or a radius that
    leaves embeddings out.
    """
    if formula not in FORMULAS:
        raise UserError(f"formula={formula!r} is not one of {', '.join(FORMULAS)}.")
    if not isinstance(model, LlmNormForCausalLM):
        raise NoCertificate(
            f"no Lipschitz certificate: {type(model).__name__} is not a model of llmnorm; give a run "
            "directory or an export of one."
        )
    walk = _Walk(model, formula)
    walk.check()
    table = model.model.embed_tokens.weight.detach()
    width = table.shape[1]
    largest = largest_row(table) / math.sqrt(width)
    radius_rms = largest if radius_rms is None else radius_rms
    if radius_rms < largest:
        raise UserError(
            f"radius={radius_rms:g} leaves out embeddings, the largest of which has an RMS of "
            f"{largest:.6g}; give that "
            "much or more, or leave it away."
        )
    steps = tuple(walk.steps(radius_rms * math.sqrt(width)))
    hidden = sum(_log10(step.factor) for step in steps)
    _, shown = linear_bound(model.lm_head, "lm_head")
    scale = abs(model.output_multiplier)
    difference = scale * largest_difference_of_rows(model.lm_head.weight.detach()) * math.sqrt(width)
    log10 = {
        "logit_difference": hidden + _log10(difference),
        "logits_rms": hidden + _log10(scale * shown["rms_to_rms"]),
        "hidden_rms": hidden,
    }
    return Certificate(
        formula=formula,
        log10=log10,
        radius_rms=radius_rms,
        largest_embedding_rms=largest,
        steps=steps,
        head={"lm_head": shown, "scale": scale, "largest_difference_per_rms": difference},
        weights=str(model.lm_head.weight.dtype).removeprefix("torch."),
        tokens=walk.length if walk.counts_tokens() else None,
    )


class _Walk:
    """Through the model as its forward pass goes, carrying the radius of the stream."""

    def __init__(self, model: LlmNormForCausalLM, formula: str) -> None:
        self.config, self.inner, self.logit_scale = model.config, model.model, model.logit_scale
        self.parameters, self.formula = dict(model.named_parameters()), formula
        config = model.config
        self.plan = residual_plan(config.norm, config.norm_options, config.num_hidden_layers)
        self.turn = abs(float(self.inner.rotary_emb.attention_scaling))
        self.length = config.max_position_embeddings

    def check(self) -> None:
        """Whatever can be refused is, before anything is computed."""
        for name, parameter in self.parameters.items():
            if not torch.isfinite(parameter).all():
                raise UserError(
                    f"{name} holds numbers that are not finite, so nothing can be certified; take an "
                    "earlier checkpoint."
                )
        norm_bound(self.inner.embed_norm, 1.0, "model.embed_norm")
        for index, layer in enumerate(self.inner.layers):
            for slots in NORM_NAMES.values():
                for slot in slots.values():
                    norm_bound(getattr(layer, slot), 1.0, f"layers.{index}.{slot}")
            for side in "qkv":
                norm_bound(
                    getattr(layer.self_attn, f"{side}_norm"), 1.0, f"layers.{index}.self_attn.{side}_norm"
                )
        norm_bound(self.inner.norm, 1.0, "model.norm")
        if self.logit_scale is not identity:
            raise NoCertificate(
                "no Lipschitz certificate: logits are multiplied by learned numbers (norm=ngpt), for which "
                f"there is no rule; use {module_bounds.FLOOR_REMEDY}."
            )

    def counts_tokens(self) -> bool:
        """Whether some attention's bound depends on the number of keys."""
        return any(
            name == "softmax" and self.config.attention_options_of(name)["normalizer"] == "sigmoid"
            for name in set(self.config.layer_attentions)
        )

    def steps(self, radius: float) -> Iterator[Step]:
        if self.inner.embed_norm is not identity:
            bound = norm_bound(self.inner.embed_norm, radius, "model.embed_norm")
            yield self._step("embed_norm", bound.lipschitz, radius, bound, {})
            radius = bound.radius
        for index, (layer, spec) in enumerate(zip(self.inner.layers, self.plan.layers, strict=True)):
            for place, sublayer in (("attention", spec.attention), ("mlp", spec.mlp)):
                step, radius = self._sublayer(index, layer, place, sublayer, radius)
                yield step
        bound = norm_bound(self.inner.norm, radius, "model.norm")
        if type(self.inner.norm) is not torch.nn.Identity:
            yield self._step("norm", bound.lipschitz, radius, bound, {})

    def _sublayer(
        self, index: int, layer: Any, place: str, spec: Sublayer, radius: float
    ) -> tuple[Step, float]:
        names = NORM_NAMES[place]
        name = f"layers.{index}.{'self_attn' if place == 'attention' else 'mlp'}"
        z = norm_bound(getattr(layer, names["norm_in"]), radius, names["norm_in"])
        part = self._function(layer, place, z.radius, name)
        y = composed(z, part.bound)
        y = composed(y, norm_bound(getattr(layer, names["norm_out"]), y.radius, names["norm_out"]))
        shortcut = Bound(1.0, radius) if spec.shortcut == "raw" else z
        u = added(shortcut, *_scales(getattr(layer, f"{place}_sum"), spec, y))
        x = composed(u, norm_bound(getattr(layer, names["norm_post"]), u.radius, names["norm_post"]))
        return self._step(name, y.lipschitz, radius, x, part.matrices), x.radius

    def _function(self, layer: Any, place: str, radius: float, name: str) -> Part:
        if place == "mlp":
            return mlp_bound(layer.mlp, self.config, radius, name)
        attention = layer.self_attn
        if type(attention) is LlmNormAttention:
            return attention_bound(attention, radius, name, self.turn, self.formula, self.length)
        if isinstance(attention, LlmNormLinearAttention) and self.formula == "per_head":
            return linear_attention_bound(attention, radius, name, self.turn)
        raise NoCertificate(
            f"no Lipschitz certificate: formula={self.formula} has no bound of the "
            f"{type(attention).__name__} of "
            f"{name}; use softmax attention."
        )

    def _step(self, name: str, branch: float, radius: float, out: Bound, matrices: Matrices) -> Step:
        if not (math.isfinite(out.lipschitz) and math.isfinite(out.radius)):
            raise NoCertificate(
                f"no Lipschitz certificate: the bound of {name} is beyond 1e308, as the stream may grow "
                f"without limit; use norms with a floor or a convex residual ({module_bounds.FLOOR_REMEDY})."
            )
        rms = math.sqrt(self.config.stream_width)
        return Step(name, branch, out.lipschitz, radius / rms, out.radius / rms, matrices)


def _scales(total: Any, spec: Sublayer, branch: Bound) -> tuple[float, Bound, float]:
    """(a, branch, b) of a * xs + b * y, gates and learned scales included."""
    owner = getattr(total, "__self__", total)
    if isinstance(owner, LearnedScaleSum):
        return 1.0, branch, float(owner.scale.double().abs().max())
    if isinstance(owner, StepOnSphere):
        step = owner.effective().abs().double()
        return float((1 - step).abs().max()), branch, float(step.max())
    c = 1.0 if spec.norm_post else spec.output_scale
    a, b = c * spec.shortcut_scale, c * spec.branch_scale
    if spec.gate is not None:
        gate = abs(1.0 - float(F.silu(owner.gate.double())))
        a, b = a * gate, b * gate if spec.gate == "sum" else b
    return a, branch, b
