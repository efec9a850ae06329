"""Launchers of the norm family: tables of tile sizes, one forward and one backward entry for every kind of
norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import accumulator, multiprocessors, on_device
from .layout import VECTOR, as_rows, empty_rows_like, padded_width, readable_padding
from .norms_kernels import column_sum, norm_backward, norm_forward
from .norms_wide import norm_backward_wide, norm_forward_wide

KINDS = {"rmsnorm": 0, "layernorm": 1, "crmsnorm": 2}
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

# Row width rounded up to a power of two -> (rows per program, warps). Every entry is built by the compile
# gate on four targets without a register spill; wider rows go to the split-row kernels.
FORWARD = {
    64: (32, 4), 128: (16, 2), 256: (8, 4), 512: (4, 4), 1024: (4, 4), 2048: (2, 4), 4096: (1, 8),
    8192: (1, 8), 16384: (1, 16),
}  # fmt: skip
BACKWARD = {
    64: (32, 4), 128: (8, 2), 256: (8, 4), 512: (2, 4), 1024: (1, 4), 2048: (2, 8), 4096: (1, 8),
    8192: (1, 16),
}  # fmt: skip
WIDE_CHUNK, WIDE_WARPS = 2048, 8
# float64 exists for gradient checks only; a quarter of the width keeps its registers in bounds.
WIDEST_FLOAT64 = 2048
# Programs per multiprocessor of the backward: enough warps to cover memory latency, few enough partial rows
# to sum.
PROGRAMS = {2: 10, 4: 5, 8: 2, 16: 1}


def tile_width(width: int) -> int:
    return max(64, triton.next_power_of_2(width))


def _fits(table: dict[int, tuple[int, int]], width: int, dtype: torch.dtype) -> bool:
    return width in table and (dtype != torch.float64 or width <= WIDEST_FLOAT64)


def _vectorized(limit: int, *matrices: Tensor) -> bool:
    return limit % VECTOR == 0 and all(m.data_ptr() % VECTOR == 0 for m in matrices)


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: str,
    add_after: bool, eps: float, scale: float, residual_scale: float, zero_centered: bool,
    round_normalized: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, s, shift, rstd); s is empty without an addition before the norm, shift for RMSNorm."""
    width = x.shape[-1]
    y = empty_rows_like(x, out_dtype)
    add_before = residual is not None and not add_after
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    acc = accumulator(dtype)
    s = empty_rows_like(x, dtype) if add_before else x.new_empty(0)
    rows = x.numel() // width
    shift = x.new_empty(0 if kind == "rmsnorm" else rows, dtype=acc)
    rstd = x.new_empty(rows, dtype=acc)
    if rows == 0:
        return y, s, shift, rstd
    x2, y2 = as_rows(x), as_rows(y)
    res2 = None if residual is None else as_rows(residual)
    s2 = as_rows(s) if add_before else None
    padded = readable_padding(x2, res2, y2, s2)
    tile = tile_width(width)
    flags = {
        "KIND": KINDS[kind], "ADD_BEFORE": add_before, "ADD_AFTER": add_after, "HAS_W": weight is not None,
        "HAS_B": bias is not None,
        "ZERO_CENTERED": zero_centered, "ROUND": round_normalized,
        "ACC": TRITON_DTYPE[acc],
    }  # fmt: skip
    limit = padded_width(width) if padded else width
    strides = (
        x2.stride(0),
        0 if res2 is None else res2.stride(0),
        y2.stride(0),
        0 if s2 is None else s2.stride(0),
    )
    with on_device(x):
        if _fits(FORWARD, tile, acc):
            block, warps = FORWARD[tile]
            norm_forward[(triton.cdiv(rows, block),)](
                x2, res2, weight, bias, y2, s2, shift, rstd, rows, width, limit, *strides, eps, scale,
                residual_scale, **flags, PADDED=padded, BM=block, BN=tile, num_warps=warps,
            )  # fmt: skip
        else:
            norm_forward_wide[(rows,)](
                x2, res2, weight, bias, y2, s2, shift, rstd, width, limit, *strides, eps, scale,
                residual_scale, **flags, BN=WIDE_CHUNK, num_warps=WIDE_WARPS,
            )  # fmt: skip
    return y, s, shift, rstd


def launch_backward(
    dy: Tensor, ds: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, rstd:
    Tensor, kind: str, scale: float, residual_scale: float, zero_centered: bool, round_normalized: bool,
    dtype: torch.dtype, residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx in dtype, residual_scale * dx in residual_dtype, d weight, d bias); x is the normalized input,
    absent parts are empty."""
    width, acc = x.shape[-1], rstd.dtype
    rows = x.numel() // width
    dx = empty_rows_like(x, dtype)
    split = residual_dtype is not None
    dres = empty_rows_like(x, residual_dtype) if split else x.new_empty(0)
    dw = x.new_empty(0) if weight is None else torch.zeros_like(weight)
    db = x.new_empty(0) if bias is None else torch.zeros_like(bias)
    if rows == 0:
        return dx, dres, dw, db
    dy2, x2, dx2 = as_rows(dy), as_rows(x), as_rows(dx)
    ds2 = None if ds is None else as_rows(ds)
    padded = readable_padding(x2, dy2, ds2, dx2)
    tile = tile_width(width)
    limit = padded_width(width) if padded else width
    # Rows loaded 16 bits at a time need more registers: the widest tile would spill.
    whole = _fits(BACKWARD, tile, acc) and (tile < 8192 or _vectorized(limit, dy2, x2, dx2))
    block, warps = BACKWARD[tile] if whole else (1, WIDE_WARPS)
    programs = min(triton.cdiv(rows, block), multiprocessors(x) * PROGRAMS[warps])
    # The split-row kernel adds into its rows, the other writes them once.
    partial = torch.empty if whole else torch.zeros
    dw_rows = None if weight is None else partial(programs, width, dtype=acc, device=x.device)
    db_rows = None if bias is None else partial(programs, width, dtype=acc, device=x.device)
    flags = {
        "KIND": KINDS[kind], "HAS_DS": ds is not None, "SPLIT_RES": split, "HAS_W": weight is not None,
        "HAS_B": bias is not None, "ZERO_CENTERED": zero_centered, "ROUND": round_normalized,
        "ACC": TRITON_DTYPE[acc],
    }  # fmt: skip
    strides = (dy2.stride(0), 0 if ds2 is None else ds2.stride(0), x2.stride(0), dx2.stride(0))
    operands = (
        dy2, ds2, x2, weight, shift, rstd, dx2, as_rows(dres) if split else None, dw_rows, db_rows,
        rows, width, limit, *strides, scale, residual_scale,
    )  # fmt: skip
    with on_device(x):
        if whole:
            norm_backward[(programs,)](
                *operands, **flags, PADDED=padded, BM=block, BN=tile, STAGES=2, num_warps=warps
            )
        else:
            norm_backward_wide[(programs,)](*operands, **flags, BN=WIDE_CHUNK, num_warps=warps)
        for rows_of, total in ((dw_rows, dw), (db_rows, db)):
            if rows_of is not None:
                column_sum[(triton.cdiv(width, 128),)](
                    rows_of, total, programs, width, BP=32, BC=128, ACC=TRITON_DTYPE[acc], num_warps=4
                )
    return dx, dres, dw, db
