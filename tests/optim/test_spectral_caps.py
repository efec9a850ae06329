"""The caps as functions of singular values, against F2's golden numbers and the SVD."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmnorm.optim.spectral_caps import (
    OVERSHOOT,
    cap_rows,
    hammer,
    hard_cap,
    normalize,
    polynomial,
    polynomial_cap,
    soft_cap,
    soft_cap_alpha,
    spectral_decay,
    spectral_norm,
    spectral_norm_bound,
    stiefel,
)

# (max_norm, decay, lr) -> (k, alpha), computed in fp64
SOFT_CAPS = [
    ((1, 0.1, 0.05), (1.045, 0.1171161719)),
    ((1, 0, 0.05), (1.05, 0.1224393283)),
    ((1, 0, 0.1), (1.1, 0.1588644192)),
    ((1, 0, 0.2), (1.2, 0.1886313457)),
    ((1, 0, 0.3), (1.3, 0.1952771481)),
    ((6, 0, 0.1), (6.1, 0.0020654628)),
    ((8, 0.1, 0.05), (8.01, 0.0003212545)),
]
HARD_POLYNOMIAL = {
    0.1: 0.095334,
    0.5: 0.497925,
    0.9: 0.9005,
    1.0: 0.966074,
    1.185: 1.010882,
    1.5: 1.001313,
    2.0: 1.001981,
    3.0: 1.000902,
    3.5: 1.010418,
    4.0: -0.99839,
}
SHAPES = [(5, 5), (9, 4), (4, 9)]


def with_values(shape: tuple[int, int], values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U S V^T in fp64, with U and V^T."""
    torch.manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return left * values @ right, left, right


def spectrum(shape: tuple[int, int]) -> Tensor:
    return torch.linspace(2.5, 0.2, min(shape), dtype=torch.float64)


@pytest.mark.parametrize(("given", "expected"), SOFT_CAPS)
def test_f2_alpha_of_the_soft_cap(given: tuple[float, ...], expected: tuple[float, ...]) -> None:
    limit, decay, lr = given
    k, alpha = expected
    assert limit * (1 - lr * decay) + lr == pytest.approx(k, abs=1e-12)
    assert soft_cap_alpha(k, limit) == pytest.approx(alpha, abs=6e-11)  # printed to ten decimals


@pytest.mark.parametrize(("given", "expected"), SOFT_CAPS)
def test_o4_2_soft_cap_lands_on_the_limit_and_is_monotone(
    given: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    limit, k = given[0], expected[0]
    alpha = soft_cap_alpha(k, limit)
    values = torch.linspace(0, k, 2001, dtype=torch.float64)
    mapped = soft_cap(values[:, None, None], alpha).flatten()
    assert mapped[-1].item() == pytest.approx(limit, abs=1e-9)
    assert bool((mapped.diff() > 0).all())


def test_o4_2_alpha_is_zero_where_decay_dominates_and_refused_where_none_exists() -> None:
    assert soft_cap_alpha(0.9, 1.0) == 0.0
    assert soft_cap_alpha(1.0, 1.0) == 0.0
    soft_cap_alpha(81 / 62 - 1e-9, 1.0)
    with pytest.raises(ValueError, match="81/62"):
        soft_cap_alpha(81 / 62 + 1e-9, 1.0)


def test_f2_hard_cap_polynomial_and_where_it_breaks() -> None:
    values = torch.tensor(list(HARD_POLYNOMIAL), dtype=torch.float64)
    mapped = polynomial(values[:, None, None]).flatten()
    expected = torch.tensor(list(HARD_POLYNOMIAL.values()), dtype=torch.float64)
    torch.testing.assert_close(mapped, expected, rtol=0, atol=6e-7)
    grid = polynomial(torch.linspace(0, 3.5, 35001, dtype=torch.float64)[:, None, None]).flatten()
    assert 1.01 < grid.max() <= OVERSHOOT


@pytest.mark.parametrize("largest", [0.5, 1.185, 3.4, 5.0, 40.0])
def test_o4_1_polynomial_cap_never_exceeds_the_limit(largest: float) -> None:
    weight, _, _ = with_values((9, 6), torch.linspace(largest, 0.1, 6, dtype=torch.float64))
    capped = torch.linalg.matrix_norm(polynomial_cap(weight.float(), 1.0).double(), 2)
    assert capped <= 1 + 1e-5  # fp32 products
    assert capped > min(largest, 1.0) * 0.94


MAPS: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]] = [
    (lambda w: hard_cap(w, 1.3), lambda s: s.clamp_max(1.3), 1e-10),
    (lambda w: normalize(w, 1.3), lambda s: s * 1.3 / 2.5, 1e-10),
    (lambda w: hammer(w, 1.3), lambda s: torch.cat([s.new_tensor([1.3]), s[1:]]), 1e-10),
    (lambda w: spectral_decay(w, 0.1), lambda s: torch.cat([0.9 * s[:1], s[1:]]), 1e-10),
    (lambda w: soft_cap(w, 0.02), lambda s: (y := s - 0.02 * s**3) + 0.02 * y**3, 1e-10),
    (lambda w: stiefel(w, 1.3), lambda s: torch.full_like(s, 1.3), 1e-5),  # Newton-Schulz in fp32
]
NAMES = ["hard_cap", "normalize", "hammer", "spectral_decay", "soft_cap", "stiefel"]


@pytest.mark.parametrize(("cap", "scalar", "tolerance"), MAPS, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_o4_3_caps_keep_the_singular_vectors(
    cap: Callable[[Tensor], Tensor],
    scalar: Callable[[Tensor], Tensor],
    tolerance: float,
    shape: tuple[int, int],
) -> None:
    values = spectrum(shape)
    weight, left, right = with_values(shape, values)
    torch.testing.assert_close(cap(weight), left * scalar(values) @ right, rtol=0, atol=tolerance)
    turn, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], dtype=torch.float64))
    torch.testing.assert_close(cap(turn @ weight), turn @ cap(weight), rtol=0, atol=tolerance)


def test_o4_4_hammer_and_spectral_decay_change_one_singular_value() -> None:
    weight, _, _ = with_values((3, 3), torch.tensor([3.0, 2.9, 0.5], dtype=torch.float64))
    for moved, expected in (
        (hammer(weight, 1.0), [2.9, 1.0, 0.5]),
        (spectral_decay(weight, 0.1), [2.9, 2.7, 0.5]),
    ):
        found = torch.linalg.svdvals(moved)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(hammer(torch.zeros(3, 2), 1.0), torch.zeros(3, 2))  # no direction to raise


@pytest.mark.parametrize("doublings", [4, 6, 8])
def test_gram_bound_is_above_the_norm_and_tight(doublings: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 48, 64, dtype=torch.float64)
    exact = torch.linalg.svdvals(weight)[..., 0]
    torch.testing.assert_close(spectral_norm(weight), exact, rtol=1e-12, atol=0)
    ratio = spectral_norm_bound(weight, doublings) / exact
    worst = 48 ** (1 / (4 * 2**doublings))
    assert bool((ratio >= 1 - 1e-12).all()) and bool((ratio <= worst).all())
    equal = spectral_norm_bound(torch.eye(48, dtype=torch.float64), doublings)
    assert equal.item() == pytest.approx(worst, rel=1e-12)  # all singular values equal is the worst case


def test_o4_10_rows_are_capped_in_storage_and_short_ones_left_alone() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(
        cap_rows(rows, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]) * torch.tensor([[2**0.5], [1.0]])
    )
    assert torch.equal(cap_rows(rows, 1.0)[1], rows[1])
