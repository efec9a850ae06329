"""How sharply each head attends: the entropy of its softmax map and its largest logit.

    s_tj = q_t . k_j / sqrt(D)        p_t = softmax over the visible j of s_tj
    entropy H_t = -sum_j p_tj ln p_tj (nats)      relative entropy H_t / ln(visible keys of t)
    max logit = max over t and visible j of s_tj

A head whose entropy falls to 0 looks at one token and hardly learns any more (Stabilizing Transformer
Training by Preventing Attention Entropy Collapse, arXiv 2303.06296); large logits come before it (Scaling
Vision Transformers to 22 Billion Parameters, arXiv 2302.05442). Attention without a softmax map has none of
this and is reported as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmnorm.evaluation.tally import Gather, Tally, alone

# The name under which transformers makes a mask with one entry for each score, and which we answer to.
EAGER = "eager"
MAP_ELEMENTS = 2**24  # entries of the softmax map that are held at a time: 64 MiB


class AttentionStatistics:
    """Sums the quantities above over the forward passes made inside `watching`."""

    def __init__(self, num_layers: int, num_heads: int, device: torch.device) -> None:
        per_head = (num_layers, num_heads)
        sums = {"entropy": per_head, "relative": per_head, "queries": (num_layers,), "choices": (num_layers,)}
        self.tally = Tally(device, sums=sums, maxima={"max_logit": per_head})
        self.reasons: dict[int, str] = {}

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Let every attention that goes through transformers' registry be computed here, in plain torch."""
        implementation = model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS[EAGER] = self._attend
        model.config._attn_implementation = EAGER
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[EAGER]
            model.config._attn_implementation = implementation

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """softmax(q k^T * scaling + mask) v, rows of queries at a time: [B, H, T, D] -> [B, T, H, D]."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = _causal(query, key) if attention_mask is None else attention_mask[..., : key.shape[-2]]
        rows = max(1, MAP_ELEMENTS // (query.shape[0] * query.shape[1] * key.shape[2]))
        parts = []
        with torch.autocast(query.device.type, enabled=False):
            for first in range(0, query.shape[2], rows):
                chunk, its_mask = query[:, :, first : first + rows], mask[:, :, first : first + rows]
                scores = _wide(chunk) @ _wide(key).transpose(2, 3) * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                visible = its_mask
                if its_mask.dtype != torch.bool:  # what is added to the scores, hugely negative where hidden
                    visible = its_mask > torch.finfo(its_mask.dtype).min / 2
                    scores = scores + its_mask
                scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
                weights = _softmax(scores, s_aux)
                if s_aux is None:
                    self._see(layer, scores, weights, visible.expand(-1, weights.shape[1], -1, -1))
                else:
                    self.reasons[layer] = "its softmax has a sink beside the keys"
                parts.append(weights.to(value.dtype) @ value)
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None

    def _see(self, layer: int, scores: Tensor, weights: Tensor, visible: Tensor) -> None:
        sums = self.tally.sums
        entropy = torch.special.entr(weights).sum(-1)
        keys = visible.sum(-1)
        choice = keys > 1
        relative = torch.where(choice, entropy / keys.clamp(min=2).log(), 0.0)
        sums["entropy"][layer] += entropy.sum((0, 2), dtype=torch.float64)
        sums["relative"][layer] += relative.sum((0, 2), dtype=torch.float64)
        sums["queries"][layer] += keys[:, 0].numel()
        sums["choices"][layer] += choice[:, 0].sum()
        self.tally.raise_to("max_logit", layer, scores.amax((0, 2, 3)))

    def result(self, attentions: Sequence[str], gather: Gather = alone) -> dict[str, Any]:
        """Per layer, the mean over heads (max for logits) and each head; null with a reason where absent.

        attentions: what the attention of each layer is called, for the reasons.
        """
        total = self.tally.total(gather)
        found: dict[str, Any] = {
            name: []
            for name in (
                "attention_entropy",
                "attention_relative_entropy",
                "max_attention_logit",
                "attention_entropy_heads",
                "max_attention_logit_heads",
            )
        }
        unavailable = {}
        for layer, called in enumerate(attentions):
            if not total["queries"][layer]:
                reason = self.reasons.get(layer, f"{called} computes no softmax map")
                unavailable[f"layer {layer + 1}"] = reason
                for numbers in found.values():
                    numbers.append(None)
                continue
            entropy = total["entropy"][layer] / total["queries"][layer]
            relative = total["relative"][layer] / total["choices"][layer]
            logits = total["max_logit"][layer]
            found["attention_entropy"].append(float(entropy.mean()))
            found["attention_relative_entropy"].append(float(relative.mean()))
            found["max_attention_logit"].append(float(logits.max()))
            found["attention_entropy_heads"].append(entropy.tolist())
            found["max_attention_logit_heads"].append(logits.tolist())
        return {**found, "attention_unavailable": unavailable}


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Whether query t, the last of them at the last key, sees key j: [1, 1, T, S]."""
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return seen.tril(key.shape[2] - query.shape[2])[None, None]


def _softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    if sink is None:
        return scores.softmax(-1)
    column = sink.reshape(1, -1, 1, 1).to(scores).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
