"""The largest attention logit of each head, exactly, without a T x T matrix.

    S_h = max over sequences b and positions t that may see s of   scaling * q_{b,h,t} . k_{b,h,s}

MuonClip (Kimi K2, arXiv 2507.20534) needs it. It costs one more product of queries and keys in the forward
pass, in chunks of queries, with fp32 results.

Shapes: B sequences, T tokens, S keys, H query heads, K key heads, D = head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # queries at a time


@torch.no_grad()
def max_logits(
    query: Tensor, key: Tensor, scaling: float, mask: Any, document_offsets: Tensor | None = None
) -> Tensor:
    """S_h as [H] in fp32, of query [B, H, T, D] and key [B, K, S, D] with causal attention.

    mask: what the attention function got: None, boolean or additive [B, 1, T, S], a padding mask [B, S], or
    flex attention's BlockMask. document_offsets: `cu_seq_lens` of flash attention, which takes no mask.
    """
    batch, heads, length, _ = query.shape
    groups, seen = key.shape[1], key.shape[2]
    result = torch.full((heads,), -torch.inf, device=query.device)
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        end = seen - length + stop  # keys that the last query of the chunk may see
        q = query[:, :, start:stop].unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)
        k = key[:, :, :end].flatten(0, 1)
        logits = _fp32_product(q, k.mT).view(batch, groups, -1, stop - start, end)
        rows = torch.arange(end - (stop - start), end, device=query.device)
        allowed = _allowed(mask, document_offsets, rows, slice(start, stop), end, batch, seen)
        logits.masked_fill_(~allowed[:, None, None], -torch.inf)
        result = torch.maximum(result, logits.amax((0, 3, 4)).flatten())
    return result * scaling


def _fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """left right in fp32, [N, t, D] and [N, D, s]; 16-bit products are exact in it.

    Neither call is one of the operations whose results selective checkpointing keeps.
    """
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
            return torch.bmm(left, right.to(left.dtype), out_dtype=torch.float32)
        zero = torch.zeros((1, 1, 1), device=left.device)
        return torch.baddbmm(zero, left.float(), right.float(), beta=0)


def _allowed(
    mask: Any, offsets: Tensor | None, rows: Tensor, queries: slice, end: int, batch: int, seen: int
) -> Tensor:
    """Which of the first `end` keys the queries at the positions `rows` may see: boolean [B or 1, t, end]."""
    keys = torch.arange(end, device=rows.device)
    if hasattr(mask, "mask_mod"):
        sequences = torch.arange(batch, device=rows.device)
        head = torch.zeros((), dtype=torch.int64, device=rows.device)
        return mask.mask_mod(sequences[:, None, None], head, rows[None, :, None], keys[None, None, :])
    if mask is not None and mask.ndim == 4:
        part = mask[:, 0, queries, :end]
        return part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
    causal = (keys[None, :] <= rows[:, None])[None]
    if mask is not None:
        causal = causal & mask[:, None, :end].bool()
    if offsets is not None:
        tokens = torch.arange(batch * seen, device=rows.device).view(batch, seen)
        document = torch.searchsorted(offsets, tokens, right=True)
        causal = causal & (document[:, rows, None] == document[:, None, :end])
    return causal
