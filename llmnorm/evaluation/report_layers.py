"""The layers of a run in report.html: each diagnosed quantity along the depth, at a few steps of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmnorm.evaluation.curves import Point, Series, chart, compact

# key in metrics.jsonl, without `diagnostics/` -> (title, note)
FIGURES = {
    "stream_rms": ("Residual stream by layer", "RMS; layer 0 is the embedding"),
    "angular_distance": ("Angular distance by layer", "angle to the layer before / pi"),
    "block_influence": ("Block influence by layer", "1 - cos"),
    "gradient_norm": ("Gradient norm by layer", "before clipping"),
    "update_ratio": ("Update / weight by layer", "matrices"),
    "removal_delta_perplexity": ("Perplexity without each layer", "added"),
    "massive_ratio": ("Largest activation by layer", "over the median"),
    "attention_entropy": ("Attention entropy by layer", "nats"),
    "max_attention_logit": ("Largest attention logit by layer", ""),
    "gain_drift": ("Gain drift by layer", "RMS of gain / gain_0 - 1"),
}
STEP_COLORS = ("c3", "c4", "c2", "c1")  # the last one shown is the model as it is now

Figure = tuple[str, str, str, list[tuple[str, str]]]


def layer_figures(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """(title, note, svg, legend) of each quantity that the run diagnosed, at no more than four steps."""
    figures = []
    for key, (title, note) in FIGURES.items():
        profiles = {row["step"]: row[f"diagnostics/{key}"] for row in rows if row.get(f"diagnostics/{key}")}
        shown = _spread(sorted(profiles), len(STEP_COLORS))
        colors = STEP_COLORS[len(STEP_COLORS) - len(shown) :]
        series = [
            Series(f"step {compact(step)}", color, _points(profiles[step], _layers(rows)), dots=True)
            for step, color in zip(shown, colors, strict=True)
        ]
        if any(math.isfinite(y) for line in series for _, y in line.points):
            legend = [(line.color, line.label) for line in series]
            figures.append((title, note, chart(title, series), legend))
    return figures


def _layers(rows: Sequence[Mapping[str, Any]]) -> int:
    return next(
        (len(row["diagnostics/block_influence"]) for row in rows if row.get("diagnostics/block_influence")), 0
    )


def _points(values: Sequence[float | None], layers: int) -> list[Point]:
    """Layers 1 ... L, or 0 ... L where the embedding has a value as well; null becomes nan."""
    first = 0 if len(values) == layers + 1 else 1
    return [(first + place, math.nan if y is None else float(y)) for place, y in enumerate(values)]


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of `steps`, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)]
