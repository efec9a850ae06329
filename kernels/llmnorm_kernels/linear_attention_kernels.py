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
def inner_scores(qa, qb, ka, kb, reach, floor, MAP: tl.constexpr, PRECISION: tl.constexpr):
    """phi_q phi_k^T where `reach` allows it."""
    scores = tl.dot(qa, tl.trans(ka), input_precision=PRECISION)
    if MAP == RELU_SPLIT:
        scores += tl.dot(qb, tl.trans(kb), input_precision=PRECISION)
    return tl.where(reach, scores + floor * floor, 0.0)


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
    at_state = owner * features * NV + feature.to(tl.int64)[:, None] * NV + value[None, :]
    at_z = owner * features + feature
    in_state = (feature < NK)[:, None] & (value < NV)[None, :]
    sa = tl.zeros([BK, BV], tl.float32)
    za = tl.zeros([BK], tl.float32)
    sb = tl.zeros([BK, BV], tl.float32)
    zb = tl.zeros([BK], tl.float32)
    total = tl.zeros([BV], tl.float32)
    count = tl.full([], 0.0, tl.float32)
    if HAS_INITIAL:
        sa += tl.load(S0 + at_state, mask=in_state, other=0.0)
        za += tl.load(Z0 + at_z, mask=feature < NK, other=0.0)
        if MAP == RELU_SPLIT:
            sb += tl.load(S0 + at_state + NK * NV, mask=in_state, other=0.0)
            zb += tl.load(Z0 + at_z + NK, mask=feature < NK, other=0.0)
        if HAS_FLOOR:
            last_row = owner * features + features - 1
            total += tl.load(S0 + last_row * NV + value, mask=value < NV, other=0.0)
            count += tl.load(Z0 + last_row)
    q_base, o_base = head_base(H, 1, qb, qh), head_base(H, 1, ob, oh)
    k_base, v_base = head_base(H, SHARED, kb, kh), head_base(H, SHARED, vb, vh)
    for start in range(0, T, C):
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        v = load_chunk(V, v_base, vt, start, step, T, value, NV)
        power, top = load_query_rows(POWER, TOP, pair * T + start, step, T - start, MAP)
        qa, qb_ = query_features(q, power, top, MAP)
        ka, kb_ = key_features(k, MAP)
        out = tl.dot(qa, sa.to(q.dtype), input_precision=PRECISION)
        den = tl.sum(qa.to(tl.float32) * za[None, :], 1)
        if MAP == RELU_SPLIT:
            out += tl.dot(qb_, sb.to(q.dtype), input_precision=PRECISION)
            den += tl.sum(qb_.to(tl.float32) * zb[None, :], 1)
        if HAS_FLOOR:
            out += floor * total[None, :]
            den += floor * count
        reach = causal
        here = start + step < T
        if PACKED:
            own, before, last = load_documents(SEGMENTS, H, start, step, T, C)
            reach = causal & (own[:, None] == own[None, :])
            out = tl.where((own == before)[:, None], out, 0.0)
            den = tl.where(own == before, den, 0.0)
            here = own == last
        scores = inner_scores(qa, qb_, ka, kb_, reach, floor, MAP, PRECISION)
        den += tl.sum(scores, 1)
        out += tl.dot(scores.to(v.dtype), v, input_precision=PRECISION)
        store_chunk(
            OUT, o_base, ot, start, step, T, value, NV, out / (den + tl.cast(eps, tl.float32))[:, None]
        )
        if tl.program_id(0) == 0:
            tl.store(DEN + pair * T + start + step, den, mask=start + step < T)
        if PACKED:
            passes = before == last
            sa = tl.where(passes, sa, 0.0)
            za = tl.where(passes, za, 0.0)
            sb = tl.where(passes, sb, 0.0)
            zb = tl.where(passes, zb, 0.0)
            total = tl.where(passes, total, 0.0)
            count = tl.where(passes, count, 0.0)
            ka = tl.where(here[:, None], ka, tl.zeros_like(ka))
            kb_ = tl.where(here[:, None], kb_, tl.zeros_like(kb_))
        sa += tl.dot(tl.trans(ka), v, input_precision=PRECISION)
        za += tl.sum(ka.to(tl.float32), 0)
        if MAP == RELU_SPLIT:
            sb += tl.dot(tl.trans(kb_), v, input_precision=PRECISION)
            zb += tl.sum(kb_.to(tl.float32), 0)
        if HAS_FLOOR:
            total += floor * tl.sum(tl.where(here[:, None], v.to(tl.float32), 0.0), 0)
            count += floor * tl.sum(here.to(tl.float32), 0)
    if FINAL and tl.program_id(1) % SHARED == 0:
        tl.store(S1 + at_state, sa, mask=in_state)
        if MAP == RELU_SPLIT:
            tl.store(S1 + at_state + NK * NV, sb, mask=in_state)
        if HAS_FLOOR:
            tl.store(S1 + (owner * features + features - 1) * NV + value, total, mask=value < NV)
        if tl.program_id(0) == 0:
            tl.store(Z1 + at_z, za, mask=feature < NK)
            if MAP == RELU_SPLIT:
                tl.store(Z1 + at_z + NK, zb, mask=feature < NK)
            if HAS_FLOOR:
                tl.store(Z1 + owner * features + features - 1, count)


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
        at_state = first_row * NV + feature.to(tl.int64)[:, None] * NV + value[None, :]
        in_state = (feature < NK)[:, None] & (value < NV)[None, :]
        sa += tl.load(S0 + at_state, mask=in_state, other=0.0)
        za += tl.load(Z0 + first_row + feature, mask=feature < NK, other=0.0)
        if MAP == RELU_SPLIT:
            sb += tl.load(S0 + at_state + NK * NV, mask=in_state, other=0.0)
            zb += tl.load(Z0 + first_row + NK + feature, mask=feature < NK, other=0.0)
    d_base, o_base = head_base(H, 1, db, dh), head_base(H, 1, ob, oh)
    q_base, g_base = head_base(H, 1, qb, qh), head_base(H, 1, gb, gh)
    k_base, v_base = head_base(H, SHARED, kb, kh), head_base(H, SHARED, vb, vh)
    for start in range(0, T, C):
        dn, dd = value_slopes(DO, OUT, DEN, d_base, o_base, dt, ot, start, step, T, value, NV, eps)
        k = load_chunk(K, k_base, kt, start, step, T, feature, NK)
        v = load_chunk(V, v_base, vt, start, step, T, value, NV)
        ka, kb_ = key_features(k, MAP)
        dn = dn.to(v.dtype)
        dd_before = dd
        dn_before = dn
        reach = causal
        if PACKED:
            own, before, last = load_documents(SEGMENTS, H, start, step, T, C)
            reach = causal & (own[:, None] == own[None, :])
            dd_before = tl.where(own == before, dd, 0.0)
            dn_before = tl.where((own == before)[:, None], dn, tl.zeros_like(dn))
        w = tl.where(reach, tl.dot(dn, tl.trans(v), input_precision=PRECISION) + dd[:, None], 0.0)
        w = w.to(k.dtype)
        da = tl.dot(w, ka, input_precision=PRECISION) + dd_before[:, None] * za[None, :]
        da += tl.dot(dn_before, tl.trans(sa.to(v.dtype)), input_precision=PRECISION)
        d_second = da
        if MAP == RELU_SPLIT:
            d_second = tl.dot(w, kb_, input_precision=PRECISION) + dd_before[:, None] * zb[None, :]
            d_second += tl.dot(dn_before, tl.trans(sb.to(v.dtype)), input_precision=PRECISION)
        power, top = load_query_rows(POWER, TOP, pair * T + start, step, T - start, MAP)
        q = load_chunk(Q, q_base, qt, start, step, T, feature, NK)
        dq, dpower, dtop = query_slopes(q, power, top, da, d_second, MAP)
        store_chunk(DQ, g_base, gt, start, step, T, feature, NK, dq)
        if MAP == RELU_SPLIT:
            part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + pair) * T + start
            tl.store(DPOWER + part + step, dpower, mask=start + step < T)
            tl.store(DTOP + part + step, dtop, mask=start + step < T)
        if PACKED:
            passes = before == last
            sa = tl.where(passes, sa, 0.0)
            za = tl.where(passes, za, 0.0)
            sb = tl.where(passes, sb, 0.0)
            zb = tl.where(passes, zb, 0.0)
            here = (own == last)[:, None]
            ka = tl.where(here, ka, tl.zeros_like(ka))
            kb_ = tl.where(here, kb_, tl.zeros_like(kb_))
        sa += tl.dot(tl.trans(ka), v, input_precision=PRECISION)
        za += tl.sum(ka.to(tl.float32), 0)
        if MAP == RELU_SPLIT:
            sb += tl.dot(tl.trans(kb_), v, input_precision=PRECISION)
            zb += tl.sum(kb_.to(tl.float32), 0)


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
        qa, qb_ = query_features(q, power, top, MAP)
        dn = dn.to(v.dtype)
        reach = causal
        v_after = v
        ones = tl.full([C], 1.0, tl.float32)
        if PACKED:
            own, before, last = load_documents(SEGMENTS, H, start, step, T, C)
            reach = causal & (own[:, None] == own[None, :])
            v_after = tl.where((own == last)[:, None], v, tl.zeros_like(v))
            ones = (own == last).to(tl.float32)
        w = tl.where(reach, tl.dot(dn, tl.trans(v), input_precision=PRECISION) + dd[:, None], 0.0)
        w = tl.trans(w.to(q.dtype))
        da = tl.dot(w, qa, input_precision=PRECISION) + ones[:, None] * za[None, :]
        da += tl.dot(v_after, tl.trans(ra.to(v.dtype)), input_precision=PRECISION)
        d_second = da
        if MAP == RELU_SPLIT:
            d_second = tl.dot(w, qb_, input_precision=PRECISION) + ones[:, None] * zb[None, :]
            d_second += tl.dot(v_after, tl.trans(rb.to(v.dtype)), input_precision=PRECISION)
        store_chunk(DK, g_base, gt, start, step, T, feature, NK, key_slopes(k, da, d_second, MAP))
        if PACKED:
            passes = before == last
            ra = tl.where(passes, ra, 0.0)
            za = tl.where(passes, za, 0.0)
            rb = tl.where(passes, rb, 0.0)
            zb = tl.where(passes, zb, 0.0)
            from_before = (own == before)[:, None]
            qa = tl.where(from_before, qa, tl.zeros_like(qa))
            qb_ = tl.where(from_before, qb_, tl.zeros_like(qb_))
        ra += tl.dot(tl.trans(qa), dn, input_precision=PRECISION)
        za += tl.sum(qa.to(tl.float32) * dd[:, None], 0)
        if MAP == RELU_SPLIT:
            rb += tl.dot(tl.trans(qb_), dn, input_precision=PRECISION)
            zb += tl.sum(qb_.to(tl.float32) * dd[:, None], 0)


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
    causal = step[:, None] >= step[None, :]
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
        qa, qb_ = query_features(q, power, top, MAP)
        ka, kb_ = key_features(k, MAP)
        wide = g / (den + tl.cast(eps, tl.float32))[:, None]
        dn = wide.to(k.dtype)
        after = tl.dot(ka, ra.to(k.dtype), input_precision=PRECISION)
        if MAP == RELU_SPLIT:
            after += tl.dot(kb_, rb.to(k.dtype), input_precision=PRECISION)
        if HAS_FLOOR:
            after += total[None, :]
        reach = causal
        if PACKED:
            own, before, last = load_documents(SEGMENTS, H, start, step, T, C)
            reach = causal & (own[:, None] == own[None, :])
            after = tl.where((own == last)[:, None], after, 0.0)
        scores = inner_scores(qa, qb_, ka, kb_, reach, floor, MAP, PRECISION)
        dv = after + tl.dot(tl.trans(scores.to(k.dtype)), dn, input_precision=PRECISION)
        store_chunk(DV, g_base, gt, start, step, T, value, NV, dv)
        if PACKED:
            passes = before == last
            ra = tl.where(passes, ra, 0.0)
            rb = tl.where(passes, rb, 0.0)
            total = tl.where(passes, total, 0.0)
            from_before = (own == before)[:, None]
            qa = tl.where(from_before, qa, tl.zeros_like(qa))
            qb_ = tl.where(from_before, qb_, tl.zeros_like(qb_))
            wide = tl.where(from_before, wide, 0.0)
        ra += tl.dot(tl.trans(qa), dn, input_precision=PRECISION)
        if MAP == RELU_SPLIT:
            rb += tl.dot(tl.trans(qb_), dn, input_precision=PRECISION)
        if HAS_FLOOR:
            total += floor * floor * tl.sum(wide, 0)
