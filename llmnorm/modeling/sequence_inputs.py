"""What the layers are told about a sequence: padding, documents and positions, for each kind of attention.

Shapes: B sequences, T tokens of this call, S tokens seen with a cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .linear_mixers import LinearInputs
from .recurrent_cache import COUNT, recurrent_state, state_layer

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig

MASK_KEYS = ("full_attention", "linear_attention")


def softmax_mask(
    config: LlmNormConfig,
    inputs_embeds: Tensor,
    attention_mask: Any,
    cache: Cache | None,
    position_ids: Tensor | None,
) -> Any:
    """The mask of softmax layers, in the form their implementation takes; None where no layer is softmax.

    Restarted position_ids separate documents only where no cache has been seen. A mapping is what `generate`
    prepares for caches of a fixed size.
    """
    if "full_attention" not in config.layer_types:
        return None
    if isinstance(attention_mask, dict):
        return attention_mask["full_attention"]
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )


def linear_padding(attention_mask: Any, time: int) -> Tensor | None:
    """[B, T], 0 at padding, from the same attention_mask [B, S].

    Raises:
        ValueError: a mask for pairs of tokens, which a sum over tokens cannot follow.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["linear_attention"]
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions; linear attention takes [batch, tokens], "
            "zero at padding, and keeps packed documents apart by restarted position_ids"
        )
    return attention_mask[:, -time:]


def document_segments(position_ids: Tensor | None, batch_size: int) -> Tensor | None:
    """[B, T], a number that grows where a position is not its predecessor's successor."""
    if position_ids is None:
        return None
    position_ids = position_ids.expand(batch_size, -1)
    begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return begins.cumsum(-1)


def linear_positions(
    config: LlmNormConfig, padding: Tensor | None, inputs_embeds: Tensor, cache: Cache | None
) -> Tensor:
    """[B, T], each token's number among those of its row that are not padding, 0 before the first.

    So left padding changes nothing, and the tokens seen are counted row by row in the cache.
    """
    new = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
    positions = (new if padding is None else (padding != 0)).cumsum(-1) - 1
    seen = recurrent_state(state_layer(cache, config.layer_types.index("linear_attention")), COUNT)
    return (positions if seen is None else positions + seen).clamp_min(0)


def linear_inputs(
    config: LlmNormConfig,
    inputs_embeds: Tensor,
    attention_mask: Any,
    cache: Cache | None,
    position_ids: Tensor | None,
) -> tuple[LinearInputs, Tensor | None]:
    """What linear layers are told, and the positions of their rotary embedding where they have one."""
    batch_size, time = inputs_embeds.shape[:2]
    padding = linear_padding(attention_mask, time)
    alone = attention_mask is None and cache is None
    segments = document_segments(position_ids, batch_size) if alone else None
    positions = position_ids
    if not config.has_linear_rope:
        positions = None
    elif positions is None:
        positions = linear_positions(config, padding, inputs_embeds, cache)
    return LinearInputs(padding, segments), positions
