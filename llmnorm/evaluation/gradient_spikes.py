"""Spikes of the gradient's norm: updates at which it is far above what it has just been.

    r_t = ||g_t|| / median(||g_(t-W)||, ..., ||g_(t-1)||),     W = 50, from the tenth update on
    spike: r_t > 10

The norm is that of the whole gradient before clipping, `grad_norm` in metrics.jsonl. The median runs along,
because norms fall by an order of magnitude while a run warms up, and trails, because a spike must not be in
what it is measured by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llmnorm.evaluation.curves import Point, downsampled

WINDOW = 50
FIRST = 10  # norms that a median needs
SPIKE = 10.0


def norms_of(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """(step, ||g||) of every update in a metrics.jsonl, nan where it was not finite."""
    found = [(row["step"], row["grad_norm"]) for row in rows if "grad_norm" in row]
    return [(step, math.nan if norm is None else norm) for step, norm in found]


def ratios(norms: Sequence[float]) -> list[float]:
    """r_t of every update from the tenth finite norm on; a norm that is not finite is left out."""
    finite = [norm for norm in norms if math.isfinite(norm)]
    result = []
    for t in range(FIRST, len(finite)):
        usual = statistics.median(finite[max(0, t - WINDOW) : t])
        result.append(finite[t] / usual if usual > 0 else 1.0)
    return result


def summarize(points: Sequence[Point]) -> dict[str, Any]:
    """`median` and `largest` norm, `largest_ratio` (largest r_t), `spikes`, `not_finite`, and the curve.

    A number is None where there is nothing to take it of. `curve`: [step, norm], None for a norm that was
    not finite; of a long run the extremes of each five-hundredth.
    """
    norms = [norm for _, norm in points]
    finite = [norm for norm in norms if math.isfinite(norm)]
    found = ratios(norms)
    known = [point for point in points if math.isfinite(point[1])]
    curve: list[list[float | None]] = [[step, float(f"{norm:.5g}")] for step, norm in downsampled(known)]
    curve += [[step, None] for step, norm in points if not math.isfinite(norm)]
    return {
        "median": statistics.median(finite) if finite else None,
        "largest": max(finite, default=None),
        "largest_ratio": max(found, default=None),
        "spikes": sum(ratio > SPIKE for ratio in found),
        "not_finite": len(norms) - len(finite),
        "curve": sorted(curve, key=lambda point: point[0] or 0),
    }


def joined(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of several runs: the mean of the medians, the largest of the rest, all spikes; None for no runs."""
    if not summaries:
        return None

    def known(key: str) -> list[float]:
        return [one[key] for one in summaries if one[key] is not None]

    return {
        "median": statistics.fmean(known("median")) if known("median") else None,
        "largest": max(known("largest"), default=None),
        "largest_ratio": max(known("largest_ratio"), default=None),
        "spikes": sum(one["spikes"] for one in summaries),
        "not_finite": sum(one["not_finite"] for one in summaries),
    }
