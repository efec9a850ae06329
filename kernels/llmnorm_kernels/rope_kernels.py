"""Triton kernels of rotary embeddings, alone and after the RMSNorm of each head, and their launchers.

A tensor (batch, heads, time, dim) of any strides is a list of rows of `dim` numbers, heads fastest. Programs
below the boundary work on the queries, the others on the keys, so that one launch serves both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import accumulator, multiprocessors, on_device
from .norms_kernels import column_sum
from .norms_launch import TRITON_DTYPE
from .rope import empty_heads_like

# Elements of one half of a head that a thread holds: one 128-bit load of 16-bit data.
PER_THREAD = 8
# Programs per multiprocessor of the backward, by warps.
PROGRAMS = {2: 10, 4: 5}


@triton.jit
def row_address(row, H, T, sb, sh, st):
    """(offset of a row in the tensor, its batch, its time)."""
    head = row % H
    time = (row // H) % T
    batch = row // (H * T)
    return batch * sb + head * sh + time * st, batch, time


@triton.jit
def load_angles(
    COS, SIN, batch, time, half, live, HALF, scb, sct, ssb, sst, SIGN: tl.constexpr, ACC: tl.constexpr
):
    inside = live[:, None] & (half < HALF)[None, :]
    cos = tl.load(COS + (batch * scb + time * sct)[:, None] + half[None, :], mask=inside, other=0.0).to(ACC)
    sin = tl.load(SIN + (batch * ssb + time * sst)[:, None] + half[None, :], mask=inside, other=0.0).to(ACC)
    return cos, sin * SIGN


@triton.jit
def rotate_rows(
    X, OUT, COS, SIN, program, rows, H, T, HALF, sb, sh, st, ob, oh, ot, scb, sct, ssb, sst,
    SIGN: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, BLOCK)
    live = row < rows
    inside = live[:, None] & (half < HALF)[None, :]
    at, batch, time = row_address(row, H, T, sb, sh, st)
    to, batch, time = row_address(row, H, T, ob, oh, ot)
    cos, sin = load_angles(COS, SIN, batch, time, half, live, HALF, scb, sct, ssb, sst, SIGN, ACC)
    first = tl.load(X + at[:, None] + half[None, :], mask=inside, other=0.0).to(ACC)
    second = tl.load(X + at[:, None] + HALF + half[None, :], mask=inside, other=0.0).to(ACC)
    dtype = OUT.dtype.element_ty
    tl.store(OUT + to[:, None] + half[None, :], (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(OUT + to[:, None] + HALF + half[None, :], (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def rope(
    Q, K, OQ, OK, COS, SIN, q_programs, q_rows, k_rows, HQ, HK, T, HALF,
    qb, qh, qt, kb, kh, kt, oqb, oqh, oqt, okb, okh, okt, scb, sct, ssb, sst,
    SIGN: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        rotate_rows(
            Q, OQ, COS, SIN, program, q_rows, HQ, T, HALF, qb, qh, qt, oqb, oqh, oqt, scb, sct, ssb, sst,
            SIGN, ACC, ROWS, BLOCK,
        )  # fmt: skip
    else:
        rotate_rows(
            K, OK, COS, SIN, program - q_programs, k_rows, HK, T, HALF, kb, kh, kt, okb, okh, okt, scb, sct,
            ssb, sst, SIGN, ACC, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit
def load_head_gain(W, half, HALF, HAS_W: tl.constexpr, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr):
    if HAS_W:
        first = tl.load(W + half, mask=half < HALF, other=0.0).to(ACC)
        second = tl.load(W + HALF + half, mask=half < HALF, other=0.0).to(ACC)
        if ZERO_CENTERED:
            first += 1.0
            second += 1.0
    else:
        first = tl.where(half < HALF, 1.0, 0.0).to(ACC)
        second = first
    return first, second


@triton.jit
def norm_rotate_rows(
    X, W, OUT, COS, SIN, program, rows, H, T, HALF, sb, sh, st, ob, oh, ot, scb, sct, ssb, sst, eps,
    HAS_W: tl.constexpr, ZERO_CENTERED: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, BLOCK)
    live = row < rows
    inside = live[:, None] & (half < HALF)[None, :]
    at, batch, time = row_address(row, H, T, sb, sh, st)
    to, batch, time = row_address(row, H, T, ob, oh, ot)
    first = tl.load(X + at[:, None] + half[None, :], mask=inside, other=0.0).to(ACC)
    second = tl.load(X + at[:, None] + HALF + half[None, :], mask=inside, other=0.0).to(ACC)
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
    rstd = tl.rsqrt(mean + tl.cast(eps, ACC))[:, None]
    first *= rstd
    second *= rstd
    if ROUND:
        first = first.to(X.dtype.element_ty).to(ACC)
        second = second.to(X.dtype.element_ty).to(ACC)
    w_first, w_second = load_head_gain(W, half, HALF, HAS_W, ZERO_CENTERED, ACC)
    first *= w_first[None, :]
    second *= w_second[None, :]
    cos, sin = load_angles(COS, SIN, batch, time, half, live, HALF, scb, sct, ssb, sst, 1.0, ACC)
    dtype = OUT.dtype.element_ty
    tl.store(OUT + to[:, None] + half[None, :], (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(OUT + to[:, None] + HALF + half[None, :], (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def norm_rope(
    Q, K, WQ, WK, OQ, OK, COS, SIN, q_programs, q_rows, k_rows, HQ, HK, T, HALF,
    qb, qh, qt, kb, kh, kt, oqb, oqh, oqt, okb, okh, okt, scb, sct, ssb, sst, eps,
    HAS_WQ: tl.constexpr, HAS_WK: tl.constexpr, ZERO_CENTERED: tl.constexpr, ROUND: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        norm_rotate_rows(
            Q, WQ, OQ, COS, SIN, program, q_rows, HQ, T, HALF, qb, qh, qt, oqb, oqh, oqt, scb, sct, ssb, sst,
            eps, HAS_WQ, ZERO_CENTERED, ROUND, ACC, ROWS, BLOCK,
        )  # fmt: skip
    else:
        norm_rotate_rows(
            K, WK, OK, COS, SIN, program - q_programs, k_rows, HK, T, HALF, kb, kh, kt, okb, okh, okt,
            scb, sct, ssb, sst, eps, HAS_WK, ZERO_CENTERED, ROUND, ACC, ROWS, BLOCK,
        )  # fmt: skip


@triton.jit
def norm_rotate_rows_backward(
    DOUT, X, W, DX, DW, COS, SIN, program, programs, rows, H, T, HALF, db, dh, dt, sb, sh, st, ob, oh, ot,
    scb, sct, ssb, sst, eps, HAS_W: tl.constexpr, ZERO_CENTERED: tl.constexpr, ROUND: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    half = tl.arange(0, BLOCK)
    w_first, w_second = load_head_gain(W, half, HALF, HAS_W, ZERO_CENTERED, ACC)
    dw_first = tl.zeros([BLOCK], ACC)
    dw_second = tl.zeros([BLOCK], ACC)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        live = row < rows
        inside = live[:, None] & (half < HALF)[None, :]
        at, batch, time = row_address(row, H, T, sb, sh, st)
        fr, batch, time = row_address(row, H, T, db, dh, dt)
        to, batch, time = row_address(row, H, T, ob, oh, ot)
        cos, sin = load_angles(COS, SIN, batch, time, half, live, HALF, scb, sct, ssb, sst, 1.0, ACC)
        d1 = tl.load(DOUT + fr[:, None] + half[None, :], mask=inside, other=0.0).to(ACC)
        d2 = tl.load(DOUT + fr[:, None] + HALF + half[None, :], mask=inside, other=0.0).to(ACC)
        dy_first = d1 * cos + d2 * sin
        dy_second = d2 * cos - d1 * sin
        first = tl.load(X + at[:, None] + half[None, :], mask=inside, other=0.0).to(ACC)
        second = tl.load(X + at[:, None] + HALF + half[None, :], mask=inside, other=0.0).to(ACC)
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF)
        rstd = tl.rsqrt(mean + tl.cast(eps, ACC))[:, None]
        first *= rstd
        second *= rstd
        g_first = dy_first * w_first[None, :]
        g_second = dy_second * w_second[None, :]
        slope = ((tl.sum(first * g_first, 1) + tl.sum(second * g_second, 1)) / (2 * HALF))[:, None]
        dtype = DX.dtype.element_ty
        tl.store(DX + to[:, None] + half[None, :], ((g_first - first * slope) * rstd).to(dtype), mask=inside)
        tl.store(
            DX + to[:, None] + HALF + half[None, :],
            ((g_second - second * slope) * rstd).to(dtype),
            mask=inside,
        )
        if HAS_W:
            if ROUND:
                first = first.to(X.dtype.element_ty).to(ACC)
                second = second.to(X.dtype.element_ty).to(ACC)
            dw_first += tl.sum(dy_first * first, 0)
            dw_second += tl.sum(dy_second * second, 0)
    if HAS_W:
        tl.store(DW + program * 2 * HALF + half, dw_first, mask=half < HALF)
        tl.store(DW + program * 2 * HALF + HALF + half, dw_second, mask=half < HALF)


@triton.jit
def norm_rope_backward(
    DQ, DK, Q, K, WQ, WK, OQ, OK, DWQ, DWK, COS, SIN, q_programs, q_rows, k_rows, HQ, HK, T, HALF,
    dqb, dqh, dqt, dkb, dkh, dkt, qb, qh, qt, kb, kh, kt, oqb, oqh, oqt, okb, okh, okt, scb, sct, ssb, sst,
    eps, HAS_WQ: tl.constexpr, HAS_WK: tl.constexpr, ZERO_CENTERED: tl.constexpr, ROUND: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < q_programs:
        norm_rotate_rows_backward(
            DQ, Q, WQ, OQ, DWQ, COS, SIN, program, q_programs, q_rows, HQ, T, HALF, dqb, dqh, dqt, qb, qh, qt,
            oqb, oqh, oqt, scb, sct, ssb, sst, eps, HAS_WQ, ZERO_CENTERED, ROUND, ACC, ROWS, BLOCK,
        )  # fmt: skip
    else:
        norm_rotate_rows_backward(
            DK, K, WK, OK, DWK, COS, SIN, program - q_programs, tl.num_programs(0) - q_programs, k_rows, HK,
            T, HALF, dkb, dkh, dkt, kb, kh, kt, okb, okh, okt, scb, sct, ssb, sst, eps,
            HAS_WK, ZERO_CENTERED, ROUND, ACC, ROWS, BLOCK,
        )  # fmt: skip


def _inner(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _angles(table: Tensor, batch: int) -> tuple[Tensor, int, int]:
    """The table with contiguous columns and its strides over batch (zero where shared) and time."""
    table = _inner(table)
    return table, table.stride(0) if table.shape[0] == batch and batch > 1 else 0, table.stride(1)


def _tile(dim: int) -> tuple[int, int, int]:
    """(rows per program, block over half a head, warps); fewer warps for wide heads keep two gains to a
    thread."""
    block = max(16, triton.next_power_of_2(dim // 2))
    warps = 4 if block <= 64 else 2
    return max(1, warps * 32 * PER_THREAD // block), block, warps


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


def launch_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    oq, ok = empty_heads_like(q), empty_heads_like(k)
    if q.numel() == 0:
        return oq, ok
    q, k = _inner(q), _inner(k)
    rows, block, warps = _tile(q.shape[-1])
    (cos, scb, sct), (sin, ssb, sst) = _angles(cos, q.shape[0]), _angles(sin, q.shape[0])
    q_programs, k_programs = triton.cdiv(_rows(q), rows), triton.cdiv(_rows(k), rows)
    with on_device(q):
        rope[(q_programs + k_programs,)](
            q, k, oq, ok, cos, sin, q_programs, _rows(q), _rows(k), q.shape[1], k.shape[1], q.shape[2],
            q.shape[3] // 2, *q.stride()[:3], *k.stride()[:3], *oq.stride()[:3], *ok.stride()[:3], scb, sct,
            ssb, sst, SIGN=-1.0 if inverse else 1.0, ACC=TRITON_DTYPE[accumulator(q.dtype)], ROWS=rows,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return oq, ok


def launch_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    eps: float, zero_centered: bool, round_normalized: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    oq, ok = empty_heads_like(q), empty_heads_like(k)
    if q.numel() == 0:
        return oq, ok
    q, k = _inner(q), _inner(k)
    rows, block, warps = _tile(q.shape[-1])
    (cos, scb, sct), (sin, ssb, sst) = _angles(cos, q.shape[0]), _angles(sin, q.shape[0])
    q_programs, k_programs = triton.cdiv(_rows(q), rows), triton.cdiv(_rows(k), rows)
    with on_device(q):
        norm_rope[(q_programs + k_programs,)](
            q, k, q_weight, k_weight, oq, ok, cos, sin, q_programs, _rows(q), _rows(k), q.shape[1],
            k.shape[1], q.shape[2], q.shape[3] // 2, *q.stride()[:3], *k.stride()[:3], *oq.stride()[:3],
            *ok.stride()[:3], scb, sct, ssb, sst, eps, HAS_WQ=q_weight is not None, HAS_WK=k_weight is not
            None, ZERO_CENTERED=zero_centered, ROUND=round_normalized, ACC=TRITON_DTYPE[accumulator(q.dtype)],
            ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return oq, ok


def launch_norm_rope_backward(
    doq: Tensor, dok: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor, sin: Tensor, eps: float, zero_centered: bool, round_normalized: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk = empty_heads_like(q), empty_heads_like(k)
    totals = [q.new_empty(0) if w is None else torch.zeros_like(w) for w in (q_weight, k_weight)]
    if q.numel() == 0:
        return dq, dk, totals[0], totals[1]
    doq, dok, q, k = _inner(doq), _inner(dok), _inner(q), _inner(k)
    dim, acc = q.shape[-1], accumulator(q.dtype)
    rows, block, warps = _tile(dim)
    (cos, scb, sct), (sin, ssb, sst) = _angles(cos, q.shape[0]), _angles(sin, q.shape[0])
    most = multiprocessors(q) * PROGRAMS[warps]
    # Queries and keys share the machine in proportion to their heads.
    share = max(1, most * q.shape[1] // (q.shape[1] + k.shape[1]))
    counts = min(triton.cdiv(_rows(q), rows), share), min(triton.cdiv(_rows(k), rows), max(1, most - share))
    partial = [
        None if w is None else torch.empty(count, dim, dtype=acc, device=q.device)
        for w, count in zip((q_weight, k_weight), counts, strict=True)
    ]
    with on_device(q):
        norm_rope_backward[(sum(counts),)](
            doq, dok, q, k, q_weight, k_weight, dq, dk, *partial, cos, sin, counts[0], _rows(q), _rows(k),
            q.shape[1], k.shape[1], q.shape[2], dim // 2, *doq.stride()[:3], *dok.stride()[:3],
            *q.stride()[:3], *k.stride()[:3], *dq.stride()[:3], *dk.stride()[:3], scb, sct, ssb, sst, eps,
            HAS_WQ=q_weight is not None, HAS_WK=k_weight is not None, ZERO_CENTERED=zero_centered,
            ROUND=round_normalized, ACC=TRITON_DTYPE[acc], ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        for rows_of, count, total in zip(partial, counts, totals, strict=True):
            if rows_of is not None:
                column_sum[(triton.cdiv(dim, 128),)](
                    rows_of, total, count, dim, BP=32, BC=128, ACC=TRITON_DTYPE[acc], num_warps=4
                )
    return dq, dk, totals[0], totals[1]
