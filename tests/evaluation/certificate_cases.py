"""Tiny models with a certificate, their weights drawn large enough to be worth attacking."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.modeling.linear_mixers import LinearInputs

SIZE: dict[str, Any] = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FLOOR: dict[str, Any] = {"norm_type": "floor_rmsnorm"}
CONVEX: dict[str, Any] = {"norm": "convex", "norm_options": {"norm_in": "floor_rmsnorm"}}
RELU: dict[str, Any] = {"feature_map": "relu", "key_norm": False, "output_norm": False}
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}


def model_of(seed: int = 0, **config: Any) -> LlmNormForCausalLM:
    """In fp64 and eval mode; matrices of norm about 2, gains, gates and biases all different."""
    model = LlmNormForCausalLM(LlmNormConfig(**{**SIZE, **config})).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() > 1:
                parameter.copy_(noise if "embed" in name else noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (0.8 if "weight" in name or "scale" in name else 0.0))
    return model


def attention_function(model: LlmNormForCausalLM, rotary: bool = True) -> Callable[[Tensor], Tensor]:
    """z [N, T, D] -> what the first layer's attention makes of it, with or without rotary positions."""
    attention: Any = model.model.layers[0].self_attn

    def function(z: Tensor) -> Tensor:
        positions = torch.arange(z.shape[1])[None]
        cos, sin = (x.unsqueeze(1) for x in model.model.rotary_emb(z, positions))
        if not rotary:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        told = LinearInputs(position_embeddings=(cos, sin))
        return attention(z, position_embeddings=(cos, sin), linear_inputs=told)[0]

    return function


def counter_example(heads: int, s: float, head_dim: int = 4, alpha: float = 0.5) -> LlmNormForCausalLM:
    """One layer whose first head reads the pattern of `adversarial_pair`: Q = V = O = 1, K = e e^T + u w^T,
    logits s q k^T / head_dim, the output over 3 and an MLP of 0. e, u, w are in rotary pairs that hardly
    turn.
    """
    model = LlmNormForCausalLM(
        LlmNormConfig(
            architecture="lipschitz",
            vocab_size=5,
            hidden_size=heads * head_dim,
            intermediate_size=4,
            num_hidden_layers=1,
            num_attention_heads=heads,
            norm_options={"alpha": alpha},
            attention_options={"logit_factor": float(s)},
            rope_theta=1e30,
        )
    )
    model = model.double().eval()
    attention: Any = model.model.layers[0].self_attn
    e, u, w = directions(heads * head_dim)
    with torch.no_grad():
        for name in ("q_proj", "v_proj", "o_proj"):
            nn.init.eye_(getattr(attention, name).weight)
        attention.k_proj.weight.copy_(torch.outer(e, e) + torch.outer(u, w))
        nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
        nn.init.eye_(model.lm_head.weight)
        table = torch.eye(5, heads * head_dim, dtype=torch.float64) * math.sqrt(heads * head_dim)
        model.model.embed_tokens.weight.copy_(table)
    return model


def directions(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """e, u and w, three basis vectors of the first head."""
    basis = torch.eye(width, dtype=torch.float64)
    return basis[1], basis[2], basis[3]


def adversarial_pair(width: int) -> tuple[Tensor, Tensor]:
    """X = sqrt(D) (e, -e, u) and the direction sqrt(D) (w, -w, e), each [1, 3, D]."""
    e, u, w = directions(width)
    return (math.sqrt(width) * torch.stack(rows)[None] for rows in ((e, -e, u), (w, -w, e)))  # type: ignore[return-value]
