"""The numbers of `diagnose` as a table for a terminal: one line per layer, one column per quantity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmnorm.evaluation.curves import compact

# (key, head of the column); entries between layers are shown beside the layer they come out of.
COLUMNS = (
    ("stream_rms", "rms"),
    ("stream_variance", "variance"),
    ("angular_distance", "angle"),
    ("block_influence", "influence"),
    ("gradient_norm", "gradient"),
    ("update_ratio", "update"),
    ("removal_delta_perplexity", "ppl without"),
    ("massive_ratio", "max/median"),
    ("attention_entropy", "entropy"),
    ("max_attention_logit", "max logit"),
    ("gain_drift", "gain drift"),
)

# Shown for models with linear attention only.
LINEAR_COLUMNS = (
    ("smallest_denominator", "least denom"),
    ("output_to_value", "out/value"),
    ("state_effective_rank", "state rank"),
    ("saturated_exponents", "saturated"),
)


def layer_table(numbers: Mapping[str, Any]) -> str:
    """A header, x_0 (the embedding) as layer 0, then every layer; "-" where there is no number."""
    layers = numbers["num_layers"]
    columns = COLUMNS + tuple(column for column in LINEAR_COLUMNS if column[0] in numbers)
    lines = [["layer", *(head for _, head in columns)]]
    for layer in range(layers + 1):
        lines.append([str(layer), *(_cell(numbers.get(key), layer, layers) for key, _ in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )
    return "\n".join([table, *_notes(numbers)])


def _cell(values: list[Any] | None, layer: int, layers: int) -> str:
    if not values:
        return "-"
    place = layer if len(values) == layers + 1 else layer - 1
    value = values[place] if place >= 0 else None
    return "-" if value is None else compact(float(f"{value:.4g}"))


def _notes(numbers: Mapping[str, Any]) -> list[str]:
    notes = [f"{numbers['tokens']:,} tokens in windows of {numbers['context_length']}"]
    if numbers.get("perplexity") is not None:
        notes[0] += f"; perplexity {numbers['perplexity']:.4f} on {numbers['scored_tokens']:,}"
    if fits := numbers.get("variance_growth"):
        best = max(fits, key=lambda name: fits[name]["r2"])
        form = {"exponential": "exp({:.3g} l)", "power": "l^{:.3g}"}[best].format(fits[best]["slope"])
        notes.append(f"the variance grows like {form} (r2 {fits[best]['r2']:.3f})")
    if count := sum(numbers["massive_count"]):
        notes.append(f"{count:,} massive activations; massive_positions in the JSON says where")
    for layer, reason in numbers["attention_unavailable"].items():
        notes.append(f"no attention entropy for {layer}: {reason}")
    if reason := numbers.get("update_ratio_unavailable"):
        notes.append(f"no update ratio: {reason}")
    return notes
