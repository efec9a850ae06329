"""Triton kernels of the norm family for rows too long for one tile: two passes over the columns, the second
served by L2."""

import triton
import triton.language as tl

from .norms_kernels import CRMS, LAYER, RMS, load_gain


@triton.jit
def stored_sum(X, RES, S, at_x, at_res, mask, res_scale, ADD_BEFORE: tl.constexpr, ACC: tl.constexpr):
    """x (+ res_scale * residual), rounded to the dtype of S. Pass two computes it again: reading S back would
    need a barrier."""
    x = tl.load(X + at_x, mask=mask, other=0.0).to(ACC)
    if ADD_BEFORE:
        x += tl.cast(res_scale, ACC) * tl.load(RES + at_res, mask=mask, other=0.0).to(ACC)
        x = x.to(S.dtype.element_ty).to(ACC)
    return x


@triton.jit
def norm_forward_wide(
    X, RES, W, B, Y, S, SHIFT, RSTD, N, NP, sx, sr, sy, ss, eps, scale, res_scale,
    KIND: tl.constexpr, ADD_BEFORE: tl.constexpr, ADD_AFTER: tl.constexpr, HAS_W: tl.constexpr, HAS_B:
    tl.constexpr, ZERO_CENTERED: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row per program. LayerNorm merges the chunks' means and squared deviations (Chan), never E[x^2] -
    mean^2."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([1], ACC)
    squares = tl.zeros([1], ACC)
    seen = tl.zeros([1], ACC)
    for start in range(0, NP, BN):
        col = start + tl.arange(0, BN)
        reach = col < NP
        x = stored_sum(X, RES, S, row * sx + col, row * sr + col, reach, res_scale, ADD_BEFORE, ACC)
        x = tl.where(col < N, x, 0.0)
        if ADD_BEFORE:
            tl.store(S + row * ss + col, x.to(S.dtype.element_ty), mask=reach)
        chunk_total = tl.sum(x, 0)
        if KIND == LAYER:
            count = tl.minimum(N - start, BN).to(ACC)
            mean = chunk_total / count
            centered = tl.where(col < N, x - mean, 0.0)
            gap = mean - total / tl.maximum(seen, 1.0)
            squares += tl.sum(centered * centered, 0) + gap * gap * seen * count / (seen + count)
            seen += count
        else:
            squares += tl.sum(x * x, 0)
        total += chunk_total
    shift = total
    if KIND == LAYER:
        shift = total / N
        variance = squares / N
    elif KIND == CRMS:
        variance = (squares + total * total) / (N + 1)
    else:
        variance = squares / N
    rstd = tl.rsqrt(variance + tl.cast(eps, ACC))
    tl.store(RSTD + row + tl.arange(0, 1), rstd)
    if KIND != RMS:
        tl.store(SHIFT + row + tl.arange(0, 1), shift)
    for start in range(0, NP, BN):
        col = start + tl.arange(0, BN)
        reach = col < NP
        y = stored_sum(X, RES, S, row * sx + col, row * sr + col, reach, res_scale, ADD_BEFORE, ACC)
        if KIND == LAYER:
            y -= shift
        y *= rstd
        if ROUND:
            if ADD_BEFORE:
                y = y.to(S.dtype.element_ty).to(ACC)
            else:
                y = y.to(X.dtype.element_ty).to(ACC)
        y *= load_gain(W, col, col < N, scale, HAS_W, ZERO_CENTERED, ACC)
        if HAS_B:
            y += tl.load(B + col, mask=col < N, other=0.0).to(ACC) * tl.cast(scale, ACC)
        if ADD_AFTER:
            y += tl.cast(res_scale, ACC) * tl.load(RES + row * sr + col, mask=reach, other=0.0).to(ACC)
        tl.store(Y + row * sy + col, tl.where(col < N, y, 0.0).to(Y.dtype.element_ty), mask=reach)


@triton.jit
def norm_backward_wide(
    DY, DS, X, W, SHIFT, RSTD, DX, DRES, DW, DB, M, N, NP, sdy, sds, sx, sdx, scale, res_scale,
    KIND: tl.constexpr, HAS_DS: tl.constexpr, SPLIT_RES: tl.constexpr, HAS_W: tl.constexpr, HAS_B:
    tl.constexpr, ZERO_CENTERED: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Programs walk the rows in strides; each adds its share of d gamma, d beta into its own row of DW, DB
    (zeroed by the caller)."""
    program = tl.program_id(0)
    for tile in range(program, M, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64)
        rstd = tl.load(RSTD + row)
        shift = rstd * 0.0
        if KIND != RMS:
            shift = tl.load(SHIFT + row)
        along = tl.zeros([BN], ACC)
        mean = tl.zeros([BN], ACC)
        for start in range(0, NP, BN):
            col = start + tl.arange(0, BN)
            x = tl.load(X + row * sx + col, mask=col < NP, other=0.0).to(ACC)
            g = tl.load(DY + row * sdy + col, mask=col < NP, other=0.0).to(ACC)
            if KIND == LAYER:
                x -= shift
            g *= load_gain(W, col, col < N, scale, HAS_W, ZERO_CENTERED, ACC)
            along += tl.where(col < N, x * g, 0.0)
            mean += tl.where(col < N, g, 0.0)
        if KIND == CRMS:
            slope = tl.sum(along, 0) * rstd / (N + 1)
        else:
            slope = tl.sum(along, 0) * rstd / N
        offset = tl.sum(mean, 0) / N
        for start in range(0, NP, BN):
            col = start + tl.arange(0, BN)
            reach = col < NP
            x = tl.load(X + row * sx + col, mask=reach, other=0.0).to(ACC)
            dy = tl.load(DY + row * sdy + col, mask=reach, other=0.0).to(ACC)
            if KIND == LAYER:
                x -= shift
            xhat = x * rstd
            dx = dy * load_gain(W, col, col < N, scale, HAS_W, ZERO_CENTERED, ACC)
            if KIND == LAYER:
                dx -= xhat * slope + offset
            elif KIND == CRMS:
                dx -= (xhat + shift * rstd) * slope
            else:
                dx -= xhat * slope
            dx *= rstd
            if HAS_DS:
                dx += tl.load(DS + row * sds + col, mask=reach, other=0.0).to(ACC)
            dx = tl.where(col < N, dx, 0.0)
            tl.store(DX + row * sdx + col, dx.to(DX.dtype.element_ty), mask=reach)
            if SPLIT_RES:
                tl.store(
                    DRES + row * sdx + col,
                    (dx * tl.cast(res_scale, ACC)).to(DRES.dtype.element_ty),
                    mask=reach,
                )
            at_partial = program.to(tl.int64) * N + col
            if HAS_W:
                if ROUND:
                    xhat = xhat.to(X.dtype.element_ty).to(ACC)
                share = tl.load(DW + at_partial, mask=col < N, other=0.0) + dy * xhat * tl.cast(scale, ACC)
                tl.store(DW + at_partial, share, mask=col < N)
            if HAS_B:
                share = tl.load(DB + at_partial, mask=col < N, other=0.0) + dy * tl.cast(scale, ACC)
                tl.store(DB + at_partial, share, mask=col < N)
