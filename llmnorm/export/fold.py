"""Fold a model of ours into a stock transformers class that computes the same function.

The rule is read off the block equation, not off the norm's name. With every sublayer of the form

    x' = x + b * f(s * N(x))            (raw shortcut, no N_out, no N_post, a = c = 1)

s goes into the gain of N (and its shift), b, fixed or learned, into the rows of f's output projection, and
what is left is

    N = RMSNorm everywhere  ->  LlamaForCausalLM
    N = ScaleNorm everywhere  ->  LlamaForCausalLM, its gains all g / sqrt(d), its epsilon 1e-12
    N = LayerNorm everywhere  ->  StableLmForCausalLM (full rotary, no biases, sequential residual)

So pre_rmsnorm is Llama as it is, layernorm_scaling is Llama with gains divided by sqrt(layer) (The Curse of
Depth, arXiv 2502.05795), pre_ln is StableLM. Folds are computed in fp32 and rounded once to the parameter's
dtype.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StableLmConfig, StableLmForCausalLM

from llmnorm.errors import UserError
from llmnorm.evaluation.loading import no_progress_bar
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.modeling.equation import NORM_NAMES, ResidualPlan, Sublayer
from llmnorm.modeling.residual import residual_plan

SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
OUTPUT_PROJECTIONS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


# ScaleNorm only keeps the length off 0. 0 itself would make a padding row's norm NaN.
SCALENORM_EPS = 1e-12


class NotFoldableError(UserError):
    """No stock class computes this model's function; the message says which part of it stands in the way."""


def fold_to_stock(model: LlmNormForCausalLM, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A LlamaForCausalLM or StableLmForCausalLM with the logits of `model`, on the CPU, in eval mode.

    dtype: of the folded weights (default: of the model's). They share nothing with `model`, which stays as it
    is. Raises NotFoldableError when no stock class computes this function, naming the reason.
    """
    config = model.config
    plan = residual_plan(config.norm, config.norm_options, config.num_hidden_layers)
    kind = _norm_kind(config, plan)
    stock_config = _stablelm_config(config) if kind == "layernorm" else _llama_config(config)
    stock_class = StableLmForCausalLM if kind == "layernorm" else LlamaForCausalLM
    dtype = dtype or next(model.parameters()).dtype
    state = {
        name: tensor.detach().to("cpu", torch.float32, copy=True)
        for name, tensor in model.state_dict().items()
    }
    if kind == "scalenorm":
        stock_config.rms_norm_eps = SCALENORM_EPS
        for name in state:
            if name.endswith("norm.weight"):
                state[name] = (state[name] / math.sqrt(config.hidden_size)).repeat(config.hidden_size)
    learned: dict[str, Tensor] = {}
    for number, layer in enumerate(plan.layers):
        for place, sublayer in (("attention", layer.attention), ("mlp", layer.mlp)):
            prefix = f"model.layers.{number}."
            _scale(state, prefix + NORM_NAMES[place]["norm_in"], sublayer.norm_in_scale)
            _scale(state, prefix + OUTPUT_PROJECTIONS[place], sublayer.branch_scale)
            if sublayer.learned_branch_scale is not None:
                owner = "attention" if sublayer.learned_branch_scale.per == "layer" else place
                learned[prefix + OUTPUT_PROJECTIONS[place]] = state[f"{prefix}{owner}_sum.scale"]
    for module, scale in learned.items():
        _scale_rows(state, module, scale)
    state = {name: tensor for name, tensor in state.items() if not name.endswith("_sum.scale")}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    with no_progress_bar():
        stock = stock_class.from_pretrained(None, config=stock_config, state_dict=state, dtype=dtype)
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def _scale(state: dict[str, Tensor], module: str, scale: float) -> None:
    if scale != 1.0:
        for name in (f"{module}.weight", f"{module}.bias"):
            if name in state:
                state[name] *= scale


def _scale_rows(state: dict[str, Tensor], module: str, scale: Tensor) -> None:
    """W <- diag(scale) W, scale [rows] or [1]."""
    state[f"{module}.weight"] *= scale[:, None]
    if f"{module}.bias" in state:
        state[f"{module}.bias"] *= scale


def _norm_kind(config: LlmNormConfig, plan: ResidualPlan) -> str:
    """The one norm of a Pre-LN model; NotFoldableError for everything else."""
    refuse = f"norm={config.norm} folds into none of the stock classes written here: "
    if config.attention != "softmax":
        raise NotFoldableError(
            f"attention={config.attention} has no stock transformers class; export format hf."
        )
    for number, layer in enumerate(plan.layers, start=1):
        for place, sublayer in (("attention", layer.attention), ("mlp", layer.mlp)):
            if reason := _obstacle(sublayer):
                raise NotFoldableError(
                    f"{refuse}layer {number}'s {place} sublayer {reason}, and stock Llama and StableLM only "
                    "know x + f(N(x)); export format hf, which carries its own code."
                )
    if plan.embedding_norm is not None:
        raise NotFoldableError(f"{refuse}it normalizes the embedding; export format hf.")
    kinds = {sublayer.norm_in for layer in plan.layers for sublayer in (layer.attention, layer.mlp)}
    kinds.add(plan.final_norm)
    if len(kinds) > 1:
        raise NotFoldableError(
            f"{refuse}it mixes {', '.join(str(kind) for kind in sorted(map(str, kinds)))}; export format hf."
        )
    (kind,) = kinds
    if kind not in ("rmsnorm", "layernorm", "scalenorm"):
        raise NotFoldableError(
            f"{refuse}{kind} is neither RMSNorm, LayerNorm nor ScaleNorm; export format hf."
        )
    return kind


def _obstacle(sublayer: Sublayer) -> str | None:
    if sublayer.norm_post is not None:
        return "normalizes the residual sum"
    if sublayer.norm_out is not None:
        return "normalizes its output"
    if sublayer.norm_in is None:
        return "does not normalize its input"
    if sublayer.projection_norm is not None:
        return f"normalizes its {', '.join(sublayer.projection_norm.projections)} projections"
    if sublayer.gate is not None:
        return "scales the residual stream by a gate, which its epsilons see"
    if sublayer.shortcut != "raw":
        return "adds to the normalized stream"
    if sublayer.shortcut_scale * sublayer.output_scale != 1.0 or sublayer.output_scale != 1.0:
        return "scales the residual stream"
    return None


def _llama_config(config: LlmNormConfig) -> LlamaConfig:
    return LlamaConfig(
        **{key: getattr(config, key) for key in SHARED_KEYS},
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rope_parameters=dict(config.rope_parameters),
    )


def _stablelm_config(config: LlmNormConfig) -> StableLmConfig:
    reasons: dict[str, Any] = {
        "attention_bias=true (StableLM has no bias on o_proj)": config.attention_bias,
        "mlp_bias=true (StableLM has no MLP biases)": config.mlp_bias,
        f"head_dim={config.head_dim} (StableLM's is hidden_size / num_attention_heads)": (
            config.head_dim * config.num_attention_heads != config.hidden_size
        ),
    }
    for reason, stands_in_the_way in reasons.items():
        if stands_in_the_way:
            raise NotFoldableError(
                f"norm={config.norm} folds into StableLM, but not with {reason}; export format hf."
            )
    return StableLmConfig(
        **{key: getattr(config, key) for key in SHARED_KEYS},
        layer_norm_eps=config.rms_norm_eps,
        use_qkv_bias=False,
        qk_layernorm=False,
        use_parallel_residual=False,
        # The default is a quarter of each head.
        rope_parameters={**config.rope_parameters, "partial_rotary_factor": 1.0},
    )
