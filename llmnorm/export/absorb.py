"""Absorb what only scales into the weights: the first half of a fold.

A model is read as its weights and its plan, the block equation of every layer. Each step below moves a term
of the equation into a neighboring weight and strikes it from the plan, so that the function stays:

    compression        the stream with all d features (zero_mean_states.py); a tied head is untied
    embedding norm     E <- N(E), row by row; a head tied to E keeps the old E and is untied
    ScaleNorm          the RMSNorm with gains g / sqrt(d)
    s_in               gain and shift of N_in
    b, also learned    the branch's writer: gain and shift of N_out, or else the rows of W_o, W_down
    a, c and gates     x = C x~ with one number C per place. N(C x~) = sign(C) N(x~) up to epsilon, so a
                       branch sees C by its sign alone (its readers take C where it has no N_in), and
                       x' = c (a x + b y) becomes x~' = x~ + b / (a C) y
    c before N_post    gain and shift of N_post
    muP's scales       queries (or the gain of their norm), and the head (or, if tied, the final norm)

`a` of a sublayer that ends in N_post stays where it is: a stock class has it as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llmnorm.errors import UserError
from llmnorm.export.zero_mean_states import decompress_to_rmsnorm
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.modeling.equation import NORM_NAMES, Layer, ResidualPlan, Sublayer
from llmnorm.modeling.mup import attention_scale, output_multiplier
from llmnorm.modeling.norms import layer_norm, rms_norm
from llmnorm.modeling.residual import residual_plan

Place = Literal["attention", "mlp"]
READERS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}

# ScaleNorm only keeps the length off 0. 0 itself would make a padding row's norm NaN.
SCALENORM_EPS = 1e-12


class NotFoldableError(UserError):
    """No stock class computes this model's function; the message says which part of it stands in the way."""


@dataclass
class Absorbed:
    """A model of ours: weights by name, the plan they are read by, what the head and the epsilons are."""

    config: LlmNormConfig
    plan: ResidualPlan
    state: dict[str, Tensor]
    tied: bool
    eps: float

    def sublayers(self) -> Iterator[tuple[str, Place, Sublayer]]:
        """(prefix of its parameters' names, place, spec), first to last."""
        for number, layer in enumerate(self.plan.layers):
            yield f"model.layers.{number}.", "attention", layer.attention
            yield f"model.layers.{number}.", "mlp", layer.mlp

    def scale(self, module: str, scale: Tensor | float, parts: tuple[str, ...] = ("weight", "bias")) -> None:
        """Multiply the output of a norm or a linear layer by `scale`, [rows] or one number."""
        for part in parts:
            name = f"{module}.{part}"
            if name in self.state:
                tensor = self.state[name]
                rows = torch.as_tensor(scale, dtype=tensor.dtype)
                self.state[name] = tensor * (rows[:, None] if rows.ndim == 1 and tensor.ndim == 2 else rows)

    def normalized(self, x: Tensor, kind: str, module: str) -> Tensor:
        """N(x) of the norm whose parameters go by `module`; they leave the state."""
        if kind == "width_scale":
            return x * math.sqrt(self.config.hidden_size)
        gain = self.state.pop(f"{module}.weight", torch.empty(0))
        if kind == "rmsnorm":
            return rms_norm(x, gain, self.eps)
        if kind == "centering":
            return x - x.mean(-1, keepdim=True)
        if kind == "layernorm":
            return layer_norm(x, gain, self.state.pop(f"{module}.bias"), self.eps)
        raise NotFoldableError(
            f"norm={self.config.norm} normalizes the embedding by {kind}; export format hf."
        )


def read(model: LlmNormForCausalLM) -> Absorbed:
    """The model's weights, copied to the CPU in fp32 (fp64 stays fp64), and its plan as it is."""
    config = model.config
    plan = residual_plan(config.norm, config.norm_options, config.num_hidden_layers)
    state = {
        name: tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for name, tensor in model.state_dict().items()
    }
    return Absorbed(config, plan, state, config.tie_word_embeddings, config.rms_norm_eps)


def absorb(model: LlmNormForCausalLM) -> Absorbed:
    """The model with every term of the list above absorbed.

    Raises NotFoldableError where a term cannot be: a shortcut scaled by 0.
    """
    absorbed = read(model)
    _absorb_compression(absorbed)
    _absorb_embedding_norm(absorbed)
    _absorb_scalenorm(absorbed)
    stream = torch.ones((), dtype=torch.float64)
    for prefix, place, spec in absorbed.sublayers():
        stream = _absorb_sublayer(absorbed, prefix, place, spec, stream)
    absorbed.scale("model.norm", stream.sign(), parts=("weight",))
    _absorb_mup(absorbed)
    leftover = [name for name in absorbed.state if name.endswith(("_sum.scale", "_sum.gate"))]
    for name in leftover:
        del absorbed.state[name]
    absorbed.plan = absorbed_plan(absorbed.plan)
    return absorbed


def _absorb_mup(absorbed: Absorbed) -> None:
    """The attention's scale times sqrt(head_dim) into the queries, the output multiplier into the head."""
    config = absorbed.config
    queries = attention_scale(config) * math.sqrt(config.head_dim)
    for number in range(config.num_hidden_layers if queries != 1.0 else 0):
        prefix = f"model.layers.{number}.self_attn."
        normed = f"{prefix}q_norm.weight" in absorbed.state
        absorbed.scale(f"{prefix}q_norm" if normed else f"{prefix}q_proj", queries)
    if absorbed.tied and "model.norm.weight" in absorbed.state:
        absorbed.scale("model.norm", output_multiplier(config))
    elif output_multiplier(config) != 1.0:
        absorbed.tied = False
        absorbed.scale("lm_head", output_multiplier(config))


def absorbed_plan(plan: ResidualPlan) -> ResidualPlan:
    """What `absorb` leaves of a plan."""
    kinds = {"scalenorm": "rmsnorm"} if norm_kinds(plan) == {"scalenorm"} else {}
    if plan.compressed:
        kinds = {"crmsnorm": "rmsnorm"}
    return replace(
        plan,
        compressed=False,
        layers=tuple(
            Layer(_absorbed_sublayer(layer.attention, kinds), _absorbed_sublayer(layer.mlp, kinds))
            for layer in plan.layers
        ),
        final_norm=kinds.get(plan.final_norm or "", plan.final_norm),
        embedding_norm=plan.embedding_norm if _begins_post(plan) else None,
    )


def norm_kinds(plan: ResidualPlan) -> set[str]:
    """The kinds of the norms on the residual stream and on the branches; a fixed scale is none."""
    kinds = {plan.final_norm, plan.embedding_norm} - {"width_scale"}
    for layer in plan.layers:
        for spec in (layer.attention, layer.mlp):
            kinds |= {spec.norm_in, spec.norm_out, spec.norm_post}
    return {kind for kind in kinds if kind is not None}


def _absorbed_sublayer(spec: Sublayer, kinds: dict[str, str]) -> Sublayer:
    keeps_a = spec.norm_post is not None and spec.gate is None and spec.shortcut == "raw"
    return replace(
        spec,
        norm_in=kinds.get(spec.norm_in or "", spec.norm_in),
        norm_in_scale=1.0,
        shortcut_scale=spec.shortcut_scale if keeps_a else 1.0,
        branch_scale=1.0,
        output_scale=1.0,
        learned_branch_scale=None,
        gate=None,
    )


def _begins_post(plan: ResidualPlan) -> bool:
    """Whether the first shortcut is the normalized embedding itself, for a stock class to normalize."""
    return plan.layers[0].attention.norm_post is not None


def _absorb_compression(absorbed: Absorbed) -> None:
    if absorbed.plan.compressed:
        head_bias = absorbed.state.pop("lm_head.bias", None)
        if head_bias is not None and bool(head_bias.any()):
            raise NotFoldableError(
                f"norm={absorbed.config.norm} has a bias on its head, what a final LayerNorm's shift became, "
                "and no stock class has one; export format hf."
            )
        absorbed.state = decompress_to_rmsnorm(absorbed.state, absorbed.config.num_hidden_layers)
        absorbed.tied = False


def _absorb_embedding_norm(absorbed: Absorbed) -> None:
    kind = absorbed.plan.embedding_norm
    if kind is None or _begins_post(absorbed.plan):
        return
    embedding = absorbed.state["model.embed_tokens.weight"]
    absorbed.state["model.embed_tokens.weight"] = absorbed.normalized(embedding, kind, "model.embed_norm")
    absorbed.tied = False


def _absorb_scalenorm(absorbed: Absorbed) -> None:
    if norm_kinds(absorbed.plan) != {"scalenorm"}:
        return
    absorbed.eps = SCALENORM_EPS
    width = absorbed.config.hidden_size
    for name, tensor in absorbed.state.items():
        if name.endswith("norm.weight"):
            absorbed.state[name] = (tensor / math.sqrt(width)).repeat(width)


def _absorb_sublayer(absorbed: Absorbed, prefix: str, place: Place, spec: Sublayer, stream: Tensor) -> Tensor:
    """Absorb one sublayer's terms; C before it -> C after it."""
    names = NORM_NAMES[place]
    writer = prefix + (names["norm_out"] if spec.norm_out else WRITERS[place])
    a, b, c = (
        torch.tensor(s, dtype=torch.float64)
        for s in (spec.shortcut_scale, spec.branch_scale, spec.output_scale)
    )
    if spec.norm_in is not None:
        absorbed.scale(prefix + names["norm_in"], spec.norm_in_scale)
        absorbed.scale(prefix + names["norm_in"], stream.sign(), parts=("weight",))
    else:
        for reader in READERS[place]:
            absorbed.scale(prefix + reader, stream, parts=("weight",))
    if spec.shortcut == "normed":
        stream = torch.ones_like(stream)
    if spec.learned_branch_scale is not None:
        owner = "attention" if spec.learned_branch_scale.per == "layer" else place
        absorbed.scale(writer, absorbed.state[f"{prefix}{owner}_sum.scale"])
    if spec.gate is not None:
        kept = 1.0 - F.silu(absorbed.state[f"{prefix}attention_sum.gate"].double()).squeeze()
        a, c = (a, c * kept) if spec.gate == "sum" else (a * kept, c)
    after = a * stream if _absorbed_sublayer(spec, {}).shortcut_scale == 1.0 else stream
    if c * after == 0:
        raise NotFoldableError(
            f"norm={absorbed.config.norm} cannot be folded: {prefix}{place} multiplies the residual stream "
            "by 0, which no branch can make up for; export format hf."
        )
    absorbed.scale(writer, b / after)
    if spec.norm_post is None:
        return c * after
    absorbed.scale(prefix + names["norm_post"], c)
    absorbed.scale(prefix + names["norm_post"], after.sign(), parts=("weight",))
    return torch.ones_like(stream)


def recenter(absorbed: Absorbed) -> None:
    """Make every LayerNorm an RMSNorm: E, W_o and W_down lose the mean of their outputs, so the stream has
    none.

    Shifts of the norms before a branch go into the biases of its readers, and a tied head keeps the old E.
    The final norm's shift must be 0. (Pre-RMSNorm and Pre-CRMSNorm Transformers, arXiv 2305.14858.)
    """
    state = absorbed.state
    state["model.embed_tokens.weight"] = _without_mean(state["model.embed_tokens.weight"].T).T.contiguous()
    absorbed.tied = False
    for prefix, place, _ in absorbed.sublayers():
        shift = state.pop(f"{prefix}{NORM_NAMES[place]['norm_in']}.bias")
        for part in ("weight", "bias"):
            name = f"{prefix}{WRITERS[place]}.{part}"
            if name in state:
                state[name] = _without_mean(state[name])
        if bool(shift.any()):
            for reader in READERS[place]:
                weight, bias = state[f"{prefix}{reader}.weight"], f"{prefix}{reader}.bias"
                state[bias] = weight @ shift + state.get(bias, 0.0)
    del state["model.norm.bias"]


def _without_mean(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)
