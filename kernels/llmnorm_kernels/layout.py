"""How a kernel sees a tensor of any layout: rows of contiguous columns, at a stride that may be padded."""

from __future__ import annotations

import torch
from torch import Tensor

# Triton vectorizes a load when it knows that its mask changes only at multiples of 16 elements.
VECTOR = 16


def padded_width(width: int) -> int:
    """`width` rounded up to a multiple of 16 elements."""
    return -(-width // VECTOR) * VECTOR


def has_padded_rows(x: Tensor) -> bool:
    """Whether the rows of `x` have an odd width but start at multiples of 16 elements."""
    width = x.shape[-1]
    return width % VECTOR != 0 and x.dim() >= 2 and x.stride(-1) == 1 and x.stride(-2) == padded_width(width)


def empty_padded(
    *shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """An uninitialized tensor of `shape` whose rows start at multiples of 16 elements.

    A row of odd width (CRMSNorm streams have d - 1 columns) in this layout is read 128 bits at a time; in a
    contiguous tensor it is read 16 bits at a time.
    """
    *rows, width = shape
    return torch.empty(*rows, padded_width(width), dtype=dtype, device=device)[..., :width]


def empty_rows_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor of the shape of `x`: padded rows where `x` has them, contiguous otherwise."""
    dtype = dtype or x.dtype
    if has_padded_rows(x):
        return x.new_empty((*x.shape[:-1], padded_width(x.shape[-1])), dtype=dtype)[..., : x.shape[-1]]
    return x.new_empty(x.shape, dtype=dtype)


def as_rows(x: Tensor) -> Tensor:
    """`x` as a matrix (rows, width) with contiguous columns: a view where the layout allows one, else a
    copy."""
    matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    # stride 0 comes from `y.sum().backward()`: its gradient is one expanded number.
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def readable_padding(*matrices: Tensor | None) -> bool:
    """Whether every matrix has padded rows and owns the padding of its last row."""
    for matrix in matrices:
        if matrix is None:
            continue
        if not has_padded_rows(matrix):
            return False
        end = matrix.storage_offset() + matrix.shape[0] * matrix.stride(0)
        if end * matrix.element_size() > matrix.untyped_storage().nbytes():
            return False
    return True
