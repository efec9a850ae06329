"""The symmetric product alpha X X^T + beta C, and Muon's orthogonalization made of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_finite, check_floats, check_given, check_numbers
from .dispatch import operator, register, runs_triton

# Keller Jordan's quintic, five times; singular values s -> a s + b s^3 + c s^5.
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


def symmetric_reference(x: Tensor, addend: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha X X^T + beta C with a float32 sum, rounded once."""
    product = alpha * (x.float() @ x.float().mT)
    return (product if addend is None else product + beta * addend.float()).to(x.dtype)


register(
    "symmetric_product(Tensor x, Tensor? addend, float alpha, float beta) -> Tensor",
    "newton_schulz_kernels:launch_symmetric",
    lambda x, addend, alpha, beta: x.new_empty(x.shape[0], x.shape[1], x.shape[1]),
)


@operator
@torch.no_grad()
def symmetric_product(
    x: Tensor, addend: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """alpha X X^T + beta C, half of whose tiles are computed and then mirrored.

    x: (..., n, k), float32 or 16-bit; addend C: (..., n, n), symmetric (its lower half is read). The result
    is symmetric to the last bit, of the dtype of x; the sum is float32. Matrix work n^2 k FLOPs per batch
    entry instead of 2 n^2 k. Not differentiable. Raises ValueError for shapes and dtypes.
    """
    check_given(x=x)
    check_floats(x=x, addend=addend)
    check_finite(alpha=alpha, beta=beta)
    if x.dim() < 2 or 0 in x.shape[-2:] or x.dtype == torch.float64:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and dtype {x.dtype}; it takes (..., n, k), neither of them zero, "
            "float32 or 16-bit"
        )
    size = (*x.shape[:-1], x.shape[-2])
    if addend is not None and (addend.shape != size or addend.dtype != x.dtype):
        raise ValueError(
            f"addend has shape {tuple(addend.shape)} of {addend.dtype}; it must have {size} of {x.dtype}"
        )
    flat = x.reshape(-1, *x.shape[-2:])
    flat_addend = None if addend is None else addend.reshape(-1, *addend.shape[-2:])
    if runs_triton(x):
        result = torch.ops.llmnorm_kernels.symmetric_product(flat, flat_addend, float(alpha), float(beta))
    else:
        result = symmetric_reference(flat, flat_addend, alpha, beta)
    return result.view(size)


@operator
@torch.no_grad()
def newton_schulz(
    x: Tensor, coefficients: Sequence[tuple[float, float, float]] = JORDAN, *,
    dtype: torch.dtype = torch.bfloat16, eps: float = 1e-7,
) -> Tensor:  # fmt: skip
    """An approximate U V^T of each matrix X = U S V^T: X / |X|_F, then X = a X + (b A + c A^2) X with A = X
    X^T for each (a, b, c).

    x: (..., m, n), the same-shaped matrices of a model as one batch; taller matrices are transposed first.
    Computed in `dtype`, returned in it. Muon (Jordan et al. 2024); the default coefficients bring singular
    values above 1.6e-3 of the norm into [0.68, 1.2]. Matrix work per step, k = min, K = max: 3 k^2 K + k^3
    FLOPs (plain: 4 k^2 K + 2 k^3). Not differentiable. Raises ValueError for shapes, dtypes and coefficients.
    """
    check_given(x=x)
    check_floats(x=x)
    if x.dim() < 2 or 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., m, n) and not empty")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype} must be float32, bfloat16 or float16")
    check_numbers(eps=eps)
    if not coefficients or any(not isinstance(row, Sequence) or len(row) != 3 for row in coefficients):
        raise ValueError(f"coefficients={coefficients!r} must be a sequence of triples (a, b, c)")
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    y = y.float() if y.dtype == torch.float64 else y
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    y = (y / (norm + eps)).to(dtype)
    for a, b, c in coefficients:
        gram = symmetric_product(y)
        # A is symmetric, so A^2 = A A^T.
        polynomial = symmetric_product(gram, gram, alpha=c, beta=b)
        y = torch.baddbmm(y, polynomial, y, beta=a)
    y = y.view(*x.shape[:-2], *y.shape[-2:])
    return y.mT if tall else y
