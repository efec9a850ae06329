"""Triton kernels of the norm family: rows that fit one tile. `norms_wide.py` splits longer rows,
`norms_launch.py` launches.

KIND is 0 for RMSNorm, 1 for LayerNorm, 2 for CRMSNorm. SHIFT holds the row mean (LayerNorm) or the row sum
(CRMSNorm). Everything is computed in ACC (float32; float64 for float64 rows). NP >= N is the width up to
which rows may be read: a mask on a multiple of 16 keeps 128-bit loads where N itself is odd.
"""

import triton
import triton.language as tl

RMS = tl.constexpr(0)
LAYER = tl.constexpr(1)
CRMS = tl.constexpr(2)


@triton.jit
def load_gain(W, col, inside, scale, HAS_W: tl.constexpr, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr):
    """scale * gamma, or scale * (1 + gamma) where the gain is stored around zero."""
    if HAS_W:
        gain = tl.load(W + col, mask=inside, other=0.0).to(ACC)
        if ZERO_CENTERED:
            gain += 1.0
    else:
        gain = tl.where(inside, 1.0, 0.0).to(ACC)
    return gain * tl.cast(scale, ACC)


@triton.jit
def normalize(x, shift, rstd, inside, KIND: tl.constexpr):
    if KIND == LAYER:
        return tl.where(inside, x - shift, 0.0) * rstd
    else:
        return x * rstd


@triton.jit
def norm_forward(
    X, RES, W, B, Y, S, SHIFT, RSTD, M, N, NP, sx, sr, sy, ss, eps, scale, res_scale,
    KIND: tl.constexpr, ADD_BEFORE: tl.constexpr, ADD_AFTER: tl.constexpr, HAS_W: tl.constexpr, HAS_B:
    tl.constexpr, ZERO_CENTERED: tl.constexpr, ROUND: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows per program: y = gain * normalized(s) (+ res_scale * residual after it), s = x (+ res_scale *
    residual before it)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.arange(0, BN)
    live = row < M
    reach = live[:, None] & (col < NP)[None, :]
    inside = live[:, None] & (col < N)[None, :]
    at = row[:, None]
    x = tl.load(X + at * sx + col[None, :], mask=reach, other=0.0).to(ACC)
    if ADD_BEFORE:
        x += tl.cast(res_scale, ACC) * tl.load(RES + at * sr + col[None, :], mask=reach, other=0.0).to(ACC)
    if PADDED:
        x = tl.where(inside, x, 0.0)
    if ADD_BEFORE:
        # The statistics are those of the stored sum, which is what backward will read.
        s = x.to(S.dtype.element_ty)
        tl.store(S + at * ss + col[None, :], s, mask=reach)
        x = s.to(ACC)
    shift = tl.zeros([BM], ACC)
    if KIND == LAYER:
        shift = tl.sum(x, 1) / N
        centered = tl.where(inside, x - shift[:, None], 0.0)
        variance = tl.sum(centered * centered, 1) / N
    elif KIND == CRMS:
        shift = tl.sum(x, 1)
        variance = (tl.sum(x * x, 1) + shift * shift) / (N + 1)
    else:
        variance = tl.sum(x * x, 1) / N
    rstd = tl.rsqrt(variance + tl.cast(eps, ACC))
    tl.store(RSTD + row, rstd, mask=live)
    if KIND != RMS:
        tl.store(SHIFT + row, shift, mask=live)
    y = normalize(x, shift[:, None], rstd[:, None], inside, KIND)
    if ROUND:
        if ADD_BEFORE:
            y = y.to(S.dtype.element_ty).to(ACC)
        else:
            y = y.to(X.dtype.element_ty).to(ACC)
    y *= load_gain(W, col, col < N, scale, HAS_W, ZERO_CENTERED, ACC)[None, :]
    if HAS_B:
        y += (tl.load(B + col, mask=col < N, other=0.0).to(ACC) * tl.cast(scale, ACC))[None, :]
    if ADD_AFTER:
        y += tl.cast(res_scale, ACC) * tl.load(RES + at * sr + col[None, :], mask=reach, other=0.0).to(ACC)
    if PADDED:
        y = tl.where(inside, y, 0.0)
    tl.store(Y + at * sy + col[None, :], y.to(Y.dtype.element_ty), mask=reach)


@triton.jit
def norm_backward(
    DY, DS, X, W, SHIFT, RSTD, DX, DRES, DW, DB, M, N, NP, sdy, sds, sx, sdx, scale, res_scale,
    KIND: tl.constexpr, HAS_DS: tl.constexpr, SPLIT_RES: tl.constexpr, HAS_W: tl.constexpr, HAS_B:
    tl.constexpr, ZERO_CENTERED: tl.constexpr, ROUND: tl.constexpr, PADDED: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A fixed number of programs walk the rows in strides; each keeps its share of d gamma, d beta in
    registers, one row of DW, DB."""
    program = tl.program_id(0)
    col = tl.arange(0, BN)
    gain = load_gain(W, col, col < N, scale, HAS_W, ZERO_CENTERED, ACC)
    dw = tl.zeros([BN], ACC)
    db = tl.zeros([BN], ACC)
    for tile in tl.range(program, tl.cdiv(M, BM), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BM + tl.arange(0, BM)
        live = row < M
        reach = live[:, None] & (col < NP)[None, :]
        inside = live[:, None] & (col < N)[None, :]
        at = row[:, None]
        x = tl.load(X + at * sx + col[None, :], mask=reach, other=0.0).to(ACC)
        dy = tl.load(DY + at * sdy + col[None, :], mask=reach, other=0.0).to(ACC)
        if PADDED:
            x = tl.where(inside, x, 0.0)
            dy = tl.where(inside, dy, 0.0)
        rstd = tl.load(RSTD + row, mask=live, other=0.0)
        shift = tl.zeros([BM], ACC)
        if KIND != RMS:
            shift = tl.load(SHIFT + row, mask=live, other=0.0)
        xhat = normalize(x, shift[:, None], rstd[:, None], inside, KIND)
        g = dy * gain[None, :]
        if KIND == LAYER:
            dx = g - xhat * (tl.sum(xhat * g, 1) / N)[:, None] - (tl.sum(g, 1) / N)[:, None]
        elif KIND == CRMS:
            dx = g - (xhat + (shift * rstd)[:, None]) * (tl.sum(xhat * g, 1) / (N + 1))[:, None]
        else:
            dx = g - xhat * (tl.sum(xhat * g, 1) / N)[:, None]
        dx *= rstd[:, None]
        if HAS_DS:
            dx += tl.load(DS + at * sds + col[None, :], mask=reach, other=0.0).to(ACC)
        if PADDED:
            dx = tl.where(inside, dx, 0.0)
        tl.store(DX + at * sdx + col[None, :], dx.to(DX.dtype.element_ty), mask=reach)
        if SPLIT_RES:
            tl.store(
                DRES + at * sdx + col[None, :],
                (dx * tl.cast(res_scale, ACC)).to(DRES.dtype.element_ty),
                mask=reach,
            )
        if HAS_W:
            if ROUND:
                xhat = xhat.to(X.dtype.element_ty).to(ACC)
            dw += tl.sum(dy * xhat, 0)
        if HAS_B:
            db += tl.sum(dy, 0)
    at_partial = program.to(tl.int64) * N + col
    if HAS_W:
        tl.store(DW + at_partial, dw * tl.cast(scale, ACC), mask=col < N)
    if HAS_B:
        tl.store(DB + at_partial, db * tl.cast(scale, ACC), mask=col < N)


@triton.jit
def column_sum(PARTIAL, OUT, P, N, BP: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """out[j] = sum of PARTIAL[:, j], in a fixed order: the last stage of d gamma and d beta."""
    col = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], ACC)
    for start in range(0, P, BP):
        row = start + tl.arange(0, BP)
        mask = (row < P)[:, None] & (col < N)[None, :]
        total += tl.sum(
            tl.load(PARTIAL + row.to(tl.int64)[:, None] * N + col[None, :], mask=mask, other=0.0), 0
        )
    tl.store(OUT + col, total.to(OUT.dtype.element_ty), mask=col < N)
