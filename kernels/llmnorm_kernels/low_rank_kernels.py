"""Triton kernel of the moments of a projected gradient, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device
from .optimizer_kernels import adam_direction, adam_moments


@triton.jit
def low_rank_moments(
    R, M, V, N, NORMS_N, NORMS_R, CHANNELS, INNER, sc, sj, b1, c1, b2, c2, eps, bc1, bc2_root,
    DIRECTION: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """M, V of R in place, and for each channel the sums of squares of Adam's direction N and of R."""
    channel = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    squares_n = tl.zeros([BC], tl.float32)
    squares_r = tl.zeros([BC], tl.float32)
    for start in range(0, INNER, BJ):
        inner = start + tl.arange(0, BJ)
        at = channel[:, None] * sc + inner.to(tl.int64)[None, :] * sj
        inside = (channel < CHANNELS)[:, None] & (inner < INNER)[None, :]
        r = tl.load(R + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(M + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(V + at, mask=inside, other=0.0).to(tl.float32)
        m, v = adam_moments(r, m, v, b1, c1, b2, c2)
        tl.store(M + at, m.to(M.dtype.element_ty), mask=inside)
        tl.store(V + at, v.to(V.dtype.element_ty), mask=inside)
        # Outside of R all three are 0, and with eps = 0 the direction there would be 0 / 0.
        n = tl.where(inside, adam_direction(m, v, eps, bc1, bc2_root), 0.0)
        if DIRECTION:
            tl.store(N + at, n, mask=inside)
        squares_n += tl.sum(n * n, 1)
        squares_r += tl.sum(r * r, 1)
    tl.store(NORMS_N + channel, squares_n, mask=channel < CHANNELS)
    tl.store(NORMS_R + channel, squares_r, mask=channel < CHANNELS)


def launch_low_rank_moments(
    low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float, eps: float,
    bias_correction1: float, bias_correction2_root: float, of_rows: bool, direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(N, or an empty tensor; the sums of squares of N; those of `low`) by rows or by columns."""
    rows, columns = low.shape
    channels, inner, strides = (rows, columns, (columns, 1)) if of_rows else (columns, rows, (1, columns))
    n = low.new_empty(low.shape if direction else 0, dtype=torch.float32)
    squares = [low.new_empty(channels, dtype=torch.float32) for _ in range(2)]
    tile = {"BC": 8, "BJ": 256} if of_rows else {"BC": 64, "BJ": 32}
    with on_device(low):
        low_rank_moments[(triton.cdiv(channels, tile["BC"]),)](
            low, exp_avg, exp_avg_sq, n, *squares, channels, inner, *strides, beta1, 1.0 - beta1, beta2,
            1.0 - beta2, eps, bias_correction1, bias_correction2_root, DIRECTION=direction, **tile,
            num_warps=8,
        )  # fmt: skip
    return n, squares[0], squares[1]
