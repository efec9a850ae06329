"""Means with intervals, paired differences and their p-values, for a handful of seeds.

    interval = mean +- t_(n-1) sd / sqrt(n)          p = P(|T_(n-1)| > |mean d| sqrt(n) / sd d)

with sd the sample standard deviation (n - 1) and T Student's t, whose distribution function is a finite sum
for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4). Several variants are compared with
one baseline, so p-values are also given as Holm adjusts them ("A simple sequentially rejective multiple test
procedure", 1979).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.95
SIGNIFICANT = 1 - LEVEL


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; what needs two values is None for one, everything for none."""

    n: int
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inside(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t with `df` degrees of freedom."""
    theta = math.atan(t / math.sqrt(df))
    cos, sin = math.cos(theta), math.sin(theta)
    if df % 2:
        term, total = cos, cos if df > 1 else 0.0
        for j in range(1, (df - 1) // 2):
            term *= 2 * j / (2 * j + 1) * cos * cos
            total += term
        return 2 / math.pi * (theta + sin * total)
    term = total = 1.0
    for j in range(1, df // 2):
        term *= (2 * j - 1) / (2 * j) * cos * cos
        total += term
    return sin * total


def t_quantile(level: float, df: int) -> float:
    """The t with P(|T| <= t) = level: 12.706 for 95 % and one degree of freedom, 4.303 for two."""
    low, high = 0.0, 1.0
    while inside(high, df) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, df) < level else (low, middle)
    return high


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean, sample standard deviation and t-interval of independent values."""
    n = len(values)
    if n < 2:
        return Estimate(n, *values)
    mean, sd = statistics.fmean(values), statistics.stdev(values)
    half = t_quantile(level, n - 1) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, mean - half, mean + half)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[Estimate, float | None]:
    """The mean of value - baseline over the seeds that both have, and the p-value of its being zero.

    The p-value is None for fewer than two pairs.
    """
    difference = estimate([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])
    if difference.sd is None or difference.mean is None:
        return difference, None
    if difference.sd == 0:
        return difference, 0.0 if difference.mean else 1.0
    t = abs(difference.mean) * math.sqrt(difference.n) / difference.sd
    return difference, 1 - inside(t, difference.n - 1)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjustment: the k-th smallest of m is multiplied by m - k + 1, and never less than a smaller
    one.
    """
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    largest = 0.0
    for place, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p))
        adjusted[name] = largest
    return adjusted
