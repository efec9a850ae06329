"""Adam's moments of a projected gradient in one pass, with the norms of its channels: what the steps of
GaLore and APOLLO need beside two matrix products.

    M <- b1 M + (1 - b1) R,   V <- b2 V + (1 - b2) R^2,   N = (M / c1) / (sqrt(V / c2) + eps)

R (m, r) or (r, n) is the gradient in the subspace. GaLore (arXiv 2403.03507) takes N back by one product that
accumulates into the weight, W <- d W - lr a N B; APOLLO (arXiv 2412.05270) takes the norms |N_i| and |R_i| of
each channel, whose ratio scales the gradient's own row or column.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .checks import check_betas, check_floats, check_given, check_numbers
from .dispatch import operator, register, runs_triton


def low_rank_reference(
    low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, beta1: float, beta2: float, eps: float,
    bias_correction1: float, bias_correction2_root: float, of_rows: bool, direction: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(N or an empty tensor, channel sums of N^2, of R^2), the moments renewed in place; all in float32."""
    r = low.float()
    m = beta1 * exp_avg.float() + (1.0 - beta1) * r
    v = beta2 * exp_avg_sq.float() + (1.0 - beta2) * r * r
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    n = (m / bias_correction1) / (v.sqrt() / bias_correction2_root + eps)
    dim = 1 if of_rows else 0
    squares = n.square().sum(dim), r.square().sum(dim)
    return (n if direction else n.new_empty(0), *squares)


def _fake(low, exp_avg, exp_avg_sq, beta1, beta2, eps, bias_correction1, bias_correction2_root, *flags):
    of_rows, direction = flags
    channels = low.shape[0 if of_rows else 1]
    n = low.new_empty(low.shape if direction else 0, dtype=torch.float32)
    return n, *(low.new_empty(channels, dtype=torch.float32) for _ in range(2))


register(
    "low_rank_moments_(Tensor low, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, float beta1, float beta2, "
    "float eps, float bias_correction1, float bias_correction2_root, bool of_rows, bool direction) "
    "-> (Tensor, Tensor, Tensor)",
    "low_rank_kernels:launch_low_rank_moments",
    _fake,
)


@operator
@torch.no_grad()
def low_rank_moments_(
    low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float,
    bias_corrections: tuple[float, float] = (1.0, 1.0), dim: int = 1, direction: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(N, squares of N, squares of R) of the module's equations; M and V are renewed in place.

    low R: a matrix, float32 or 16-bit, contiguous; exp_avg M and exp_avg_sq V of its shape, of one floating
    dtype. bias_corrections: (1 - b1^t, 1 - b2^t), ones for code that corrects elsewhere. The squares are
    float32 sums along `dim`: dim=1 gives one for each row, dim=0 one for each column. direction=False leaves
    N out (an empty tensor). N is float32. Bytes moved per element of R: read R, M, V, write M, V and N.
    Raises ValueError for shapes, dtypes, layouts and values out of range.
    """
    check_given(low=low, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_floats(low=low, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    if low.dim() != 2 or low.numel() == 0:
        raise ValueError(f"low has shape {tuple(low.shape)}; it must be a matrix that is not empty")
    for name, tensor in (("low", low), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.shape != low.shape or not tensor.is_contiguous() or tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; it must be "
                f"contiguous, float32 or 16-bit, of shape {tuple(low.shape)}"
            )
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise ValueError(f"exp_avg and exp_avg_sq have dtypes {exp_avg.dtype}, {exp_avg_sq.dtype}; give one")
    check_betas(betas)
    check_numbers(eps=eps)
    if not all(0.0 < correction <= 1.0 for correction in bias_corrections):
        raise ValueError(f"bias_corrections={bias_corrections} must be above 0 and at most 1")
    if dim not in (0, 1):
        raise ValueError(f"dim={dim} must be 0 (columns) or 1 (rows)")
    given: tuple[Any, ...] = (
        low, exp_avg, exp_avg_sq, *map(float, betas), float(eps), float(bias_corrections[0]),
        math.sqrt(bias_corrections[1]), dim == 1, direction,
    )  # fmt: skip
    if runs_triton(low):
        return torch.ops.llmnorm_kernels.low_rank_moments_(*given)
    return low_rank_reference(*given)
