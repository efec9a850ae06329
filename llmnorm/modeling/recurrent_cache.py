"""The state of linear attention in a transformers cache: read, write, snapshot and restore.

A linear layer keeps in its `LinearAttentionLayer` of the cache, whatever the number of tokens seen:

    recurrent_states[0]   [S | z], [B, G, K, V + 1], fp32     recurrent_states[1]   tokens seen, [B, 1]
    conv_states[0]        inputs of the short convolutions, [B, channels, kernel - 1]
    conv_states[1]        inputs of the value convolution, the same

Padding is not seen. All of it follows `reorder_cache` and `reset`. A sum cannot be undone, so `crop` raises;
to go back, restore a snapshot. `make_cache` makes the layers `RecurrentLayer`s, which know their length too:
without that, transformers' `generate` cannot run a model whose layers are all linear.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUM, COUNT = 0, 1  # indices of recurrent_states
SHORT, VALUE = 0, 1  # indices of conv_states
NUMBER_OF_STATES = 2
CANNOT_CROP = (
    "the sum that linear attention keeps cannot be undone; take a snapshot_cache before, and restore_cache "
    "it instead of cropping"
)


class RecurrentLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[override,misc,unused-ignore]
    """A linear-attention layer of a cache that knows how many tokens, padding included, it was given."""

    is_compileable = False  # the length is a Python number

    def __init__(self, number_of_states: int = NUMBER_OF_STATES, **kwargs: Any) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states)
        self.cumulative_length = 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("a linear-attention layer has no keys and values to update")

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(CANNOT_CROP)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.cumulative_length = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.recurrent_states[SUM]
        if rows is not None:
            self._select(torch.arange(len(rows), device=rows.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def _select(self, rows: Any) -> None:
        self.reorder_cache(rows)


def make_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty `DynamicCache` for a model of ours, each linear layer a `RecurrentLayer`."""
    return with_lengths(DynamicCache(config=config))


def with_lengths(cache: Any) -> Any:
    """`cache`, its linear-attention layers made `RecurrentLayer`s with the states they have."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer:
            cache.layers[index] = RecurrentLayer()
            vars(cache.layers[index]).update(vars(layer))
    return cache


def state_layer(cache: Cache | None, layer_idx: int) -> LinearAttentionLayer | None:
    """The cache's layer for linear layer `layer_idx`; None without a cache.

    Raises:
        ValueError: the cache was not made for this model, or records the past to be cropped.
    """
    if cache is None:
        return None
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, LinearAttentionLayer) or layer.number_of_states < NUMBER_OF_STATES:
        raise ValueError(
            f"past_key_values has no linear-attention state for layer {layer_idx}; make the cache with "
            "DynamicCache(config=model.config)"
        )
    if layer.record_past:
        raise ValueError(f"past_key_values records the past in order to be cropped: {CANNOT_CROP}")
    return layer


def recurrent_state(layer: LinearAttentionLayer | None, index: int) -> Tensor | None:
    """State `index` of `recurrent_states`, None before the first token. After `reset` it is zero."""
    return None if layer is None else layer.recurrent_states[index]


def write_recurrent_state(layer: LinearAttentionLayer, index: int, state: Tensor) -> None:
    """Replace a state, in place where there is one."""
    layer.device = state.device  # type: ignore[assignment]  # where `reorder_cache` sends its indices
    layer.update_recurrent_state(state.detach(), state_idx=index)
    layer.has_previous_state[index] = True


def history(layer: LinearAttentionLayer | None, index: int) -> Tensor | None:
    """The last kernel - 1 inputs of a convolution, [B, kernel - 1, channels]; None before the first token."""
    state = None if layer is None else layer.conv_states[index]
    return None if state is None else state.mT


def write_history(
    layer: LinearAttentionLayer, index: int, inputs: Tensor, padding: Tensor | None, length: int
) -> None:
    """Keep the last `length` inputs that are not padding.

    inputs [B, length + T, channels], the former history first; padding [B, T], 0 where a token is padding.
    """
    if padding is None:
        kept = inputs[:, -length:]
    else:
        positions = torch.arange(1, padding.shape[1] + 1, device=padding.device)
        after = (padding != 0).mul(positions).amax(1, keepdim=True)  # tokens up to the last real one
        rows = after + torch.arange(length, device=padding.device)
        kept = inputs.gather(1, rows[..., None].expand(-1, -1, inputs.shape[2]))
    layer.update_conv_state(kept.mT.detach(), state_idx=index)


def snapshot_cache(cache: Cache) -> list[Any]:
    """A copy of everything `cache` holds, for `restore_cache`; call it under `torch.no_grad()`."""
    return copy.deepcopy(cache.layers)


def restore_cache(cache: Cache, snapshot: list[Any]) -> None:
    """Put `cache` back to a snapshot, which stays good for another time."""
    cache.layers = copy.deepcopy(snapshot)
