"""Upper bounds of largest singular values, for claims that must hold: never an estimate from below.

Power iteration is always too small (0.87 of the truth after two steps on Gaussian noise, 0.98 after
sixteen), so a constant that is computed with it is no bound. Norms are of the very numbers given, computed
in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# An fp64 decomposition of a matrix with a few thousand rows is right to about 1e-13; this covers it.
ROUNDING = 1e-10
LARGEST_DECOMPOSITION = 1024  # of the smaller side; beyond, the Gram bound is many times faster
SQUARINGS = 8  # the bound is then at most r^(1/1024) too large, 1.01 for rank 20,000
EXACT_DIFFERENCES = 4096  # rows whose differences are all computed


def gram_bound(weight: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """||(W W^T)^p||_F^(1/2p), p = 2^squarings, in fp64: at least s_1, at most rank^(1/4p) times it.

    W [..., m, n] -> [...]. squarings + 1 products of the smaller side.
    """
    flat = (weight.mT if weight.shape[-2] > weight.shape[-1] else weight).double()
    power = flat @ flat.mT
    log = torch.zeros(power.shape[:-2], dtype=torch.float64, device=power.device)
    for squaring in range(squarings + 1):
        norm = torch.linalg.matrix_norm(power)
        log += norm.log() / 2 ** (squaring + 1)
        power = power / norm.clamp_min(torch.finfo(torch.float64).tiny)[..., None, None]
        if squaring < squarings:
            power = power @ power
    return log.exp()


def largest_singular_value(weight: Tensor) -> Tensor:
    """An upper bound of s_1 of each matrix, at most 1 + 2e-10 times it; W [..., m, n] -> [...] in fp64.

    A decomposition in fp64; the Gram bound where the smaller side is above LARGEST_DECOMPOSITION.
    """
    if min(weight.shape[-2:]) > LARGEST_DECOMPOSITION:
        return gram_bound(weight) * (1 + ROUNDING)
    return torch.linalg.svdvals(weight.double())[..., 0] * (1 + ROUNDING)


def rms_to_rms(weight: Tensor) -> float:
    """sqrt(in/out) s_1: what one matrix [out, in] can do to a root mean square; an upper bound."""
    rows, columns = weight.shape
    return math.sqrt(columns / rows) * float(largest_singular_value(weight))


def largest_row(weight: Tensor) -> float:
    """The largest Euclidean norm of a row, rounded up."""
    return float(torch.linalg.vector_norm(weight.double(), dim=-1).max()) * (1 + ROUNDING)


def largest_difference_of_rows(weight: Tensor) -> float:
    """An upper bound of max_{a, b} ||u_a - u_b||_2 over rows u.

    Twice the largest distance from the mean of the rows, which is at most twice too large; exact where that
    is cheap, up to EXACT_DIFFERENCES rows.
    """
    rows = weight.double()
    centered = rows - rows.mean(0)
    if rows.shape[0] > EXACT_DIFFERENCES:
        return 2 * largest_row(centered)
    # Distances of centered rows, from their products; rounding is relative to the largest, which is wanted.
    squares = centered.square().sum(1)
    distances = squares[:, None] + squares - 2 * centered @ centered.mT
    return math.sqrt(max(float(distances.max()), 0.0)) * (1 + ROUNDING)
