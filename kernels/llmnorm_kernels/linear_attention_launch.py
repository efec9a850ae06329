"""Launchers of the linear-attention kernels: chunk, tiles and warps, and what the outputs look like."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .dispatch import on_device
from .feature_map_kernels import MAP_CODES
from .linear_attention_kernels import attend, attend_dk, attend_dq, attend_dv
from .rope import empty_heads_like

SPLIT = MAP_CODES["relu_split"]


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _halves(map_code: int) -> int:
    return 2 if map_code == SPLIT else 1


def _options(x: Tensor, map_code: int, packed: bool) -> dict[str, Any]:
    """Chunk, warps and precision: very wide heads take shorter chunks to stay in registers, and so do maps of
    two halves."""
    # float32 operands occur in the interpreter only (see linear_attention).
    precision = "ieee" if x.dtype == torch.float32 else None
    features = _halves(map_code) * x.shape[-1]
    chunk, warps = (16, 4) if features > 128 or map_code == SPLIT else (32, 8)
    return {
        "MAP": map_code,
        "PACKED": packed,
        "C": chunk,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": 1,
    }


def _tile(whole: int, cut: int) -> int:
    """Width of a tile cut from `cut` when all of `whole` is at hand: a state of at most 4,096 numbers."""
    return max(16, min(64, 4096 // _whole(whole), _whole(cut)))


def _with_all_features(options: dict[str, Any], features: int) -> dict[str, Any]:
    """Options of a launch that has every feature at hand: wide maps of two halves take twice the warps."""
    return options | {"num_warps": 8} if options["MAP"] == SPLIT and features > 128 else options


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, power: Tensor | None, top: Tensor | None, segments: Tensor | None,
    state: Tensor | None, normalizer: Tensor | None, eps: float, floor: float, map_code: int, final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, denominator, final state, final normalizer); the last two are empty unless asked for."""
    batch, heads, time, width = q.shape
    groups, values = v.shape[1], v.shape[-1]
    halves = _halves(map_code)
    features = halves * width + (floor != 0.0)
    o = empty_heads_like(q, values)
    den = q.new_empty((batch, heads, time), dtype=torch.float32)
    shape = (batch, groups, features, values) if final else (0,)
    s1, z1 = (q.new_zeros(s, dtype=torch.float32) for s in (shape, shape[:3]))
    if o.numel() == 0:
        if final and state is not None and normalizer is not None:
            s1.copy_(state)
            z1.copy_(normalizer)
        return o, den, s1, z1
    q, k, v = _inner(q), _inner(k), _inner(v)
    options = _with_all_features(_options(q, map_code, segments is not None), halves * width)
    # Twice as wide a tile for twice the warps, which would load 16 bits each of a narrow one.
    tile = _tile(halves * width, values)
    if map_code == SPLIT and options["num_warps"] == 8:
        tile = min(_whole(values), 2 * tile)
    with on_device(q):
        attend[(triton.cdiv(values, tile), batch * heads)](
            q, k, v, power, top, segments, state, normalizer, o, den, s1, z1, heads, heads // groups, time,
            width, values, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], eps, floor,
            HAS_FLOOR=floor != 0.0, HAS_INITIAL=state is not None,
            FINAL=final, BK=_whole(width), BV=tile, **options,
        )  # fmt: skip
    return o, den, s1, z1


def launch_attention_backward(
    do: Tensor, o: Tensor, den: Tensor, q: Tensor, k: Tensor, v: Tensor, power: Tensor | None,
    top: Tensor | None, segments: Tensor | None, state: Tensor | None, normalizer: Tensor | None, eps: float,
    floor: float, map_code: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq with top held fixed, dk, dv, d power, d top); the last two are empty for maps without them."""
    batch, heads, time, width = q.shape
    groups, values = v.shape[1], v.shape[-1]
    pairs, shared, halves = batch * heads, heads // groups, _halves(map_code)
    dq, dk, dv = empty_heads_like(q), _per_query_head(k, heads), _per_query_head(v, heads)
    of_features = _tile(halves * values, width)
    tiles = triton.cdiv(width, of_features)
    rows = (tiles, batch, heads, time) if map_code == SPLIT else (0,)
    dpower, dtop = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if o.numel() == 0:
        dpower, dtop = (q.new_zeros(rows[1:] or 0, dtype=torch.float32) for _ in range(2))
        return dq.zero_(), empty_heads_like(k).zero_(), empty_heads_like(v).zero_(), dpower, dtop
    do, o, q, k, v = (_inner(x) for x in (do, o, q, k, v))
    options = _options(q, map_code, segments is not None)
    of_values = _tile(halves * width, values)
    size, floored = (heads, shared, time, width, values), floor != 0.0
    steps = [x.stride()[:3] for x in (do, o, q, k, v)]
    inputs = [stride for three in steps for stride in three]
    with on_device(q):
        attend_dq[(tiles, pairs)](
            do, o, den, q, k, v, power, top, segments, state, normalizer, dq, dpower, dtop, *size, *inputs,
            *dq.stride()[:3], eps, HAS_FLOOR=floored, HAS_INITIAL=state is not None, BK=of_features,
            BV=_whole(values), **options,
        )  # fmt: skip
        attend_dk[(tiles, pairs)](
            do, o, den, q, k, v, power, top, segments, dk, *size, *inputs, *dk.stride()[:3], eps,
            BK=of_features, BV=_whole(values), **options,
        )  # fmt: skip
        attend_dv[(triton.cdiv(values, of_values), pairs)](
            do, den, q, k, power, top, segments, dv, *size, *steps[0], *steps[2], *steps[3],
            *dv.stride()[:3], eps, floor, HAS_FLOOR=floored, BK=_whole(width), BV=of_values,
            **_with_all_features(options, halves * width),
        )  # fmt: skip
    dk, dv = _sum_of_sharers(dk, k), _sum_of_sharers(dv, v)
    if map_code == SPLIT:
        dpower, dtop = dpower.sum(0), dtop.sum(0)
    return dq, dk, dv, dpower, dtop


def _per_query_head(x: Tensor, heads: int) -> Tensor:
    """Where each query head leaves its gradient of a key or value head: float32 if they must be summed."""
    if x.shape[1] == heads:
        return empty_heads_like(x)
    return x.new_empty((x.shape[0], heads, *x.shape[2:]), dtype=torch.float32)


def _sum_of_sharers(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape[1] == x.shape[1]:
        return gradient
    return empty_heads_like(x).copy_(gradient.unflatten(1, (x.shape[1], -1)).sum(2))
