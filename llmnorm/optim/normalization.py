"""Normalizing gradients: rows, columns and whole matrices to RMS 1, without blowing up what is only noise.

Every norm has a floor relative to the RMS of the whole matrix. An absolute floor such as 1e-8 would turn a
row whose gradient is pure rounding error into an update of full size, and would break scale invariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmnorm.optim.rules import wide

RELATIVE_FLOOR = 1e-7  # of the RMS of the matrix: about what fp32 rounding leaves of a sum that should cancel


def rms(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Root mean square over `dim`, kept as a dimension of 1, at least in fp32."""
    return wide(x).square().mean(dim, keepdim=True).sqrt()


def rms_normalize(x: Tensor, dim: int, floor: float = RELATIVE_FLOOR) -> Tensor:
    """x / max(RMS_dim(x), floor RMS(x)): slices along `dim` (-1: rows, -2: columns) get RMS 1, zeros stay."""
    whole = rms(x, (-2, -1))
    return wide(x) / torch.maximum(rms(x, dim), floor * whole).clamp(min=torch.finfo(whole.dtype).tiny)


def to_unit_rms(x: Tensor) -> Tensor:
    """x / RMS(x) over the last two dimensions; zero stays zero."""
    whole = rms(x, (-2, -1))
    return wide(x) / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def alive(x: Tensor, floor: float = RELATIVE_FLOOR) -> Tensor:
    """Whether row and column of each entry are more than rounding error: RMS above floor RMS(x)."""
    least = floor * rms(x, (-2, -1))
    return (rms(x, -1) > least) & (rms(x, -2) > least)


def frobenius(x: Tensor) -> Tensor:
    """||x||_2 of a whole layer, at least in fp32: over the last two dimensions, or over all of a vector.

    Kept as dimensions of 1, so that a stack of experts has one norm each.
    """
    dims = (-2, -1) if x.ndim >= 2 else tuple(range(x.ndim))
    return wide(x).square().sum(dims, keepdim=True).sqrt()
