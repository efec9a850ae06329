"""The results of a comparison as Markdown: one table, what it was measured with, and what to be wary of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmnorm.errors import UserError
from llmnorm.evaluation.compare_statistics import LEVEL, SIGNIFICANT
from llmnorm.evaluation.gradient_spikes import SPIKE, WINDOW

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A heading and the text of a row under it; a column without any text is left out."""

    heading: str
    cell: Callable[[Row], str]


def read_results(path: Path) -> dict[str, Any]:
    """A results.json. Raises `UserError` for a file that is none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["format"] == 1 and results["variants"]:
            return dict(results)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the results.json of a comparison"
        ) from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} does not hold the results of a comparison; give its results.json")


def ranked(results: Mapping[str, Any]) -> list[Row]:
    """The rows by mean loss, lowest first, then those that have none."""
    rows: Sequence[Row] = results["variants"]
    return sorted(rows, key=lambda row: (row["loss"]["mean"] is None, row["loss"]["mean"]))


def verdict(row: Row) -> str:
    """better or worse than the baseline where Holm's p-value is below 0.05, else not distinguishable."""
    difference = row.get("difference")
    if difference is None or difference["p_holm"] is None:
        return ""
    if difference["p_holm"] >= SIGNIFICANT:
        return "not distinguishable"
    return "better" if difference["mean"] < 0 else "worse"


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Headings, then one row of cells per variant."""
    settings = results["settings"]
    baseline, seeds = settings["baseline"], len(settings["seeds"])
    columns = (
        Column("variant", lambda row: f"**{row['name']}**" if row["name"] == baseline else row["name"]),
        Column("lr", _rate),
        Column(
            "steps", lambda row: f"{row['steps']:,}" if settings["equal"] == "time" and row["steps"] else ""
        ),
        Column("validation loss", lambda row: _number(row["loss"]["mean"], ".4f")),
        Column("sd", lambda row: _number(row["loss"]["sd"], ".4f")),
        Column("n", lambda row: str(row["loss"]["n"]) if row["loss"]["n"] < seeds else ""),
        Column(f"{LEVEL:.0%} interval", lambda row: _interval(row["loss"], ".4f")),
        Column(f"minus {baseline}", lambda row: _number((row.get("difference") or {}).get("mean"), "+.4f")),
        Column("its interval", lambda row: _interval(row.get("difference") or {}, "+.4f")),
        Column("p", lambda row: _probability((row.get("difference") or {}).get("p"))),
        Column("p (Holm)", lambda row: _probability((row.get("difference") or {}).get("p_holm"))),
        Column(f"against {baseline}", verdict),
        Column("tokens/s", lambda row: _number(row["tokens_per_second"], ",.0f")),
        Column("optimizer ms", lambda row: _milliseconds(row.get("optimizer_seconds"))),
        Column("state MiB", lambda row: _mebibytes(row["state_bytes"])),
        Column("peak GiB", lambda row: _number(row["peak_memory_gib"], ".2f")),
        Column("gradient norm", lambda row: _number(_norm(row, "median"), ".3g")),
        Column("its largest", lambda row: _number(_norm(row, "largest"), ".3g")),
        Column("its largest ratio", lambda row: _number(_norm(row, "largest_ratio"), ".2f")),
        Column("spikes", lambda row: _number(_norm(row, "spikes"), "d")),
    )
    rows = ranked(results)
    cells = [[column.cell(row) for row in rows] for column in columns]
    shown = [(column.heading, texts) for column, texts in zip(columns, cells, strict=True) if any(texts)]
    return [[heading for heading, _ in shown], *([texts[i] for _, texts in shown] for i in range(len(rows)))]


def facts(results: Mapping[str, Any]) -> list[str]:
    """What the numbers were measured with, one sentence each."""
    settings, environment = results["settings"], results["environment"]
    tokens = settings["steps"] * settings["tokens_per_step"]
    budget = {
        "tokens": f"{tokens:,} training tokens for every variant ({settings['steps']:,} steps of the "
        "baseline)",
        "time": f"the time that {settings['baseline']} takes for {settings['steps']:,} steps "
        f"({tokens:,} tokens) for every variant; steps follow from the median step time in the sweep",
    }[settings["equal"]]
    swept = any(row["sweep"] for row in results["variants"])
    seeds = ", ".join(map(str, settings["seeds"]))
    model, data, train = (results["base"][section] for section in ("model", "data", "train"))
    size = model["preset"] or f"{model['num_hidden_layers']} x {model['hidden_size']}"
    lines = [
        f"Model {size}, {train['global_batch_size']} x {data['sequence_length']} tokens per step, "
        f"{train['precision']}, text {_sources(data['train_files'])}.",
        f"Held-out loss in nats per token after {budget}, seeds {seeds}, the same for every variant.",
        f"Learning rates were chosen by the held-out loss of {settings['sweep_steps']:,}-step runs with seed "
        f"{settings['sweep_seed']}."
        if swept
        else "",
        f"Intervals are {LEVEL:.0%} t-intervals over seeds; differences are paired by seed; a verdict needs "
        f"p (Holm) < {SIGNIFICANT:.2f}."
        if settings["interval"]
        else "No interval was asked for, so nothing is said about chance.",
        "The gradient's norm is taken before clipping: its median over a run, and over all runs its largest "
        f"value, its largest ratio to the median of the {WINDOW} updates before, and how often that ratio "
        f"was above {SPIKE:g} (spikes)."
        if any(row.get("gradient_norm") for row in results["variants"])
        else "",
        f"{environment['device']} ({environment['threads']} threads), torch {environment['torch']}, Python "
        f"{environment['python']}, llmnorm {environment['llmnorm']} ({environment['git_revision']}), "
        f"{results['date'][:10]}.",
    ]
    return [line for line in lines if line]


def markdown(results: Mapping[str, Any]) -> str:
    """The table, the sweep, the facts, the warnings, what has no result, and the command."""
    heading, *rows = table(results)
    aligned = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    parts = ["\n".join(f"| {' | '.join(cells)} |" for cells in aligned)]
    parts.append(" ".join(facts(results)))
    if results["warnings"]:
        parts.append("\n".join(f"- **Warning**: {warning}." for warning in results["warnings"]))
    if results["not_run"]:
        lines = [f"- {entry['run']}: {entry['status']}: {entry['reason']}" for entry in results["not_run"]]
        parts.append("Without a result:\n\n" + "\n".join(lines))
    if sweeps := sweep_lines(results):
        parts.append(
            "Held-out loss in the sweep, by learning rate:\n\n" + "\n".join(f"- {s}" for s in sweeps)
        )
    parts.append(f"```\n{results['command']}\n```")
    return "\n\n".join(parts) + "\n"


def sweep_lines(results: Mapping[str, Any]) -> list[str]:
    """`name: 0.001 3.4567, ...` for each variant that had a sweep."""
    return [
        f"{row['name']}: "
        + ", ".join(
            f"{point['lr']:g} → {_number(point['loss'], '.4f') or 'none'}{_spikes(point)}"
            for point in row["sweep"]
        )
        for row in results["variants"]
        if row["sweep"]
    ]


def insert(results_path: Path, page: Path) -> None:
    """Put the Markdown of `results_path` between its two marks in `page`.

    `<!-- compare: NAME -->` and `<!-- end of NAME -->`, with NAME the results' file name without `.json`.
    """
    text = markdown(read_results(results_path))
    name = results_path.stem
    begin, end = f"<!-- compare: {name} -->", f"<!-- end of {name} -->"
    try:
        content = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--into {page} cannot be read ({error.strerror}); give a Markdown file") from error
    before, found, rest = content.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise UserError(f"--into {page} lacks the lines {begin} and {end}; add them where the table belongs")
    page.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def _sources(files: str | Sequence[str]) -> str:
    return files if isinstance(files, str) else ", ".join(files)


def _rate(row: Row) -> str:
    if row["lr"] is None:
        return ""
    return f"{row['lr']:g}" + (" (edge)" if row["lr_at_edge"] else "")


def _norm(row: Row, key: str) -> Any:
    """A number of the gradient's norm; None where the study did not ask for it."""
    return (row.get("gradient_norm") or {}).get(key)


def _spikes(point: Row) -> str:
    spikes = _norm(point, "spikes")
    return f" ({spikes} spike{'s' if spikes > 1 else ''})" if spikes else ""


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _interval(values: Mapping[str, Any], style: str) -> str:
    if values.get("low") is None:
        return ""
    return f"{values['low']:{style}} to {values['high']:{style}}"


def _probability(p: float | None) -> str:
    return "" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.2f}"
