"""Orthogonalization against synthetic spectra, golden vectors and its own symmetries."""

from __future__ import annotations

import math

import pytest
import torch

from llmnorm.errors import UserError
from llmnorm.optim.newton_schulz import (
    COEFFICIENT_SETS,
    CoefficientSet,
    _gram,
    _standard,
    nuclear_norm,
    orthogonalize,
    orthogonalize_rows,
)

SETS = sorted(set(COEFFICIENT_SETS) - {"aol"})  # which has tests of its own, with its preconditioner
DOUBLE = torch.float64


def spectral_matrix(rows: int, columns: int, values: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """P diag(values) Q^T with random orthonormal P and Q, and its polar factor P Q^T."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=DOUBLE))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=DOUBLE))
    return left @ torch.diag(values) @ right.T, left @ right.T


# Interval that five iterations map s in [1e-2, 1] to, from evaluating the polynomials in fp64.
RANGES = {
    "jordan": (0.682, 1.134),
    "you": (0.978, 1.032),
    "polar_express": (0.870, 1.124),
    "cans": (0.884, 1.120),
}


@pytest.mark.parametrize("name", SETS)
# bf16 rounds every product at 2^-9 and the first iteration of CANS multiplies an error by 8.5.
@pytest.mark.parametrize("dtype, slack", [(DOUBLE, 0.001), (torch.bfloat16, 0.06)])
def test_singular_values_land_in_the_range_of_the_set(name, dtype, slack):
    values = torch.logspace(-1.2, 0, 24, dtype=DOUBLE)
    matrix, _ = spectral_matrix(32, 80, values)
    got = torch.linalg.svdvals(orthogonalize(matrix, name, 5, dtype=dtype).double())[:24]
    low, high = RANGES[name]
    assert low - slack <= got.min() and got.max() <= high + slack


@pytest.mark.parametrize(
    "name, expected",
    [
        ("jordan", (0.722876, 1.119204)),
        ("you", (1.018629, 1.005632)),
        ("polar_express", (1.050268, 0.981751)),
        ("cans", (0.905917, 0.923786)),
    ],
)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_golden_values_of_a_diagonal_matrix(name, expected, method):
    got = orthogonalize(torch.diag(torch.tensor([3.0, 4.0], dtype=DOUBLE)), name, dtype=DOUBLE, method=method)
    assert got.diagonal().tolist() == pytest.approx(expected, abs=1e-6)
    assert got[0, 1] == got[1, 0] == 0


def test_many_iterations_reach_the_polar_factor():
    matrix, polar = spectral_matrix(24, 40, torch.linspace(0.05, 1, 24, dtype=DOUBLE))
    torch.testing.assert_close(
        orthogonalize(matrix, "polar_express", 12, dtype=DOUBLE), polar, atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("shape", [(16, 48), (16, 16), (48, 16)])
def test_gram_iteration_is_the_same_polynomial(name, shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(3, *shape, generator=generator, dtype=DOUBLE)
    standard = orthogonalize(matrix, name, 5, dtype=DOUBLE)
    torch.testing.assert_close(
        orthogonalize(matrix, name, 5, dtype=DOUBLE, method="gram"), standard, atol=1e-11, rtol=1e-11
    )


@pytest.mark.parametrize("restarts", [(), (2,), (1, 3)])
def test_gram_iteration_does_not_depend_on_its_restarts(restarts):
    x = torch.randn(12, 30, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    x = x / x.norm()
    schedule = COEFFICIENT_SETS["polar_express"].schedule(5)
    torch.testing.assert_close(
        _gram(x, schedule, None, restarts), _standard(x, schedule), atol=1e-11, rtol=1e-11
    )


def test_gram_in_half_precision_stays_bounded():
    """In bf16, or without the restart, rounding makes the Gram matrix indefinite."""
    values = torch.logspace(-5, 0, 64, dtype=DOUBLE)
    matrix, _ = spectral_matrix(64, 256, values)
    got = orthogonalize(matrix, "polar_express", 5, dtype=torch.bfloat16, method="gram")
    assert torch.linalg.svdvals(got.double()).max() < 1.3


@pytest.mark.parametrize("method", ["standard", "gram"])
def test_symmetries(method):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(20, 12, generator=generator, dtype=DOUBLE)
    left, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=DOUBLE))
    right, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=DOUBLE))

    def orth(x):
        return orthogonalize(x, "jordan", 5, dtype=DOUBLE, method=method)

    close = {"atol": 1e-11, "rtol": 1e-11}
    torch.testing.assert_close(orth(1e-3 * matrix), orth(matrix), **close)
    torch.testing.assert_close(orth(matrix.T), orth(matrix).T, **close)
    torch.testing.assert_close(orth(left @ matrix @ right), left @ orth(matrix) @ right, **close)
    assert torch.equal(orth(torch.zeros(4, 6, dtype=DOUBLE)), torch.zeros(4, 6, dtype=DOUBLE))


def test_batched_equals_looped_and_blocks_equal_separate_matrices():
    generator = torch.Generator().manual_seed(4)
    stack = torch.randn(2, 3, 8, 20, generator=generator)
    looped = torch.stack([torch.stack([orthogonalize(x) for x in row]) for row in stack])
    torch.testing.assert_close(orthogonalize(stack), looped, atol=1e-6, rtol=0)

    matrix = torch.randn(24, 20, generator=generator)
    equal = orthogonalize_rows(matrix, [8, 8, 8], orthogonalize)
    torch.testing.assert_close(
        equal, torch.cat([orthogonalize(x) for x in matrix.split(8)]), atol=1e-6, rtol=0
    )
    uneven = orthogonalize_rows(matrix, [12, 4, 8], orthogonalize)
    expected = torch.cat([orthogonalize(x) for x in matrix.split([12, 4, 8])])
    torch.testing.assert_close(uneven, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_the_input_is_never_written(dtype, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    before = matrix.clone()
    for method in ("standard", "gram"):
        orthogonalize(matrix, "jordan", dtype=dtype, method=method)
    assert torch.equal(matrix, before)


def test_schedule_repeats_the_terminal_coefficients():
    schedule = COEFFICIENT_SETS["polar_express"].schedule(9)
    assert schedule[7:] == [(1.875, -1.25, 0.375)] * 2
    assert schedule[0][0] == pytest.approx(8.28721201814563 / 1.01)
    assert schedule[0][2] == pytest.approx(17.300387312530933 / 1.01**5)
    last_of_five = COEFFICIENT_SETS["polar_express"].schedule(5)[4]
    assert last_of_five == (2.300652019954817, -1.6689039845747493, 0.4188073119525673)
    assert CoefficientSet(((2.0, -1.5, 0.5),)).schedule(3) == [(2.0, -1.5, 0.5)] * 3


def test_nuclear_norm_is_within_one_percent_of_the_svd():
    matrix, _ = spectral_matrix(32, 48, torch.logspace(-2, 1, 32, dtype=DOUBLE))
    exact = torch.linalg.svdvals(matrix).sum().item()
    assert math.isclose(nuclear_norm(matrix).item(), exact, rel_tol=0.01)


def test_refused_coefficients():
    with pytest.raises(UserError, match="jordan"):
        orthogonalize(torch.eye(2), "jordon")
    with pytest.raises(UserError, match="three numbers"):
        orthogonalize(torch.eye(2), (1.0, 2.0))
    with pytest.raises(UserError, match=r"ns_coefficients='aol' .*optimizer.ns_preconditioner: aol"):
        orthogonalize(torch.eye(2), "aol")
    # First iteration of AOL: 4.0098 - 7.0585 + 2.4635 < 0 at s = 1.
    with pytest.raises(UserError, match="climb"):
        orthogonalize(torch.eye(2), (4.0098, -7.0585, 2.4635))
