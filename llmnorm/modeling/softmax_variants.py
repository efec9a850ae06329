"""Softmax attention's relatives, as functions with the signature of transformers' attention functions.

    softmax       a_ij = e^{x_ij} / sum_j e^{x_ij}
    off_by_one    a_ij = e^{x_ij} / (1 + sum_j e^{x_ij})       a row may be near 0 (softmax1)
    sigmoid       a_ij = sigma(x_ij - ln t_i)                  t_i keys are visible (arXiv 2409.04431)

x = q k^T scaling. Shapes: query [B, H, T, D], key and value [B, K, S, D], attention_mask [B, 1, T, S] boolean
or additive, or None (causal) -> [B, T, H, D]. Both compute all T * S scores in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASKED_IMPLEMENTATIONS = ("sdpa", "eager")  # those whose masks have one entry for each score


def visible_keys(query: Tensor, key: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B or 1, 1, T, S] boolean: the keys that each query sees."""
    if attention_mask is None:
        time, seen = query.shape[2], key.shape[2]
        return torch.ones(time, seen, dtype=torch.bool, device=query.device).tril(seen - time)[None, None]
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0


def off_by_one_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax over the keys and one more of logit 0 and value 0, which every query sees."""
    visible = F.pad(visible_keys(query, key, attention_mask), (0, 1), value=True)
    key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    y = F.scaled_dot_product_attention(
        query, key, value, visible, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return y.transpose(1, 2).contiguous(), None


def sigmoid_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Each score through a sigmoid, shifted so that a row of zero logits sums to about 1."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    visible = visible_keys(query, key, attention_mask)
    shift = visible.sum(-1, keepdim=True).clamp_min(1).log()
    scores = (query @ key.mT).float() * scaling - shift
    weights = (torch.sigmoid(scores) * visible).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# option `normalizer` -> the function; softmax is whatever `attn_implementation` names
NORMALIZERS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "off_by_one": off_by_one_attention,
    "sigmoid": sigmoid_attention,
}

# option `gate` -> columns of the gate's projection for each head
GATE_WIDTH: dict[str, Callable[[int], int]] = {
    "head": lambda head_dim: 1,
    "elementwise": lambda head_dim: head_dim,
}
