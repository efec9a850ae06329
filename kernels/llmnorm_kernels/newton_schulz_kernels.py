"""Triton kernel of the symmetric product and its launcher: only the tiles on and below the diagonal are
computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device

# (tile, inner step, warps, stages); larger tiles spill, four stages exceed the 64 KB of gfx942.
SMALL, LARGE = (64, 64, 4, 3), (128, 64, 8, 3)


@triton.jit
def symmetric_tiles(
    A, C, OUT, n, k, sab, sa, scb, sc, sob, so, alpha, beta,
    HAS_C: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = alpha A A^T + beta C for symmetric C: tile (i, j <= i) and, off the diagonal, its mirror."""
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0)
    # The t-th tile of the lower triangle, row by row; the two corrections undo the rounding of the square
    # root.
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    j = t - i * (i + 1) // 2
    ri = i * BM + tl.arange(0, BM)
    rj = j * BM + tl.arange(0, BM)
    inner = tl.arange(0, BK)
    ai = A + batch * sab + ri.to(tl.int64)[:, None] * sa
    aj = A + batch * sab + rj.to(tl.int64)[:, None] * sa
    acc = tl.zeros([BM, BM], tl.float32)
    for start in range(0, k, BK):
        col = (start + inner)[None, :]
        u = tl.load(ai + col, mask=(ri < n)[:, None] & (col < k), other=0.0)
        v = tl.load(aj + col, mask=(rj < n)[:, None] & (col < k), other=0.0)
        acc = tl.dot(u, tl.trans(v), acc, input_precision=PRECISION)
    acc *= tl.cast(alpha, tl.float32)
    inside = (ri < n)[:, None] & (rj < n)[None, :]
    if HAS_C:
        c = tl.load(C + batch * scb + ri.to(tl.int64)[:, None] * sc + rj[None, :], mask=inside, other=0.0)
        acc += tl.cast(beta, tl.float32) * c.to(tl.float32)
    result = acc.to(OUT.dtype.element_ty)
    out = OUT + batch * sob
    # The diagonal tile writes its lower half twice, so that the product is symmetric to the last bit.
    lower = inside & (ri[:, None] >= rj[None, :])
    tl.store(out + ri.to(tl.int64)[:, None] * so + rj[None, :], result, mask=lower)
    strictly = inside & (ri[:, None] > rj[None, :])
    tl.store(out + rj.to(tl.int64)[:, None] * so + ri[None, :], tl.trans(result), mask=tl.trans(strictly))


def launch_symmetric(x: Tensor, addend: Tensor | None, alpha: float, beta: float) -> Tensor:
    batch, n, k = x.shape
    out = x.new_empty(batch, n, n)
    if out.numel() == 0:
        return out
    x = x if x.stride(-1) == 1 else x.contiguous()
    if addend is not None and addend.stride(-1) != 1:
        addend = addend.contiguous()
    # float32 operands take twice the registers and shared memory of 16-bit ones.
    small = n <= 512 or x.dtype == torch.float32
    tile, inner, warps, stages = SMALL if small else LARGE
    count = triton.cdiv(n, tile)
    strides = (0, 0) if addend is None else addend.stride()[:2]
    with on_device(x):
        symmetric_tiles[(count * (count + 1) // 2, batch)](
            x, addend, out, n, k, *x.stride()[:2], *strides, *out.stride()[:2], alpha, beta,
            HAS_C=addend is not None, PRECISION="ieee" if x.dtype == torch.float32 else None,
            BM=tile, BK=inner, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out
