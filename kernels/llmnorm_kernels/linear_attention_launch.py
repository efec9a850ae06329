"""Launchers of the linear-attention kernels: chunk, tiles and warps, and what the outputs look like."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .dispatch import INTERPRETED, on_device
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


class Shape(NamedTuple):
    """Tokens of a chunk, warps of a program, and the most numbers that its tile of a state may have."""

    chunk: int
    warps: int
    state: int = 4096


# The first row that holds is taken: target (None: all), passes, halves of the map, more features than, shape.
# Long chunks make few steps of a sequence and wide tiles few programs; both are as large as the compile gate
# finds without a spill (kernels/GATE.md), not as a GPU's clock would have them.
SHAPES: tuple[tuple[str | None, str, int, int, Shape], ...] = (
    # Beyond four warps of 64 lanes, each may hold 256 registers and no longer 512.
    ("hip", "attend dv", 1, 0, Shape(16, 4)),
    ("hip", "attend dv", 2, 0, Shape(16, 4)),
    # 256 features beside a state: eight warps, which load a tile of 16 values 16 bits at a time. With two
    # halves a tile of 32 fits everywhere but on sm_80, whose warps all hold a chunk's operands themselves.
    ("sm_80", "attend", 2, 128, Shape(16, 8)),
    (None, "attend", 2, 128, Shape(16, 8, state=8192)),
    (None, "attend", 1, 128, Shape(16, 8)),
    (None, "dv", 2, 128, Shape(16, 8)),
    ("sm_80", "attend", 1, 64, Shape(16, 4)),
    ("sm_100", "dv", 1, 64, Shape(16, 4)),
    (None, "attend dq dk dv", 2, 0, Shape(16, 4)),
    (None, "dq dk dv", 1, 128, Shape(16, 4)),
    (None, "attend dq dk dv", 1, 0, Shape(32, 8)),
)


def choose_shape(target: str, work: str, halves: int, features: int) -> Shape:
    """The row of SHAPES for a pass (attend, dq, dk, dv) with this many features, both halves counted."""
    return next(
        shape
        for on, passes, of_halves, above, shape in SHAPES
        if on in (None, target) and work in passes.split() and of_halves == halves and features > above
    )


@functools.cache
def target_of(device: torch.device) -> str:
    """hip, or the oldest of sm_80, sm_90 and sm_100 with the matrix instructions of this device."""
    if INTERPRETED:
        return "sm_90"
    target = triton.runtime.driver.active.get_current_target()
    # Consumer cards of sm_120 multiply with the instructions of sm_80.
    families = {9: "sm_90", 10: "sm_100"}
    return "hip" if target.backend == "hip" else families.get(target.arch // 10, "sm_80")


def _shapes(x: Tensor, map_code: int, *passes: str) -> list[Shape]:
    with on_device(x):
        target = target_of(x.device)
    halves = _halves(map_code)
    return [choose_shape(target, work, halves, halves * x.shape[-1]) for work in passes]


def _options(x: Tensor, map_code: int, packed: bool, shape: Shape) -> dict[str, Any]:
    return {
        "MAP": map_code,
        "PACKED": packed,
        "C": shape.chunk,
        # float32 operands occur in the interpreter only (see linear_attention).
        "PRECISION": "ieee" if x.dtype == torch.float32 else None,
        "num_warps": shape.warps,
        "num_stages": 1,
    }


def _tile(shape: Shape, whole: int, cut: int) -> int:
    """Width of a tile cut from `cut` when all of `whole` is at hand."""
    return max(16, min(64, shape.state // _whole(whole), _whole(cut)))


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
    (shape_of_attend,) = _shapes(q, map_code, "attend")
    options = _options(q, map_code, segments is not None, shape_of_attend)
    tile = _tile(shape_of_attend, halves * width, values)
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
    for_dq, for_dk, for_dv = _shapes(q, map_code, "dq", "dk", "dv")
    of_features = _tile(for_dq, halves * values, width)
    tiles = triton.cdiv(width, of_features)
    rows = (tiles, batch, heads, time) if map_code == SPLIT else (0,)
    dpower, dtop = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if o.numel() == 0:
        dpower, dtop = (q.new_zeros(rows[1:] or 0, dtype=torch.float32) for _ in range(2))
        return dq.zero_(), empty_heads_like(k).zero_(), empty_heads_like(v).zero_(), dpower, dtop
    do, o, q, k, v = (_inner(x) for x in (do, o, q, k, v))
    packed = segments is not None
    of_values = _tile(for_dv, halves * width, values)
    size, floored = (heads, shared, time, width, values), floor != 0.0
    steps = [x.stride()[:3] for x in (do, o, q, k, v)]
    inputs = [stride for three in steps for stride in three]
    with on_device(q):
        attend_dq[(tiles, pairs)](
            do, o, den, q, k, v, power, top, segments, state, normalizer, dq, dpower, dtop, *size, *inputs,
            *dq.stride()[:3], eps, HAS_FLOOR=floored, HAS_INITIAL=state is not None, BK=of_features,
            BV=_whole(values), **_options(q, map_code, packed, for_dq),
        )  # fmt: skip
        attend_dk[(tiles, pairs)](
            do, o, den, q, k, v, power, top, segments, dk, *size, *inputs, *dk.stride()[:3], eps,
            BK=of_features, BV=_whole(values), **_options(q, map_code, packed, for_dk),
        )  # fmt: skip
        attend_dv[(triton.cdiv(values, of_values), pairs)](
            do, den, q, k, power, top, segments, dv, *size, *steps[0], *steps[2], *steps[3],
            *dv.stride()[:3], eps, floor, HAS_FLOOR=floored, BK=_whole(width), BV=of_values,
            **_options(q, map_code, packed, for_dv),
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
