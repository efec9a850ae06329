"""report.html: one page that shows a run, with nothing to install, download or run.

Curves of loss, held-out perplexity, learning rate, gradient norm and speed; the layers, where the run was
diagnosed; the final numbers; the resolved config; the environment. Inline SVG and CSS only; light and dark
follow the reader's system.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llmnorm.config import yaml_dialect
from llmnorm.errors import UserError
from llmnorm.evaluation.curves import Point, Series, chart, compact, smoothed
from llmnorm.evaluation.environment import describe_environment
from llmnorm.evaluation.held_out import EVALUATION_KEY, METRICS, held_out_numbers
from llmnorm.evaluation.report_layers import layer_figures
from llmnorm.evaluation.report_style import STYLE

SET_COLORS = ("c2", "c3", "c4", "c5", "c6")
ENVIRONMENTS = (
    ("environment.json", "Environment of the run"),
    ("export/environment.json", "Environment of the export"),
)


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from its metrics.jsonl, config.yaml and environment and return its path.

    Works on a run that is unfinished, was resumed, or has a torn last line. An existing report is replaced
    whole. Raises UserError when `run_dir` has no metrics.jsonl.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    config_file = run_dir / "config.yaml"
    config_text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
    config, _ = yaml_dialect.parse(config_text, str(config_file))
    page = _page(run_dir, rows, config_text, config or {})
    target, draft = run_dir / "report.html", run_dir / "report.html.tmp"
    draft.write_text(page, encoding="utf-8")
    draft.replace(target)
    return target


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order of step; a torn last line, left by a kill, is left out."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist, so there is no run to read in {path.parent}; give the output_dir of a "
            "run."
        )
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                continue
            raise UserError(f"{path} line {number} is not JSON; repair or remove that line.") from None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


def points_of(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row that has `key`; null becomes nan, and the last row of a step wins."""
    points = {row["step"]: math.nan if row[key] is None else float(row[key]) for row in rows if key in row}
    return sorted(points.items())


def _page(run_dir: Path, rows: list[dict[str, Any]], config_text: str, config: Mapping[str, Any]) -> str:
    name = run_dir.resolve().name
    title, environment = _environment(run_dir)
    figures = "".join(
        _figure(title, note, svg, legend) for title, note, svg, legend in _figures(rows, config)
    )
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(name)}</h1><p>{escape(_subtitle(config))}</p></header>"
        f'<section class="tiles">{"".join(_tile(*tile) for tile in _tiles(rows, config))}</section>'
        f'<section class="charts">{figures}</section>'
        f"{_held_out(rows)}"
        f"<section><h2>Configuration</h2><details><summary>config.yaml, every key resolved</summary>"
        f"<pre>{escape(config_text) or 'No config.yaml in this run.'}</pre></details></section>"
        f"<section><h2>{title}</h2>{_table(environment)}</section>"
        "</main></body></html>\n"
    )


def _environment(run_dir: Path) -> tuple[str, dict[str, Any]]:
    for name, title in ENVIRONMENTS:
        if (run_dir / name).exists():
            return title, json.loads((run_dir / name).read_text(encoding="utf-8"))
    return "Environment in which this report was written", describe_environment()


def _subtitle(config: Mapping[str, Any]) -> str:
    model, optimizer = config.get("model") or {}, config.get("optimizer") or {}
    train, data = config.get("train") or {}, config.get("data") or {}
    facts = [
        model.get("preset"),
        model.get("norm") if isinstance(model.get("norm"), str) else None,
        optimizer.get("name"),
        f"lr {optimizer['lr']:g}" if isinstance(optimizer.get("lr"), int | float) else None,
        f"batch {train['global_batch_size']}" if train.get("global_batch_size") else None,
        f"context {data['sequence_length']}" if data.get("sequence_length") else None,
        train.get("precision"),
    ]
    return " · ".join(str(fact) for fact in facts if fact)


def _evaluations(rows: list[dict[str, Any]], metric: str) -> dict[str, list[Point]]:
    """Validation set -> its (step, value); of a run with several sets, without the pooled numbers."""
    keys = {key for row in rows for key in row}
    found = {
        match["name"] or "held-out": points_of(rows, key)
        for key in sorted(keys)
        if (match := EVALUATION_KEY.fullmatch(key)) and match["metric"] == metric
    }
    if len(found) > 1:
        found.pop("held-out", None)
    return found


def _figures(
    rows: list[dict[str, Any]], config: Mapping[str, Any]
) -> list[tuple[str, str, str, list[tuple[str, str]]]]:
    """(title, note, svg, legend) of each chart that has data; a legend entry is (color, label)."""
    figures = []
    loss = points_of(rows, "loss")
    held_out = _evaluations(rows, "loss")
    series = _with_trend("training", loss) + _sets(held_out)
    if loss or held_out:
        figures.append(("Loss", "nats per token", chart("Loss", series), _legend(series)))

    perplexities = _evaluations(rows, "perplexity")
    if perplexities:
        paper = (config.get("paper") or {}).get("perplexity")
        reference = (f"paper {paper:g}", float(paper)) if paper else None
        series = _sets({name: _without_untrained(points) for name, points in perplexities.items()})
        svg = chart("Held-out perplexity", series, reference)
        figures.append(("Held-out perplexity", "token-weighted", svg, _legend(series)))
    for key, title, note, noisy in (
        ("lr", "Learning rate", "", False),
        ("grad_norm", "Gradient norm", "before clipping", True),
        ("tokens_per_second", "Tokens per second", "", True),
    ):
        if points := points_of(rows, key):
            series = _with_trend(title, points) if noisy else [Series(title, "c1", points)]
            figures.append((title, note, chart(title, series), []))
    return figures + layer_figures(rows)


def _with_trend(label: str, points: list[Point]) -> list[Series]:
    """A noisy line, faint behind its moving median once there are enough points for one."""
    if len(points) < 200:
        return [Series(label, "c1", points)]
    return [Series(label, "c1", points, faint=True), Series(label, "c1", smoothed(points))]


def _without_untrained(points: list[Point]) -> list[Point]:
    """An untrained model's perplexity is near the vocabulary size and would flatten all that follows."""
    return points[1:] if len(points) > 2 and points[0][1] > 10 * points[-1][1] else points


def _sets(held_out: Mapping[str, list[Point]]) -> list[Series]:
    return [
        Series(name, SET_COLORS[number % len(SET_COLORS)], points, dots=True)
        for number, (name, points) in enumerate(held_out.items())
    ]


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    return [(line.color, line.label) for line in series if not line.faint]


def _tiles(rows: list[dict[str, Any]], config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, note) of the final numbers."""
    tiles = []
    steps = points_of(rows, "loss")
    last = int(steps[-1][0]) if steps else 0
    planned = (config.get("train") or {}).get("max_steps")
    tiles.append(("Steps", f"{last:,}", f"of {planned:,}" if planned else ""))
    losses = [value for _, value in steps if math.isfinite(value)]
    if losses:
        tail = losses[-max(1, min(100, len(losses) // 10)) :]
        note = f"mean of the last {len(tail)} steps" if len(tail) > 1 else "last step"
        tiles.append(("Training loss", f"{statistics.fmean(tail):.4f}", note))
    for name, points in _evaluations(rows, "perplexity").items():
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        if finite:
            best_step, best = min(finite, key=lambda point: point[1])
            note = "its lowest" if best == finite[-1][1] else f"lowest {best:.4g} at step {int(best_step):,}"
            tiles.append((f"Perplexity, {name}", f"{finite[-1][1]:.4g}", note))
    if tokens := points_of(rows, "tokens"):
        tiles.append(("Tokens trained on", compact(tokens[-1][1]), ""))
    speeds = [value for _, value in points_of(rows, "tokens_per_second") if math.isfinite(value)]
    if speeds:
        tiles.append(("Tokens per second", compact(statistics.median(speeds)), "median"))
    lost = len(steps) - len(losses)
    if lost:
        tiles.append(("Not finite", f"{lost:,}", "steps whose loss was not a number"))
    return tiles


def _held_out(rows: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of the last evaluation, one line for each set."""
    last: dict[str, Any] = next((row for row in reversed(rows) if "eval/loss" in row), {})
    found = held_out_numbers(last)
    columns = [metric for metric in METRICS if any(metric in numbers for numbers in found.values())]
    if not columns:
        return ""
    head = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in ("", *columns))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_number(numbers.get(column)) for column in columns)}</tr>"
        for name, numbers in found.items()
    )
    title = f"<h2>Held-out text at step {last['step']:,}</h2>"
    return f'<section>{title}<table class="numbers"><tr>{head}</tr>{body}</table></section>'


def _number(value: float | None) -> str:
    if value is None:
        return "<td></td>"
    return f"<td>{value:,}</td>" if isinstance(value, int) else f"<td>{value:,.4f}</td>"


def _tile(label: str, value: str, note: str) -> str:
    parts = (("label", label), ("value", value), ("note", note))
    return f'<div class="tile">{"".join(_span(*part) for part in parts)}</div>'


def _figure(title: str, note: str, svg: str, legend: list[tuple[str, str]]) -> str:
    swatches = "".join(
        f'<span class="key"><i style="background:var(--{color})"></i>{escape(label)}</span>'
        for color, label in legend
    )
    caption = f'{_span("title", title)}{_span("note", note)}<span class="keys">{swatches}</span>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{escape(text)}</span>'


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>"
        for key, value in values.items()
        if value is not None
    )
    return f"<table>{rows}</table>"
