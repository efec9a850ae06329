"""Triton kernels of normalized causal linear attention and their launchers.

One program carries the running state of one head over the chunks of its sequence, in registers and float32:
no state is stored. The output and d v are cut into tiles of the value width with all features at hand, d q
and d k into tiles of the features with all values at hand, so that no result is summed between programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device
from .rope import empty_heads_like


@triton.jit
def load_chunk(X, base, st, start, step, T, col, N):
    """Rows start + step of a head. The 64-bit part of the address is one scalar; the offsets inside a chunk
    are 32 bits."""
    inside = (start + step < T)[:, None] & (col < N)[None, :]
    first = X + base + tl.cast(start, tl.int64) * st
    return tl.load(first + step[:, None] * st + col[None, :], mask=inside, other=0.0)


@triton.jit
def store_chunk(X, base, st, start, step, T, col, N, value):
    inside = (start + step < T)[:, None] & (col < N)[None, :]
    first = X + base + tl.cast(start, tl.int64) * st
    tl.store(first + step[:, None] * st + col[None, :], value.to(X.dtype.element_ty), mask=inside)


@triton.jit
def head_base(H, sb, sh):
    pair = tl.program_id(1)
    return (pair // H).to(tl.int64) * sb + (pair % H).to(tl.int64) * sh


@triton.jit
def value_slopes(DO, OUT, DEN, do_base, o_base, sdo, so, start, step, T, col, V, eps):
    """(d numerator, d denominator) of a chunk: G / (D + eps) and -<G, o> / (D + eps)."""
    g = load_chunk(DO, do_base, sdo, start, step, T, col, V).to(tl.float32)
    o = load_chunk(OUT, o_base, so, start, step, T, col, V).to(tl.float32)
    den = tl.load(DEN + tl.program_id(1).to(tl.int64) * T + start + step, mask=start + step < T, other=1.0)
    inverse = 1.0 / (den + tl.cast(eps, tl.float32))
    return g * inverse[:, None], -tl.sum(g * o, 1) * inverse


@triton.jit
def attend(
    Q, K, V, S0, Z0, OUT, DEN, S1, Z1, H, T, NK, NV, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, eps,
    HAS_INITIAL: tl.constexpr, FINAL: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o = (tril(Q K^T) V + Q S) / (tril(Q K^T) 1 + Q z + eps), chunk by chunk, for one tile of the values."""
    feature = tl.arange(0, BK)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    step = tl.arange(0, C)
    causal = step[:, None] >= step[None, :]
    pair = tl.program_id(1).to(tl.int64)
    state = tl.zeros([BK, BV], tl.float32)
    z = tl.zeros([BK], tl.float32)
    at_state = pair * NK * NV + feature.to(tl.int64)[:, None] * NV + value[None, :]
    in_state = (feature < NK)[:, None] & (value < NV)[None, :]
    if HAS_INITIAL:
        state += tl.load(S0 + at_state, mask=in_state, other=0.0)
        z += tl.load(Z0 + pair * NK + feature, mask=feature < NK, other=0.0)
    q_base, k_base, v_base, o_base = (
        head_base(H, qb, qh),
        head_base(H, kb, kh),
        head_base(H, vb, vh),
        head_base(H, ob, oh),
    )
    for start in range(0, T, C):
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        v = load_chunk(V, v_base, vt, start, step, T, value, NV)
        scores = tl.where(causal, tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
        den = tl.sum(scores, 1) + tl.sum(q.to(tl.float32) * z[None, :], 1)
        out = tl.dot(q, state.to(q.dtype), input_precision=PRECISION)
        out += tl.dot(scores.to(v.dtype), v, input_precision=PRECISION)
        store_chunk(
            OUT, o_base, ot, start, step, T, value, NV, out / (den + tl.cast(eps, tl.float32))[:, None]
        )
        if tl.program_id(0) == 0:
            tl.store(DEN + pair * T + start + step, den, mask=start + step < T)
        state += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        z += tl.sum(k.to(tl.float32), 0)
    if FINAL:
        tl.store(S1 + at_state, state, mask=in_state)
        if tl.program_id(0) == 0:
            tl.store(Z1 + pair * NK + feature, z, mask=feature < NK)


@triton.jit
def attend_dq(
    DO, OUT, DEN, K, V, S0, Z0, DQ, H, T, NK, NV, db, dh, dt, ob, oh, ot, kb, kh, kt, vb, vh, vt, gb, gh, gt,
    eps,
    HAS_INITIAL: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq = tril(dN V^T + dD 1^T) K + dN S^T + dD z^T, forward over the chunks, for one tile of the
    features."""
    feature = tl.program_id(0) * BK + tl.arange(0, BK)
    value = tl.arange(0, BV)
    step = tl.arange(0, C)
    causal = step[:, None] >= step[None, :]
    pair = tl.program_id(1).to(tl.int64)
    state = tl.zeros([BK, BV], tl.float32)
    z = tl.zeros([BK], tl.float32)
    if HAS_INITIAL:
        at_state = pair * NK * NV + feature.to(tl.int64)[:, None] * NV + value[None, :]
        state += tl.load(S0 + at_state, mask=(feature < NK)[:, None] & (value < NV)[None, :], other=0.0)
        z += tl.load(Z0 + pair * NK + feature, mask=feature < NK, other=0.0)
    d_base, o_base, k_base, v_base, g_base = (
        head_base(H, db, dh), head_base(H, ob, oh), head_base(H, kb, kh), head_base(H, vb, vh), head_base(H,
        gb, gh)
    )  # fmt: skip
    for start in range(0, T, C):
        dn, dd = value_slopes(DO, OUT, DEN, d_base, o_base, dt, ot, start, step, T, value, NV, eps)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        v = load_chunk(V, v_base, vt, start, step, T, value, NV)
        dn = dn.to(v.dtype)
        w = tl.where(causal, tl.dot(dn, tl.trans(v), input_precision=PRECISION) + dd[:, None], 0.0)
        dq = tl.dot(w.to(k.dtype), k, input_precision=PRECISION) + dd[:, None] * z[None, :]
        dq += tl.dot(dn, tl.trans(state.to(v.dtype)), input_precision=PRECISION)
        store_chunk(DQ, g_base, gt, start, step, T, feature, NK, dq)
        state += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        z += tl.sum(k.to(tl.float32), 0)


@triton.jit
def attend_dk(
    DO, OUT, DEN, Q, V, DK, H, T, NK, NV, db, dh, dt, ob, oh, ot, qb, qh, qt, vb, vh, vt, gb, gh, gt, eps,
    PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dk = tril(dN V^T + dD 1^T)^T Q + V R^T + 1 r^T, backward over the chunks, for one tile of the
    features."""
    feature = tl.program_id(0) * BK + tl.arange(0, BK)
    value = tl.arange(0, BV)
    step = tl.arange(0, C)
    causal = step[:, None] >= step[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    z = tl.zeros([BK], tl.float32)
    d_base, o_base, q_base, v_base, g_base = (
        head_base(H, db, dh), head_base(H, ob, oh), head_base(H, qb, qh), head_base(H, vb, vh), head_base(H,
        gb, gh)
    )  # fmt: skip
    chunks = tl.cdiv(T, C)
    for turn in range(0, chunks):
        start = (chunks - 1 - turn) * C
        dn, dd = value_slopes(DO, OUT, DEN, d_base, o_base, dt, ot, start, step, T, value, NV, eps)
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        v = load_chunk(V, v_base, vt, start, step, T, value, NV)
        dn = dn.to(v.dtype)
        w = tl.where(causal, tl.dot(dn, tl.trans(v), input_precision=PRECISION) + dd[:, None], 0.0)
        dk = tl.dot(tl.trans(w.to(q.dtype)), q, input_precision=PRECISION) + z[None, :]
        dk += tl.dot(v, tl.trans(state.to(v.dtype)), input_precision=PRECISION)
        store_chunk(DK, g_base, gt, start, step, T, feature, NK, dk)
        state += tl.dot(tl.trans(q), dn, input_precision=PRECISION)
        z += tl.sum(q.to(tl.float32) * dd[:, None], 0)


@triton.jit
def attend_dv(
    DO, DEN, Q, K, DV, H, T, NK, NV, db, dh, dt, qb, qh, qt, kb, kh, kt, gb, gh, gt, eps,
    PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv = tril(Q K^T)^T dN + K R, backward over the chunks, for one tile of the values."""
    feature = tl.arange(0, BK)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    step = tl.arange(0, C)
    causal = step[:, None] >= step[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    d_base, q_base, k_base, g_base = (
        head_base(H, db, dh),
        head_base(H, qb, qh),
        head_base(H, kb, kh),
        head_base(H, gb, gh),
    )
    chunks = tl.cdiv(T, C)
    for turn in range(0, chunks):
        start = (chunks - 1 - turn) * C
        g = load_chunk(DO, d_base, dt, start, step, T, value, NV).to(tl.float32)
        den = tl.load(
            DEN + tl.program_id(1).to(tl.int64) * T + start + step, mask=start + step < T, other=1.0
        )
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        dn = (g / (den + tl.cast(eps, tl.float32))[:, None]).to(k.dtype)
        scores = tl.where(causal, tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
        dv = tl.dot(tl.trans(scores.to(k.dtype)), dn, input_precision=PRECISION)
        dv += tl.dot(k, state.to(k.dtype), input_precision=PRECISION)
        store_chunk(DV, g_base, gt, start, step, T, value, NV, dv)
        state += tl.dot(tl.trans(q), dn, input_precision=PRECISION)


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _options(x: Tensor, features: int, values: int) -> dict[str, object]:
    """Chunk, warps and precision: very wide heads take shorter chunks to stay in registers."""
    # float32 operands occur in the interpreter only (see linear_attention).
    precision = "ieee" if x.dtype == torch.float32 else None
    chunk, warps = (16, 4) if features > 128 else (32, 8)
    return {"C": chunk, "PRECISION": precision, "num_warps": warps, "num_stages": 1}


def _tile(whole: int, cut: int) -> int:
    """Width of a tile cut from `cut` when all of `whole` is at hand: a state of at most 4,096 numbers."""
    return max(16, min(64, 4096 // _whole(whole), _whole(cut)))


def launch_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, normalizer: Tensor | None, eps: float, final: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, denominator, final state, final normalizer); the last two are empty unless asked for."""
    batch, heads, time, features = q.shape
    values = v.shape[-1]
    o = empty_heads_like(v)
    den = q.new_empty((batch, heads, time), dtype=torch.float32)
    shape = (batch, heads, features, values) if final else (0,)
    s1, z1 = (q.new_zeros(s, dtype=torch.float32) for s in (shape, shape[:3]))
    if o.numel() == 0:
        return o, den, s1, z1
    q, k, v = _inner(q), _inner(k), _inner(v)
    tile = _tile(features, values)
    with on_device(q):
        attend[(triton.cdiv(values, tile), batch * heads)](
            q, k, v, state, normalizer, o, den, s1, z1, heads, time, features, values, *q.stride()[:3],
            *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], eps, HAS_INITIAL=state is not None,
            FINAL=final, BK=_whole(features), BV=tile, **_options(q, features, values),
        )  # fmt: skip
    return o, den, s1, z1


def launch_attention_backward(
    do: Tensor, o: Tensor, den: Tensor, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None,
    normalizer: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, time, features = q.shape
    values = v.shape[-1]
    dq, dk, dv = empty_heads_like(q), empty_heads_like(k), empty_heads_like(v)
    if o.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    do, o, q, k, v = (_inner(x) for x in (do, o, q, k, v))
    options, pairs = _options(q, features, values), batch * heads
    of_features, of_values = _tile(values, features), _tile(features, values)
    size = (heads, time, features, values)
    with on_device(q):
        attend_dq[(triton.cdiv(features, of_features), pairs)](
            do, o, den, k, v, state, normalizer, dq, *size, *do.stride()[:3], *o.stride()[:3],
            *k.stride()[:3], *v.stride()[:3], *dq.stride()[:3], eps, HAS_INITIAL=state is not None,
            BK=of_features, BV=_whole(values), **options,
        )  # fmt: skip
        attend_dk[(triton.cdiv(features, of_features), pairs)](
            do, o, den, q, v, dk, *size, *do.stride()[:3], *o.stride()[:3], *q.stride()[:3], *v.stride()[:3],
            *dk.stride()[:3], eps, BK=of_features, BV=_whole(values), **options,
        )  # fmt: skip
        attend_dv[(triton.cdiv(values, of_values), pairs)](
            do, den, q, k, dv, *size, *do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *dv.stride()[:3],
            eps, BK=_whole(features), BV=of_values, **options,
        )  # fmt: skip
    return dq, dk, dv
