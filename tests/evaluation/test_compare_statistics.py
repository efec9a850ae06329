"""Intervals and p-values against tables and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from llmnorm.evaluation.compare_statistics import estimate, holm, inside, paired, t_quantile


@pytest.mark.parametrize(
    ("df", "quantile"),
    # Two-sided 95 % points of Student's t, as every table has them.
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (9, 2.26216), (30, 2.04227)],
)
def test_quantiles_are_those_of_the_tables(df: int, quantile: float) -> None:
    assert t_quantile(0.95, df) == pytest.approx(quantile, rel=3e-6)  # the tables have six digits
    assert inside(quantile, df) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 5.0, 200.0])
def test_closed_forms(t: float) -> None:
    assert inside(t, 1) == pytest.approx(2 / math.pi * math.atan(t), abs=1e-15)  # Cauchy
    assert inside(t, 2) == pytest.approx(t / math.sqrt(2 + t * t), abs=1e-15)
    assert inside(t, 2000) == pytest.approx(math.erf(t / math.sqrt(2)), abs=2e-4)  # nearly normal


def test_an_estimate_by_hand() -> None:
    result = estimate([2.0, 4.0, 6.0])  # sd 2, half width 4.30265 * 2 / sqrt 3
    assert (result.n, result.mean, result.sd) == (3, 4.0, 2.0)
    assert result.low == pytest.approx(4 - 4.968275, abs=1e-5)
    assert result.high == pytest.approx(4 + 4.968275, abs=1e-5)
    one = estimate([3.5])
    assert (one.n, one.mean, one.sd, one.low, one.high) == (1, 3.5, None, None, None)
    assert estimate([]).mean is None


def test_a_paired_difference_by_hand() -> None:
    # d = 0.1, 0.2, 0.3: mean 0.2, sd 0.1, t = 0.2 sqrt(3) / 0.1 = 3.4641, p = 1 - t / sqrt(2 + t^2)
    baseline = {1: 3.0, 2: 4.0, 3: 5.0, 4: 9.0}
    difference, p = paired({1: 3.1, 2: 4.2, 3: 5.3, 7: 1.0}, baseline)
    assert (difference.n, difference.mean, difference.sd) == (3, pytest.approx(0.2), pytest.approx(0.1))
    assert p == pytest.approx(1 - 3.4641016 / math.sqrt(14), abs=1e-7)
    assert difference.low == pytest.approx(0.2 - 4.30265 * 0.1 / math.sqrt(3), abs=1e-5)
    assert paired({1: 3.1}, baseline)[1] is None
    assert paired({1: 3.5, 2: 4.5}, baseline)[1] == 0.0, "the same difference each time"
    assert paired({1: 3.0, 2: 4.0}, baseline)[1] == 1.0


def test_holm() -> None:
    # Sorted 0.01, 0.03, 0.04, 0.2 times 4, 3, 2, 1, made monotone.
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.2, "e": None})
    assert adjusted == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.2, "e": None}, nan_ok=True)
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
