"""One layer of the model: attention and MLP in the block equation, in the stream's dtype and width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import LlmNormAttention
from .batch_statistics import TokenSet, observer
from .configuration_llmnorm import LlmNormConfig
from .equation import Layer, attach, identity
from .hypersphere import put_on_sphere
from .linear_mixers import NaLaFormerAttention, SimplifiedLinearAttention
from .mlp import MLPS
from .parametrized_linear import parametrize_projections
from .quantization import quantize_projections
from .zero_mean import aligned, unwiden, widen

# A name of the config key `attention` -> the sublayer.
ATTENTIONS: dict[str, type[nn.Module]] = {
    "softmax": LlmNormAttention,
    "nalaformer": NaLaFormerAttention,
    "sla": SimplifiedLinearAttention,
}
STREAM_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def _as_it_is(x: Tensor, module: nn.Module) -> Tensor:
    return x


def _as_module_computes(x: Tensor, module: nn.Module) -> Tensor:
    """Cast to the dtype of the module's weights; under autocast its matrix products cast for themselves."""
    if torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(next(module.parameters()).dtype)


def stream_casts(
    config: LlmNormConfig,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, nn.Module], Tensor]]:
    """(to_stream, to_branch): what keeps the residual stream in `residual_dtype`; null needs no casts."""
    if config.residual_dtype is None:
        return identity, _as_it_is
    return partial(_cast, dtype=STREAM_DTYPES[config.residual_dtype]), _as_module_computes


def stream_widths(config: LlmNormConfig) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(open_stream, close_stream): zeros behind a compressed stream while it is computed, and off again."""
    if not config.is_compressed:
        return identity, identity
    width = config.stream_width
    return partial(widen, width=aligned(width)), partial(unwiden, width=width)


class LlmNormBlock(nn.Module):
    """One layer: the block equation of `equation.py` for attention, then for the MLP.

    hidden_states [B, T, d] -> [B, T, d], in one dtype from the first layer to the last.
    """

    # Norms that a layer lacks are the identity function; see `equation.attach`.
    input_layernorm: Callable[[Tensor], Tensor]
    post_self_attn_layernorm: Callable[[Tensor], Tensor]
    attention_residual_norm: Callable[[Tensor], Tensor]
    attention_shortcut: Callable[[Tensor, Tensor], Tensor]
    attention_sum: Callable[[Tensor, Tensor], Tensor]
    post_attention_layernorm: Callable[[Tensor], Tensor]
    post_mlp_layernorm: Callable[[Tensor], Tensor]
    mlp_residual_norm: Callable[[Tensor], Tensor]
    mlp_shortcut: Callable[[Tensor, Tensor], Tensor]
    mlp_sum: Callable[[Tensor, Tensor], Tensor]

    # Set by transformers' `_set_gradient_checkpointing`. Its own base class for layers checkpoints __call__
    # in some versions and forward in others; here it is always forward, inside FSDP's hooks and
    # `layer.compile()`.
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, config: LlmNormConfig, layer_idx: int, layer: Layer) -> None:
        super().__init__()
        self.self_attn = ATTENTIONS[config.layer_attentions[layer_idx]](config, layer_idx)
        self.mlp = MLPS[config.mlp](config, layer_idx)
        attach(self, "attention", layer.attention, config.stream_width, config.rms_norm_eps)
        attach(self, "mlp", layer.mlp, config.stream_width, config.rms_norm_eps)
        if layer.on_sphere:
            put_on_sphere(self)
        quantize_projections(self, config, layer_idx)
        parametrize_projections(self, config)
        self.observe = observer(self)
        self.to_stream, self.to_branch = stream_casts(config)

    def forward(self, hidden_states: Tensor, **attention_inputs: Any) -> Tensor:
        if not (self.gradient_checkpointing and self.training):
            return self._block_equation(hidden_states, **attention_inputs)
        if attention_inputs.get("past_key_values") is not None:
            raise ValueError(
                "activation checkpointing would write past_key_values twice; pass use_cache=False"
            )
        return self._gradient_checkpointing_func(
            partial(self._block_equation, **attention_inputs), hidden_states
        )

    def _block_equation(self, x: Tensor, tokens: TokenSet | None = None, **attention_inputs: Any) -> Tensor:
        self.observe(tokens)
        z = self.input_layernorm(x)
        y, _ = self.self_attn(self.to_branch(z, self.self_attn), **attention_inputs)
        y = self.post_self_attn_layernorm(self.to_stream(y))
        u = self.attention_sum(self.attention_shortcut(x, z), y)
        x = self.attention_residual_norm(u)

        z = self.post_attention_layernorm(x)
        y = self.mlp(self.to_branch(z, self.mlp))
        y = self.post_mlp_layernorm(self.to_stream(y))
        u = self.mlp_sum(self.mlp_shortcut(x, z), y)
        return self.mlp_residual_norm(u)
