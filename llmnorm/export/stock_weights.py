"""Absorbed weights under the names, and in the layout, of the stock classes of `stock_classes.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmnorm.export.absorb import Absorbed

State = dict[str, Tensor]
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def renamed(absorbed: Absorbed, names: dict[str, str]) -> State:
    """The state with parts of its names replaced, all at once."""
    renamed: State = {}
    for name, tensor in absorbed.state.items():
        old = next((old for old in names if f".{old}." in f".{name}."), None)
        renamed[name if old is None else name.replace(old, names[old])] = tensor
    return renamed


def stablelm_weights(absorbed: Absorbed) -> State:
    """One gain per head in StableLM, where ours share one."""
    heads = {"q_norm": absorbed.config.num_attention_heads, "k_norm": absorbed.config.num_key_value_heads}
    state: State = {}
    for name, tensor in absorbed.state.items():
        owner, _, part = name.rpartition(".")
        stem, _, norm = owner.rpartition(".")
        if norm not in heads:
            state[name] = tensor
        elif part == "weight":
            for head in range(heads[norm]):
                state[f"{stem}.{norm[0]}_layernorm.norms.{head}.weight"] = tensor.clone()
    return state


def glm4_weights(absorbed: Absorbed) -> State:
    """One matrix for gate and up; rotary pairs (2i, 2i+1) where ours are (i, i + D/2)."""
    state, half = dict(absorbed.state), absorbed.config.head_dim // 2
    for number in range(absorbed.config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        parts = [state.pop(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up")]
        state[f"{prefix}mlp.gate_up_proj.weight"] = torch.cat(parts)
        for name in (f"{prefix}self_attn.{p}_proj.{part}" for p in "qk" for part in ("weight", "bias")):
            if name in state:
                halves = state[name].unflatten(0, (-1, 2, half))
                state[name] = halves.transpose(1, 2).flatten(0, 2).contiguous()
    return state


GEMMA2_NAMES = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}


def gemma2_weights(absorbed: Absorbed) -> State:
    """E / sqrt(d), as Gemma multiplies by sqrt(d); the final gain makes up for it in a tied head. Gains less
    1.
    """
    state, root = renamed(absorbed, GEMMA2_NAMES), math.sqrt(absorbed.config.hidden_size)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] / root
    if absorbed.tied:
        state["model.norm.weight"] = state["model.norm.weight"] * root
    return {name: tensor - 1 if name.endswith("norm.weight") else tensor for name, tensor in state.items()}


def minimax_weights(absorbed: Absorbed) -> State:
    """Layer k begins with the norm that ends layer k - 1; one expert, which its router always takes."""
    state = dict(absorbed.state)
    ending = state.pop("model.embed_norm.weight")
    for number in range(absorbed.config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        state[f"{prefix}input_layernorm.weight"] = ending
        state[f"{prefix}post_attention_layernorm.weight"] = state.pop(
            f"{prefix}attention_residual_norm.weight"
        )
        ending = state.pop(f"{prefix}mlp_residual_norm.weight")
        gate, up, down = (state.pop(f"{prefix}{module}.weight") for module in MLP)
        state[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat((gate, up))[None]
        state[f"{prefix}mlp.experts.down_proj"] = down[None]
        state[f"{prefix}mlp.gate.weight"] = torch.zeros(1, absorbed.config.hidden_size, dtype=down.dtype)
    return {**state, "model.norm.weight": ending}


def minimax_files(state: State) -> State:
    """MiniMax's files have an expert's three matrices apart; transformers joins them when it loads."""
    names: State = {}
    for name, tensor in state.items():
        stem, _, part = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".experts.")
        if part == "gate_up_proj":
            gate, up = tensor[0].chunk(2)
            names |= {f"{stem}.experts.0.w1.weight": gate.clone(), f"{stem}.experts.0.w3.weight": up.clone()}
        elif part == "down_proj":
            names[f"{stem}.experts.0.w2.weight"] = tensor[0]
        else:
            names[part] = tensor
    return names
