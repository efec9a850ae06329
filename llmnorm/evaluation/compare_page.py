"""plot.svg, table.md and report.html of a comparison, each one file that loads nothing.

The parts of the plot share their colors: the final loss of every variant (each seed, the mean and its
interval), held-out loss over the run (each seed faint behind the mean), and, where the study asked for it,
the gradient's norm of every seed, in which each spike shows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llmnorm.evaluation.compare_table import Row, facts, markdown, ranked, sweep_lines, table
from llmnorm.evaluation.curves import HEIGHT, WIDTH, Axis, Point, Series, chart, compact, ticks
from llmnorm.evaluation.report_style import STYLE

LABELS, VALUES = 150, 500  # x where the names end and where the numbers begin
ROW = 20
HEADING = 34
# Colors of the variants besides the baseline, on a light and on a dark page.
COLORS = (
    ("2563b8", "6aa5f0"),
    ("c2571a", "f09455"),
    ("2c8a57", "63c08c"),
    ("8a4fb5", "bf90e6"),
    ("b03060", "ec7ba2"),
    ("7a6a1f", "cdbb66"),
    ("0f7f8c", "4cc3cf"),
    ("d0478f", "f28cc0"),
    ("5b6b7a", "a3b1bf"),
    ("9c5a3c", "d19a7d"),
    ("4a6fe0", "93a9f5"),
    ("5f8f1f", "a6cf63"),
)


def write_pages(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write table.md, plot.svg and report.html and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"table.md": markdown(results), "plot.svg": plot(results), "report.html": page(results)}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def plot(results: Mapping[str, Any]) -> str:
    """The parts as one SVG document, light or dark as the reader's system."""
    rows = [row for row in ranked(results) if row["loss"]["n"]]
    baseline = results["settings"]["baseline"]
    others = [row["name"] for row in results["variants"] if row["name"] != baseline]
    colors = {baseline: "ink", **{name: f"v{i % len(COLORS) + 1}" for i, name in enumerate(others)}}
    final, height = _final_losses(results, rows, colors)
    parts = [_style(), _heading(16, "Final held-out loss", "each seed, mean and interval"), final]
    unit = "seconds of training" if results["settings"]["equal"] == "time" else "steps"
    panels = (
        ("Held-out loss", f"over {unit}, mean and each seed", _curves(results, rows, colors)),
        ("Gradient norm", f"before clipping, over {unit}, each seed", _norms(results, rows, colors)),
    )
    for title, note, series in panels:
        if any(len(line.points) > 1 for line in series):
            parts.append(_heading(height + 18, title, note))
            inner = chart(title, series)
            inner = inner[inner.index(">") + 1 : -len("</svg>")]
            parts.append(f'<g transform="translate(0 {height + 26})">{inner}</g>')
            height += 26 + HEIGHT
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(results['title'])}</title>{''.join(parts)}</svg>\n"
    )


def _style() -> str:
    def variables(theme: int) -> str:
        return " ".join(f"--v{i}: #{pair[theme]};" for i, pair in enumerate(COLORS, start=1))

    start = STYLE.index("svg .grid")
    shapes = STYLE[start : STYLE.index(".empty")].replace("svg .", ".")
    return (
        "<style>:root { --ink: #1d2126; --muted: #6a7078; --rule: #e6e6e3; --grid: #efefec; --lost: #c62f2f; "
        f"{variables(0)} }} @media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e7ea; "
        f"--muted: #969da5; --rule: #2c3238; --grid: #262b30; --lost: #ff7b72; {variables(1)} }} }} "
        "text { font-family: system-ui, sans-serif; } .name, .heading { fill: var(--ink); font-size: 12px; } "
        ".heading { font-weight: 620; } .seed { opacity: 0.45; } .interval { stroke-width: 2.4; }\n"
        f"{shapes}</style>"
    )


def _heading(y: float, title: str, note: str) -> str:
    return (
        f'<text class="heading" x="4" y="{y}">{escape(title)}</text>'
        f'<text class="tick end" x="{WIDTH - 4}" y="{y}">{escape(note)}</text>'
    )


def _final_losses(
    results: Mapping[str, Any], rows: Sequence[Row], colors: Mapping[str, str]
) -> tuple[str, int]:
    """A row per variant, best on top, and the height it all takes."""
    bottom = HEADING + ROW * len(rows)
    if not rows:
        return f'<text class="tick" x="4" y="{bottom}">No variant has a result yet.</text>', bottom + 10
    axis = _loss_axis(rows)
    parts = []
    for tick in ticks(axis, 5):
        x = axis(tick)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{HEADING - 8}" y2="{bottom - 6}"/>')
        parts.append(f'<text class="tick middle" x="{x}" y="{bottom + 10}">{compact(tick)}</text>')
    for row in rows:
        if row["name"] == results["settings"]["baseline"] and row["loss"]["mean"] <= axis.high:
            x = axis(row["loss"]["mean"])
            parts.append(f'<line class="reference" x1="{x}" x2="{x}" y1="{HEADING - 8}" y2="{bottom - 6}"/>')
    for number, row in enumerate(rows):
        parts.append(_final_loss(row, axis, HEADING + ROW * number + 6, colors[row["name"]]))
    return "".join(parts), bottom + 24


def _final_loss(row: Row, axis: Axis, y: int, color: str) -> str:
    loss = row["loss"]
    stroke, fill = f'style="stroke:var(--{color})"', f'style="fill:var(--{color})"'
    spread = "" if loss["sd"] is None else f" ± {loss['sd']:.4f}"
    parts = [
        f'<text class="name end" x="{LABELS}" y="{y + 4}">{escape(row["name"])}</text>',
        f'<text class="tick" x="{VALUES + 8}" y="{y + 4}">{loss["mean"]:.4f}{spread}</text>',
    ]
    if loss["mean"] > axis.high:
        tip = VALUES - 2
        parts.append(f'<path class="off" {fill} d="M{tip} {y}L{tip - 8} {y - 4}L{tip - 8} {y + 4}Z"/>')
        return "".join(parts)
    if loss["low"] is not None:
        low, high = axis(loss["low"]), axis(loss["high"])
        parts.append(f'<line class="interval" {stroke} x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>')
    for run in row["runs"]:
        parts.append(f'<circle class="seed" {fill} cx="{axis(run["loss"])}" cy="{y}" r="3"/>')
    parts.append(f'<circle class="mean" {fill} cx="{axis(loss["mean"])}" cy="{y}" r="4.5"/>')
    return "".join(parts)


def _loss_axis(rows: Sequence[Row]) -> Axis:
    """Seeds and intervals of every row, but a row far above the others gets an arrow and squeezes none."""
    means = [row["loss"]["mean"] for row in rows]
    middle = statistics.median(means)
    limit = middle + 5 * (middle - min(means)) if middle > min(means) else math.inf
    shown = [row for row in rows if row["loss"]["mean"] <= limit]
    values = [run["loss"] for row in shown for run in row["runs"]]
    values += [row["loss"][end] for row in shown for end in ("low", "high") if row["loss"][end] is not None]
    room = 0.05 * (max(values) - min(values)) or 1e-3 * abs(values[0]) or 1e-3
    return Axis(min(values) - room, max(values) + room, LABELS + 12, VALUES - 6)


def _curves(results: Mapping[str, Any], rows: Sequence[Row], colors: Mapping[str, str]) -> list[Series]:
    series = []
    for row in rows:
        color = colors[row["name"]]
        curves = [_points(results, row, run["curve"]) for run in row["runs"]]
        if len(curves) > 1:
            series += [Series(row["name"], color, points, faint=True) for points in curves]
        series.append(Series(row["name"], color, _mean_curve(curves)))
    return series


def _norms(results: Mapping[str, Any], rows: Sequence[Row], colors: Mapping[str, str]) -> list[Series]:
    """Every seed by itself: a mean would hide a spike."""
    return [
        Series(row["name"], colors[row["name"]], _points(results, row, run["gradient_norm"]["curve"]), True)
        for row in rows
        for run in row["runs"]
        if "gradient_norm" in run
    ]


def _points(results: Mapping[str, Any], row: Row, curve: Sequence[Sequence[Any]]) -> list[Point]:
    """(step or seconds, value), nan for a missing value."""
    scale = row["seconds_per_step"] if results["settings"]["equal"] == "time" else 1
    return [(step * scale, math.nan if value is None else value) for step, value in curve]


def _mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean where every seed has a point."""
    by_x = [dict(points) for points in curves]
    return [(x, statistics.fmean(c[x] for c in by_x)) for x, _ in curves[0] if all(x in c for c in by_x)]


def page(results: Mapping[str, Any]) -> str:
    """report.html: the plot, the table, warnings, the sweep and the command."""
    title, (heading, *rows) = escape(results["title"]), table(results)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heading)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    not_run = [f"{entry['run']}: {entry['status']}: {entry['reason']}" for entry in results["not_run"]]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE} th {{ width: auto; }} .wide {{ overflow-x: auto; }} "
        f"figure {{ max-width: 860px; }}</style></head><body><main><header><h1>{title}</h1></header>"
        f"<h2>Plot</h2><figure>{plot(results)}</figure>"
        f'<h2>Table</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f"<p>{escape(' '.join(facts(results)))}</p>"
        + _list("Warnings", results["warnings"])
        + _list("Without a result", not_run)
        + _list("Sweep of learning rates: held-out loss", sweep_lines(results))
        + f"<h2>Command</h2><pre>{escape(results['command'])}</pre></main></body></html>\n"
    )


def _cell(text: str) -> str:
    if text.startswith("**"):
        return f"<td><b>{escape(text.strip('*'))}</b></td>"
    return f"<td>{escape(text)}</td>"


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"<h2>{escape(title)}</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
