"""Normalizing gradients: rows, columns and whole matrices to RMS 1, without blowing up what is only noise.

Every norm has a floor relative to the RMS of the whole matrix. An absolute floor such as 1e-8 would turn a
row whose gradient is pure rounding error into an update of full size, and would break scale invariance.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from llmnorm.optim.row_shards import Request, rows_of, sums
from llmnorm.optim.rules import wide

RELATIVE_FLOOR = 1e-7  # of the RMS of the matrix: about what fp32 rounding leaves of a sum that should cancel


def rms(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Root mean square over `dim`, kept as a dimension of 1, at least in fp32."""
    return wide(x).square().mean(dim, keepdim=True).sqrt()


def rms_normalize(x: Tensor, dim: int, floor: float = RELATIVE_FLOOR) -> Tensor:
    """x / max(RMS_dim(x), floor RMS(x)): slices along `dim` (-1: rows, -2: columns) get RMS 1, zeros stay."""
    return wide(x) / _floored(rms(x, dim), rms(x, (-2, -1)), floor)


def normalize_rows(x: Tensor, hyper: Mapping[str, Any]) -> Generator[Request, tuple[Tensor, ...], Tensor]:
    """`rms_normalize` of rows, by rows: the floor alone looks at the others. `hyper` has eps, the floor."""
    rows = wide(x).square().mean(-1, keepdim=True)
    (total,) = yield sums(rows.sum(-2, keepdim=True))
    return wide(x) / _floored(rows.sqrt(), (total / rows_of(x, hyper)).sqrt(), hyper["eps"])


def normalize_columns(x: Tensor, hyper: Mapping[str, Any]) -> Generator[Request, tuple[Tensor, ...], Tensor]:
    """`rms_normalize` of columns, by rows."""
    (total,) = yield sums(wide(x).square().sum(-2, keepdim=True))
    columns = total / rows_of(x, hyper)
    return wide(x) / _floored(columns.sqrt(), columns.mean(-1, keepdim=True).sqrt(), hyper["eps"])


def _floored(norms: Tensor, whole: Tensor, floor: float) -> Tensor:
    return torch.maximum(norms, floor * whole).clamp(min=torch.finfo(whole.dtype).tiny)


def to_unit_rms(x: Tensor) -> Tensor:
    """x / RMS(x) over the last two dimensions; zero stays zero."""
    whole = rms(x, (-2, -1))
    return wide(x) / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def alive(x: Tensor, floor: float = RELATIVE_FLOOR) -> Tensor:
    """Whether row and column of each entry are more than rounding error: RMS above floor RMS(x)."""
    least = floor * rms(x, (-2, -1))
    return (rms(x, -1) > least) & (rms(x, -2) > least)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of a whole layer, at least in fp32: over the last two dimensions, or over all of a vector.

    Kept as dimensions of 1, so that a stack of experts has one product each.
    """
    dims = (-2, -1) if x.ndim >= 2 else tuple(range(x.ndim))
    return (wide(x) * wide(y)).sum(dims, keepdim=True)


def squared_norm(x: Tensor) -> Tensor:
    """||x||_2^2 of a whole layer, as `inner`."""
    return inner(x, x)


def frobenius(x: Tensor) -> Tensor:
    """||x||_2 of a whole layer, as `inner`."""
    return squared_norm(x).sqrt()
