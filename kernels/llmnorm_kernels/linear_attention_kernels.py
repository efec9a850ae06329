"""Triton kernels of normalized causal linear attention; `linear_attention_launch` starts them.

One program carries the running state of one head over the chunks of its sequence, in registers and float32:
no state is stored, and none passes from one packed document to the next. The output and d v are cut into
tiles of the value width with all features at hand, d q and d k into tiles of the features with all values at
hand, so that no result is summed between programs. Features are formed inside a chunk from queries and keys
(`feature_map_kernels`) in one half or two, each with a state of its own; the constant feature `floor`, whose
state is the sum of the values, is never formed at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .feature_map_kernels import (
    RELU_SPLIT,
    key_features,
    key_slopes,
    load_query_rows,
    query_features,
    query_slopes,
)


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
def head_base(H, SHARED, sb, sh):
    """Offset of this program's head in a tensor whose heads serve SHARED query heads each."""
    pair = tl.program_id(1)
    return (pair // H).to(tl.int64) * sb + (pair % H // SHARED).to(tl.int64) * sh


@triton.jit
def load_documents(SEGMENTS, H, start, step, T, C: tl.constexpr):
    """(document of each token, of the token before the chunk, of the chunk's last token)."""
    first = SEGMENTS + (tl.program_id(1) // H).to(tl.int64) * T
    own = tl.load(first + start + step, mask=start + step < T, other=-1)
    before = tl.load(first + tl.maximum(start - 1, 0))
    return own, before, tl.load(first + tl.minimum(start + C, T) - 1)


@triton.jit
def value_slopes(DO, OUT, DEN, do_base, o_base, sdo, so, start, step, T, col, V, eps):
    """(d numerator, d denominator) of a chunk: G / (D + eps) and -<G, o> / (D + eps)."""
    g = load_chunk(DO, do_base, sdo, start, step, T, col, V).to(tl.float32)
    o = load_chunk(OUT, o_base, so, start, step, T, col, V).to(tl.float32)
    den = tl.load(DEN + tl.program_id(1).to(tl.int64) * T + start + step, mask=start + step < T, other=1.0)
    inverse = 1.0 / (den + tl.cast(eps, tl.float32))
    return g * inverse[:, None], -tl.sum(g * o, 1) * inverse


@triton.jit
def read_and_extend(
    a, b, y, s, z, here, keep, NORMALIZED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(a s, a z, a b^T) and the state after the chunk: keep s + b^T y, keep z + sum of b, over the rows
    `here`. One half of the features at a time, so that only one is in registers; without NORMALIZED no z.
    """
    read = tl.dot(a, s.to(a.dtype), input_precision=PRECISION)
    weight = z
    if NORMALIZED:
        weight = tl.sum(a.to(tl.float32) * z[None, :], 1)
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if PACKED:
        s *= keep
        if NORMALIZED:
            z *= keep
        b = tl.where(here[:, None], b, tl.zeros_like(b))
    s += tl.dot(tl.trans(b), y, input_precision=PRECISION)
    if NORMALIZED:
        z += tl.sum(b.to(tl.float32), 0)
    return read, weight, scores, s, z


@triton.jit
def slope_and_extend(
    w, f, x, c, y, e, s, z, here, keep, PACKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """w f + x s^T + c z^T and the state after the chunk: keep s + f^T y, keep z + f^T e, over the rows
    `here`.

    keep is 0 or 1; a select in its place breaks Triton's accumulator passes for sm_100.
    """
    slope = tl.dot(w, f, input_precision=PRECISION) + c[:, None] * z[None, :]
    slope += tl.dot(x, tl.trans(s.to(x.dtype)), input_precision=PRECISION)
    if PACKED:
        s *= keep
        z *= keep
        f = tl.where(here[:, None], f, tl.zeros_like(f))
    s += tl.dot(tl.trans(f), y, input_precision=PRECISION)
    z += tl.sum(f.to(tl.float32) * e[:, None], 0)
    return slope, s, z


@triton.jit
def attend(
    Q, K, V, POWER, TOP, SEGMENTS, S0, Z0, OUT, DEN, S1, Z1, H, SHARED, T, NK, NV,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot, eps, floor,
    MAP: tl.constexpr, PACKED: tl.constexpr, HAS_FLOOR: tl.constexpr, HAS_INITIAL: tl.constexpr,
    FINAL: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o = (tril(Q K^T) V + Q S) / (tril(Q K^T) 1 + Q z + eps), chunk by chunk, for one tile of the values."""
    floor = tl.cast(floor, tl.float32)
    feature = tl.arange(0, BK)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    step = tl.arange(0, C)
    causal = step[:, None] >= step[None, :]
    pair = tl.program_id(1).to(tl.int64)
    owner = pair // SHARED  # query heads with one key head have one state
    features = NK
    if MAP == RELU_SPLIT:
        features = 2 * NK
    if HAS_FLOOR:
        features += 1
    first_row = owner * features
    at_state = feature[:, None] * NV + value[None, :]
    in_state = (feature < NK)[:, None] & (value < NV)[None, :]
    sa = tl.zeros([BK, BV], tl.float32)
    za = tl.zeros([BK], tl.float32)
    sb = tl.zeros([BK, BV], tl.float32)
    zb = tl.zeros([BK], tl.float32)
    total = tl.zeros([BV], tl.float32)
    count = tl.full([], 0.0, tl.float32)
    if HAS_INITIAL:
        sa += tl.load(S0 + first_row * NV + at_state, mask=in_state, other=0.0)
        za += tl.load(Z0 + first_row + feature, mask=feature < NK, other=0.0)
        if MAP == RELU_SPLIT:
            sb += tl.load(S0 + (first_row + NK) * NV + at_state, mask=in_state, other=0.0)
            zb += tl.load(Z0 + first_row + NK + feature, mask=feature < NK, other=0.0)
        if HAS_FLOOR:
            last_row = first_row + features - 1
            total += tl.load(S0 + last_row * NV + value, mask=value < NV, other=0.0)
            count += tl.load(Z0 + last_row)
    q_base, o_base = head_base(H, 1, qb, qh), head_base(H, 1, ob, oh)
    k_base, v_base = head_base(H, SHARED, kb, kh), head_base(H, SHARED, vb, vh)
    for start in range(0, T, C):
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        v = load_chunk(V, v_base, vt, start, step, T, value, NV)
        power, top = load_query_rows(POWER, TOP, pair * T + start, step, T - start, MAP)
        if MAP == RELU_SPLIT:
            top = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
        reach = causal
        here = start + step < T
        carried = here
        keep = tl.full([], 1.0, tl.float32)
        if PACKED:
            own, before, last = load_documents(SEGMENTS, H, start, step, T, C)
            reach = causal & (own[:, None] == own[None, :])
            here = own == last
            carried = own == before
            keep = (before == last).to(tl.float32)
        phi_q, phi_k = query_features(q, power, top, MAP, 0), key_features(k, MAP, 0)
        out, den, scores, sa, za = read_and_extend(
            phi_q, phi_k, v, sa, za, here, keep, True, PACKED, PRECISION
        )
        if MAP == RELU_SPLIT:
            phi_q, phi_k = query_features(q, power, top, MAP, 1), key_features(k, MAP, 1)
            more, weight, products, sb, zb = read_and_extend(
                phi_q, phi_k, v, sb, zb, here, keep, True, PACKED, PRECISION
            )
            out += more
            den += weight
            scores += products
        if HAS_FLOOR:
            out += floor * total[None, :]
            den += floor * count
            scores += floor * floor
            if PACKED:
                total *= keep
                count *= keep
            total += floor * tl.sum(tl.where(here[:, None], v.to(tl.float32), 0.0), 0)
            count += floor * tl.sum(here.to(tl.float32), 0)
        if PACKED:
            out = tl.where(carried[:, None], out, 0.0)
            den = tl.where(carried, den, 0.0)
        scores = tl.where(reach, scores, 0.0)
        den += tl.sum(scores, 1)
        out += tl.dot(scores.to(v.dtype), v, input_precision=PRECISION)
        out /= (den + tl.cast(eps, tl.float32))[:, None]
        store_chunk(OUT, o_base, ot, start, step, T, value, NV, out)
        if tl.program_id(0) == 0:
            tl.store(DEN + pair * T + start + step, den, mask=start + step < T)
    if FINAL and tl.program_id(1) % SHARED == 0:
        tl.store(S1 + first_row * NV + at_state, sa, mask=in_state)
        if MAP == RELU_SPLIT:
            tl.store(S1 + (first_row + NK) * NV + at_state, sb, mask=in_state)
        if HAS_FLOOR:
            tl.store(S1 + (first_row + features - 1) * NV + value, total, mask=value < NV)
        if tl.program_id(0) == 0:
            tl.store(Z1 + first_row + feature, za, mask=feature < NK)
            if MAP == RELU_SPLIT:
                tl.store(Z1 + first_row + NK + feature, zb, mask=feature < NK)
            if HAS_FLOOR:
                tl.store(Z1 + first_row + features - 1, count)


@triton.jit
def attend_dq(
    DO, OUT, DEN, Q, K, V, POWER, TOP, SEGMENTS, S0, Z0, DQ, DPOWER, DTOP, H, SHARED, T, NK, NV,
    db, dh, dt, ob, oh, ot, qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, eps,
    MAP: tl.constexpr, PACKED: tl.constexpr, HAS_FLOOR: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """d phi_q = tril(dN V^T + dD 1^T) phi_k + dN S^T + dD z^T, forward over the chunks, and d q through the
    map, for one tile of the features; sums over a row are left in one part a tile."""
    feature = tl.program_id(0) * BK + tl.arange(0, BK)
    value = tl.arange(0, BV)
    step = tl.arange(0, C)
    ones = tl.full([C], 1.0, tl.float32)
    causal = step[:, None] >= step[None, :]
    pair = tl.program_id(1).to(tl.int64)
    sa = tl.zeros([BK, BV], tl.float32)
    za = tl.zeros([BK], tl.float32)
    sb = tl.zeros([BK, BV], tl.float32)
    zb = tl.zeros([BK], tl.float32)
    if HAS_INITIAL:
        features = NK
        if MAP == RELU_SPLIT:
            features = 2 * NK
        if HAS_FLOOR:
            features += 1
        first_row = pair // SHARED * features
        at_state = feature[:, None] * NV + value[None, :]
        in_state = (feature < NK)[:, None] & (value < NV)[None, :]
        sa += tl.load(S0 + first_row * NV + at_state, mask=in_state, other=0.0)
        za += tl.load(Z0 + first_row + feature, mask=feature < NK, other=0.0)
        if MAP == RELU_SPLIT:
            sb += tl.load(S0 + (first_row + NK) * NV + at_state, mask=in_state, other=0.0)
            zb += tl.load(Z0 + first_row + NK + feature, mask=feature < NK, other=0.0)
    d_base, o_base = head_base(H, 1, db, dh), head_base(H, 1, ob, oh)
    q_base, g_base = head_base(H, 1, qb, qh), head_base(H, 1, gb, gh)
    k_base, v_base = head_base(H, SHARED, kb, kh), head_base(H, SHARED, vb, vh)
    for start in range(0, T, C):
        dn, dd = value_slopes(DO, OUT, DEN, d_base, o_base, dt, ot, start, step, T, value, NV, eps)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        v = load_chunk(V, v_base, vt, start, step, T, value, NV)
        dn = dn.to(v.dtype)
        reach = causal
        here = start + step < T
        keep = tl.full([], 1.0, tl.float32)
        carried_dn = dn
        carried_dd = dd
        if PACKED:
            own, before, last = load_documents(SEGMENTS, H, start, step, T, C)
            reach = causal & (own[:, None] == own[None, :])
            here = own == last
            keep = (before == last).to(tl.float32)
            carried_dn = tl.where((own == before)[:, None], dn, tl.zeros_like(dn))
            carried_dd = tl.where(own == before, dd, 0.0)
        w = tl.where(reach, tl.dot(dn, tl.trans(v), input_precision=PRECISION) + dd[:, None], 0.0)
        w = w.to(k.dtype)
        first, sa, za = slope_and_extend(
            w,
            key_features(k, MAP, 0),
            carried_dn,
            carried_dd,
            v,
            ones,
            sa,
            za,
            here,
            keep,
            PACKED,
            PRECISION,
        )
        second = first
        if MAP == RELU_SPLIT:
            second, sb, zb = slope_and_extend(
                w, key_features(k, MAP, 1), carried_dn, carried_dd, v, ones, sb, zb, here, keep, PACKED,
                PRECISION,
            )  # fmt: skip
        power, top = load_query_rows(POWER, TOP, pair * T + start, step, T - start, MAP)
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        dq, dpower, dtop = query_slopes(q, power, top, first, second, MAP)
        store_chunk(DQ, g_base, gt, start, step, T, feature, NK, dq)
        if MAP == RELU_SPLIT:
            part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + pair) * T + start
            tl.store(DPOWER + part + step, dpower, mask=start + step < T)
            tl.store(DTOP + part + step, dtop, mask=start + step < T)


@triton.jit
def attend_dk(
    DO, OUT, DEN, Q, K, V, POWER, TOP, SEGMENTS, DK, H, SHARED, T, NK, NV,
    db, dh, dt, ob, oh, ot, qb, qh, qt, kb, kh, kt, vb, vh, vt, gb, gh, gt, eps,
    MAP: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """d phi_k = tril(dN V^T + dD 1^T)^T phi_q + V R^T + 1 r^T, backward over the chunks, and d k through the
    map, for one tile of the features."""
    feature = tl.program_id(0) * BK + tl.arange(0, BK)
    value = tl.arange(0, BV)
    step = tl.arange(0, C)
    ones = tl.full([C], 1.0, tl.float32)
    causal = step[:, None] >= step[None, :]
    pair = tl.program_id(1).to(tl.int64)
    ra = tl.zeros([BK, BV], tl.float32)
    za = tl.zeros([BK], tl.float32)
    rb = tl.zeros([BK, BV], tl.float32)
    zb = tl.zeros([BK], tl.float32)
    d_base, o_base = head_base(H, 1, db, dh), head_base(H, 1, ob, oh)
    q_base, g_base = head_base(H, 1, qb, qh), head_base(H, 1, gb, gh)
    k_base, v_base = head_base(H, SHARED, kb, kh), head_base(H, SHARED, vb, vh)
    chunks = tl.cdiv(T, C)
    for turn in range(0, chunks):
        start = (chunks - 1 - turn) * C
        dn, dd = value_slopes(DO, OUT, DEN, d_base, o_base, dt, ot, start, step, T, value, NV, eps)
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        v = load_chunk(V, v_base, vt, start, step, T, value, NV)
        power, top = load_query_rows(POWER, TOP, pair * T + start, step, T - start, MAP)
        dn = dn.to(v.dtype)
        reach = causal
        carried = start + step < T
        keep = tl.full([], 1.0, tl.float32)
        v_after = v
        after = ones
        if PACKED:
            own, before, last = load_documents(SEGMENTS, H, start, step, T, C)
            reach = causal & (own[:, None] == own[None, :])
            carried = own == before
            keep = (before == last).to(tl.float32)
            v_after = tl.where((own == last)[:, None], v, tl.zeros_like(v))
            after = tl.where(own == last, 1.0, 0.0)
        w = tl.where(reach, tl.dot(dn, tl.trans(v), input_precision=PRECISION) + dd[:, None], 0.0)
        w = tl.trans(w.to(q.dtype))
        phi_q = query_features(q, power, top, MAP, 0)
        first, ra, za = slope_and_extend(
            w, phi_q, v_after, after, dn, dd, ra, za, carried, keep, PACKED, PRECISION
        )
        second = first
        if MAP == RELU_SPLIT:
            phi_q = query_features(q, power, top, MAP, 1)
            second, rb, zb = slope_and_extend(
                w, phi_q, v_after, after, dn, dd, rb, zb, carried, keep, PACKED, PRECISION
            )
        store_chunk(DK, g_base, gt, start, step, T, feature, NK, key_slopes(k, first, second, MAP))


@triton.jit
def attend_dv(
    DO, DEN, Q, K, POWER, TOP, SEGMENTS, DV, H, SHARED, T, NK, NV,
    db, dh, dt, qb, qh, qt, kb, kh, kt, gb, gh, gt, eps, floor,
    MAP: tl.constexpr, PACKED: tl.constexpr, HAS_FLOOR: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv = tril(Q K^T)^T dN + K R, backward over the chunks, for one tile of the values."""
    floor = tl.cast(floor, tl.float32)
    feature = tl.arange(0, BK)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    step = tl.arange(0, C)
    later = step[:, None] <= step[None, :]
    pair = tl.program_id(1).to(tl.int64)
    ra = tl.zeros([BK, BV], tl.float32)
    rb = tl.zeros([BK, BV], tl.float32)
    total = tl.zeros([BV], tl.float32)
    d_base, g_base = head_base(H, 1, db, dh), head_base(H, 1, gb, gh)
    q_base, k_base = head_base(H, 1, qb, qh), head_base(H, SHARED, kb, kh)
    chunks = tl.cdiv(T, C)
    for turn in range(0, chunks):
        start = (chunks - 1 - turn) * C
        g = load_chunk(DO, d_base, dt, start, step, T, value, NV).to(tl.float32)
        den = tl.load(DEN + pair * T + start + step, mask=start + step < T, other=1.0)
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        power, top = load_query_rows(POWER, TOP, pair * T + start, step, T - start, MAP)
        if MAP == RELU_SPLIT:
            top = tl.maximum(tl.max(tl.abs(q.to(tl.float32)), 1), 1e-30)
        wide = g / (den + tl.cast(eps, tl.float32))[:, None]
        dn = wide.to(k.dtype)
        reach = later
        here = start + step < T
        carried = here
        keep = tl.full([], 1.0, tl.float32)
        if PACKED:
            own, before, last = load_documents(SEGMENTS, H, start, step, T, C)
            reach = later & (own[:, None] == own[None, :])
            here = own == last
            carried = own == before
            keep = (before == last).to(tl.float32)
        phi_q, phi_k = query_features(q, power, top, MAP, 0), key_features(k, MAP, 0)
        dv, _, scores, ra, _ = read_and_extend(
            phi_k, phi_q, dn, ra, step, carried, keep, False, PACKED, PRECISION
        )
        if MAP == RELU_SPLIT:
            phi_q, phi_k = query_features(q, power, top, MAP, 1), key_features(k, MAP, 1)
            more, _, products, rb, _ = read_and_extend(
                phi_k, phi_q, dn, rb, step, carried, keep, False, PACKED, PRECISION
            )
            dv += more
            scores += products
        if HAS_FLOOR:
            dv += total[None, :]
            scores += floor * floor
            if PACKED:
                total *= keep
                wide = tl.where(carried[:, None], wide, 0.0)
            total += floor * floor * tl.sum(wide, 0)
        if PACKED:
            dv = tl.where(here[:, None], dv, 0.0)
        scores = tl.where(reach, scores, 0.0)  # of keys by queries here
        dv += tl.dot(scores.to(k.dtype), dn, input_precision=PRECISION)
        store_chunk(DV, g_base, gt, start, step, T, value, NV, dv)
