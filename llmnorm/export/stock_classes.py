"""The stock transformers classes a model folds into, one row each: the second half of a fold.

A row says which block equation the class computes, which of its linear layers may have biases, how its
config is written and how its parameters are named. `absorb.py` has struck every scale from the plan before a
row is asked, so a row matches by equality with what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from llmnorm.export.absorb import Absorbed, recenter
from llmnorm.export.stock_weights import (
    MLP,
    State,
    gemma2_weights,
    glm4_weights,
    minimax_files,
    minimax_weights,
    renamed,
    stablelm_weights,
)
from llmnorm.modeling.equation import Layer, ProjectionNorm, ResidualPlan, Sublayer

Keys = dict[str, Any]

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
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QKV, "self_attn.o_proj")


def _nothing(absorbed: Absorbed) -> list[str]:
    return []


@dataclass(frozen=True)
class StockClass:
    """One stock class, or one way to use it.

    layer, final_norm, embedding_norm: the plan it computes, the same layer throughout. biases: the linear
    layers that may have one, in groups that have it together. keys(absorbed): what its config says beside
    SHARED_KEYS. prepare changes the absorbed state first; rename gives it the class's names, and on_disk
    those of its published files where they differ. obstacles: what weights or sizes it has no place for, in
    words. note: what else the fold does, for the table in docs.
    """

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    layer: Layer
    keys: Callable[[Absorbed], Keys]
    rename: Callable[[Absorbed], State] = lambda absorbed: absorbed.state
    on_disk: Callable[[State], State] = lambda state: state
    biases: tuple[tuple[str, ...], ...] = ()
    final_norm: str | None = "rmsnorm"
    embedding_norm: str | None = None
    prepare: Callable[[Absorbed], None] = lambda absorbed: None
    obstacles: Callable[[Absorbed], list[str]] = _nothing
    note: str = ""

    @property
    def name(self) -> str:
        """Its model_type, the word for `--stock-class`."""
        return self.config.model_type

    def computes(self, plan: ResidualPlan) -> bool:
        """Whether this is the block equation of an absorbed plan."""
        return self.computes_layers(plan) and (self.final_norm, self.embedding_norm) == (
            plan.final_norm,
            plan.embedding_norm,
        )

    def computes_layers(self, plan: ResidualPlan) -> bool:
        """The same for the layers alone. A kept `a` may be any number that all layers share."""
        factors = {(layer.attention.shortcut_scale, layer.mlp.shortcut_scale) for layer in plan.layers}
        plain = {
            Layer(replace(layer.attention, shortcut_scale=1.0), replace(layer.mlp, shortcut_scale=1.0))
            for layer in plan.layers
        }
        return len(factors) == 1 and plain == {self.layer}

    def refused(self, absorbed: Absorbed) -> list[str]:
        """Why the weights at hand do not fit, though the plan does."""
        return [*_biases_without_place(self, absorbed), *self.obstacles(absorbed)]

    def convert(self, absorbed: Absorbed) -> tuple[PreTrainedConfig, State]:
        """Config and state dict of this class; `absorbed` is used up."""
        self.prepare(absorbed)
        has_bias = _even_out_biases(self, absorbed)
        keys = {
            **{key: getattr(absorbed.config, key) for key in SHARED_KEYS},
            "tie_word_embeddings": absorbed.tied,
            "head_dim": absorbed.config.head_dim,
            "rms_norm_eps": absorbed.eps,
            "rope_parameters": dict(absorbed.config.rope_parameters),
            **has_bias,
            **self.keys(absorbed),
        }
        if absorbed.tied:
            absorbed.state.pop("lm_head.weight", None)
        state = self.rename(absorbed)
        return self.config(**{key: value for key, value in keys.items() if value is not ABSENT}), state


ABSENT = object()  # a key that a config has not
BIAS_KEYS = {ATTENTION: "attention_bias", QKV: "attention_bias", MLP: "mlp_bias"}


def _biases_without_place(row: StockClass, absorbed: Absorbed) -> list[str]:
    """Biases that are not 0 where the class has none."""
    allowed = {module for group in row.biases for module in group}
    found: dict[str, None] = {}
    for name, tensor in absorbed.state.items():
        module = name.removesuffix(".bias").split(".", 3)[-1]
        if (
            name.endswith(".bias")
            and module in (*ATTENTION, *MLP)
            and module not in allowed
            and bool(tensor.any())
        ):
            found[f"the biases of {module}, which it has not"] = None
    return list(found)


def _even_out_biases(row: StockClass, absorbed: Absorbed) -> Keys:
    """Fill the biases of a group that some of its layers have, drop zeros that have no place; the config
    keys.
    """
    state, allowed = absorbed.state, {module for group in row.biases for module in group}
    layers = [f"model.layers.{number}." for number in range(absorbed.config.num_hidden_layers)]
    for prefix in layers:
        for module in {*ATTENTION, *MLP} - allowed:
            state.pop(f"{prefix}{module}.bias", None)
    keys: Keys = {}
    for group in row.biases:
        names = [f"{prefix}{module}.bias" for prefix in layers for module in group]
        keys[BIAS_KEYS[group]] = any(name in state for name in names)
        for name in names if keys[BIAS_KEYS[group]] else ():
            weight = state[name.removesuffix("bias") + "weight"]
            state.setdefault(name, torch.zeros(weight.shape[0], dtype=weight.dtype))
    return keys


def _square_heads(owner: str) -> Callable[[Absorbed], list[str]]:
    def obstacles(absorbed: Absorbed) -> list[str]:
        config = absorbed.config
        if config.head_dim * config.num_attention_heads == config.hidden_size:
            return []
        return [f"head_dim={config.head_dim} ({owner}'s is hidden_size / num_attention_heads)"]

    return obstacles


def _no_keys(absorbed: Absorbed) -> Keys:
    return {}


def _final_shift(absorbed: Absorbed) -> list[str]:
    if bool(absorbed.state["model.norm.bias"].any()):
        return ["the shift of the final norm, which Llama has no place for"]
    return []


def _stablelm_keys(absorbed: Absorbed) -> Keys:
    return {
        "layer_norm_eps": absorbed.eps,
        "rms_norm_eps": ABSENT,
        "head_dim": ABSENT,
        "attention_bias": ABSENT,
        "use_qkv_bias": any(name.endswith("q_proj.bias") for name in absorbed.state),
        "qk_layernorm": any(".q_norm." in name for name in absorbed.state),
        "use_parallel_residual": False,
        # The default is a quarter of each head.
        "rope_parameters": {**absorbed.config.rope_parameters, "partial_rotary_factor": 1.0},
    }


def _stablelm_qk_obstacles(absorbed: Absorbed) -> list[str]:
    shifted = any(
        bool(absorbed.state[name].any())
        for name in absorbed.state
        if name.endswith(("q_norm.bias", "k_norm.bias"))
    )
    shifts = ["the shifts of the norms of queries and keys, which it has not"] if shifted else []
    return [*_square_heads("StableLM")(absorbed), *shifts]


def _glm4_keys(absorbed: Absorbed) -> Keys:
    # The defaults are half of each head and biases.
    rope = {**absorbed.config.rope_parameters, "partial_rotary_factor": 1.0}
    return {"rope_parameters": rope, "partial_rotary_factor": 1.0}


def _gemma2_keys(absorbed: Absorbed) -> Keys:
    config = absorbed.config
    return {
        "hidden_act": ABSENT,
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": config.head_dim,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": config.max_position_embeddings,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
    }


def _minimax_keys(absorbed: Absorbed) -> Keys:
    layer = absorbed.plan.layers[0]
    return {
        "layer_types": ["full_attention"] * absorbed.config.num_hidden_layers,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "full_attn_alpha_factor": layer.attention.shortcut_scale,
        "full_attn_beta_factor": 1.0,
        "mlp_alpha_factor": layer.mlp.shortcut_scale,
        "mlp_beta_factor": 1.0,
    }


def _layer(attention: Sublayer, mlp: Sublayer | None = None) -> Layer:
    return Layer(attention, attention if mlp is None else mlp)


RMS_IN, LAYER_IN = Sublayer(norm_in="rmsnorm"), Sublayer(norm_in="layernorm")
SHIFTED_IN = Sublayer(norm_in="shifted_rmsnorm")
RMS_AROUND = Sublayer(norm_in="rmsnorm", norm_out="rmsnorm")

# The first row that fits is taken; a later one on request.
STOCK_CLASSES: tuple[StockClass, ...] = (
    StockClass(LlamaForCausalLM, LlamaConfig, _layer(RMS_IN), _no_keys, biases=(ATTENTION, MLP)),
    StockClass(
        StableLmForCausalLM,
        StableLmConfig,
        _layer(LAYER_IN),
        _stablelm_keys,
        biases=(QKV,),
        final_norm="layernorm",
        obstacles=_square_heads("StableLM"),
    ),
    StockClass(
        LlamaForCausalLM,
        LlamaConfig,
        _layer(LAYER_IN),
        _no_keys,
        biases=(ATTENTION, MLP),
        final_norm="layernorm",
        prepare=recenter,
        obstacles=_final_shift,
        note="E, W_o, W_down recentered, head untied; only if the final norm's shift is 0",
    ),
    # pre_rmsnorm, recentered: its stream has no mean, so that LayerNorm is the same.
    StockClass(
        StableLmForCausalLM,
        StableLmConfig,
        _layer(SHIFTED_IN),
        _stablelm_keys,
        biases=(QKV,),
        final_norm="shifted_rmsnorm",
        obstacles=_square_heads("StableLM"),
    ),
    StockClass(
        LlamaForCausalLM,
        LlamaConfig,
        _layer(SHIFTED_IN),
        _no_keys,
        biases=(ATTENTION, MLP),
        final_norm="shifted_rmsnorm",
        prepare=recenter,
        obstacles=_final_shift,
        note="shifts into biases; only if the final norm's is 0",
    ),
    StockClass(
        Qwen3ForCausalLM,
        Qwen3Config,
        _layer(replace(RMS_IN, projection_norm=ProjectionNorm("rmsnorm", "head")), RMS_IN),
        _no_keys,
        biases=(ATTENTION,),
    ),
    StockClass(
        StableLmForCausalLM,
        StableLmConfig,
        _layer(replace(LAYER_IN, projection_norm=ProjectionNorm("layernorm", "head")), LAYER_IN),
        _stablelm_keys,
        rename=stablelm_weights,
        biases=(QKV,),
        final_norm="layernorm",
        obstacles=_stablelm_qk_obstacles,
        note="only if the shifts of the norms of queries and keys are 0",
    ),
    StockClass(
        Olmo2ForCausalLM,
        Olmo2Config,
        _layer(
            Sublayer(norm_out="rmsnorm", projection_norm=ProjectionNorm("rmsnorm", "width")),
            Sublayer(norm_out="rmsnorm"),
        ),
        lambda absorbed: {"head_dim": ABSENT},
        rename=lambda absorbed: renamed(
            absorbed,
            {
                "post_self_attn_layernorm": "post_attention_layernorm",
                "post_mlp_layernorm": "post_feedforward_layernorm",
            },
        ),
        biases=(ATTENTION,),
        obstacles=_square_heads("OLMo 2"),
    ),
    StockClass(
        Glm4ForCausalLM, Glm4Config, _layer(RMS_AROUND), _glm4_keys, rename=glm4_weights, biases=(QKV,)
    ),
    StockClass(
        Gemma2ForCausalLM,
        Gemma2Config,
        _layer(RMS_AROUND),
        _gemma2_keys,
        rename=gemma2_weights,
        biases=(ATTENTION,),
        note="E / sqrt(d), gains less 1",
    ),
    StockClass(
        MiniMaxForCausalLM,
        MiniMaxConfig,
        _layer(Sublayer(norm_post="rmsnorm")),
        _minimax_keys,
        rename=minimax_weights,
        on_disk=minimax_files,
        final_norm=None,
        embedding_norm="rmsnorm",
        note="one expert; norms moved by one sublayer",
    ),
)


def published_names(model_type: str, state: State) -> State:
    """A state dict of a class in STOCK_CLASSES under the names that its published files have."""
    return next(row.on_disk for row in STOCK_CLASSES if row.name == model_type)(state)


def stock_class_names() -> list[str]:
    """What `--stock-class` may be."""
    return list(dict.fromkeys(row.name for row in STOCK_CLASSES))
