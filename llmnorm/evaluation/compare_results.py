"""results.json: every number of a comparison, from which its table and plot are made.

Nothing in it names a person or a machine: folders of absolute paths are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmnorm.evaluation.compare_runs import Run
from llmnorm.evaluation.compare_statistics import Estimate, estimate, holm, paired
from llmnorm.evaluation.compare_study import Study, Variant
from llmnorm.evaluation.gradient_spikes import joined

FORMAT = 1
ABSOLUTE = re.compile(r"(?<![\w.~])/(?:[^\s/=,;:'\"\[\]{}()]+/)+")
# Numbers that are averaged over the measured runs, and those of which the largest counts.
MEANS = ("training_loss", "tokens_per_second", "seconds_per_step", "optimizer_seconds")
LARGEST = ("peak_memory_gib", "state_bytes", "parameters", "tokens")


def best_rate(sweep: Sequence[Run]) -> float | None:
    """The rate with the lowest final loss, None while a run of the sweep may still end, or if all failed."""
    outcomes = {run.lr: run.outcome() for run in sweep}
    if any(outcome["status"] not in ("finished", "failed") for outcome in outcomes.values()):
        return None
    losses = {lr: outcome["loss"] for lr, outcome in outcomes.items() if outcome["status"] == "finished"}
    return min(losses, key=losses.__getitem__) if losses else None


def edge(lr: float | None, lrs: Sequence[float]) -> str | None:
    """`lowest` or `highest` if the best of several rates is the last one tried on that side."""
    if lr is None or len(lrs) < 2:
        return None
    return {min(lrs): "lowest", max(lrs): "highest"}.get(lr)


def build_results(
    study: Study,
    plan: Mapping[str, tuple[Sequence[Run], float | None, Sequence[Run]]],
    *,
    command: str,
    environment: Mapping[str, Any],
    interval: bool,
) -> dict[str, Any]:
    """The content of results.json.

    plan: variant -> (runs of its sweep, its best rate or None, its measured runs, none without a rate).
    """
    losses = {name: _losses(runs) for name, (_, _, runs) in plan.items()}
    rows = [_row(study, variant, *plan[variant.name], interval) for variant in study.variants]
    if interval:
        _compare_with_baseline(rows, losses, study.baseline)
    not_run = [entry for variant in study.variants for entry in _not_run(study, variant, *plan[variant.name])]
    result = {
        "format": FORMAT,
        "title": study.title,
        "command": command,
        "date": environment["date"],
        "environment": dict(environment),
        "settings": {
            "baseline": study.baseline,
            "equal": study.equal,
            "steps": study.steps,
            "sweep_steps": study.sweep_steps,
            "tokens_per_step": study.base.tokens_per_step,
            "seeds": study.run_seeds,
            "sweep_seed": study.sweep_seed,
            "interval": interval,
        },
        "base": {
            key: value
            for key, value in study.base.config.to_dict().items()
            if key in ("model", "data", "optimizer", "schedule", "train", "evaluation")
        },
        "variants": rows,
        "not_run": not_run,
        "warnings": [*study.notes(), *_warnings(rows, plan)],
    }
    return without_folders(result)


def without_folders(value: Any) -> Any:
    """The value with every absolute path in its texts cut down to its last part."""
    if isinstance(value, str):
        return ABSOLUTE.sub(".../", value)
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return value


def _losses(runs: Sequence[Run]) -> dict[int, float]:
    outcomes = {run.seed: run.outcome() for run in runs}
    return {seed: outcome["loss"] for seed, outcome in outcomes.items() if outcome["status"] == "finished"}


def _row(
    study: Study,
    variant: Variant,
    sweep: Sequence[Run],
    lr: float | None,
    runs: Sequence[Run],
    interval: bool,
) -> dict[str, Any]:
    outcomes = [(run, run.outcome()) for run in runs]
    finished = [(run, outcome) for run, outcome in outcomes if outcome["status"] == "finished"]
    loss = estimate([outcome["loss"] for _, outcome in finished])
    if not interval:
        loss = Estimate(loss.n, loss.mean, loss.sd)
    numbers: dict[str, Any] = {}
    for key in (*MEANS, *LARGEST):
        known = [outcome[key] for _, outcome in finished if outcome.get(key) is not None]
        average = sum(known) / len(known) if known and key in MEANS else None
        numbers[key] = max(known, default=None) if key in LARGEST else average
    steps = runs[0].steps if runs else None
    measured = ["loss", "training_loss", "tokens_per_second", "curve", "environment"]
    if study.gradient_norms:
        numbers["gradient_norm"] = joined(_gradient_norms(run for run, _ in finished))
        measured.append("gradient_norm")
    return {
        "name": variant.name,
        "changes": dict(variant.changes),
        "lr": lr,
        "lr_at_edge": edge(lr, variant.lrs) if sweep else None,
        "sweep": [_sweep_point(run, study.gradient_norms) for run in sweep],
        "steps": steps,
        "loss": loss.to_dict(),
        **numbers,
        "runs": [
            {"seed": run.seed, **{key: outcome[key] for key in measured if key in outcome}}
            for run, outcome in finished
        ],
    }


def _gradient_norms(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Those of the runs that have them; runs of an earlier version do not."""
    found = [run.outcome().get("gradient_norm") for run in runs]
    return [one for one in found if one is not None]


def _sweep_point(run: Run, gradient_norms: bool) -> dict[str, Any]:
    """The rate, its final loss, and the summary of its gradient's norm if asked for, without the curve."""
    point = {"lr": run.lr, "loss": run.outcome().get("loss")}
    return {**point, "gradient_norm": joined(_gradient_norms([run]))} if gradient_norms else point


def _compare_with_baseline(
    rows: list[dict[str, Any]], losses: Mapping[str, dict[int, float]], baseline: str
) -> None:
    """Add `difference` to every other row: the paired mean, its interval, p-value and Holm's p-value."""
    differences = {
        name: paired(values, losses[baseline]) for name, values in losses.items() if name != baseline
    }
    adjusted = holm({name: p for name, (_, p) in differences.items()})
    for row in rows:
        if row["name"] != baseline:
            difference, p = differences[row["name"]]
            row["difference"] = {**difference.to_dict(), "p": p, "p_holm": adjusted[row["name"]]}


def _not_run(
    study: Study, variant: Variant, sweep: Sequence[Run], lr: float | None, runs: Sequence[Run]
) -> list[dict[str, str]]:
    entries = []
    for run in (*sweep, *runs):
        outcome = run.outcome()
        if outcome["status"] != "finished":
            entries.append({"run": run.key, "status": outcome["status"], "reason": outcome["reason"]})
    if lr is None or not runs:
        failed = bool(sweep) and all(run.outcome()["status"] == "failed" for run in sweep)
        entries += [
            {
                "run": f"{variant.name} seed {seed}",
                "status": "failed" if failed else "waiting",
                "reason": "no learning rate finished the sweep" if failed else "waits for the sweep",
            }
            for seed in study.run_seeds
        ]
    return entries


def _warnings(
    rows: Sequence[Mapping[str, Any]],
    plan: Mapping[str, tuple[Sequence[Run], float | None, Sequence[Run]]],
) -> list[str]:
    warnings = []
    for row in rows:
        if row["lr_at_edge"]:
            other = "lower" if row["lr_at_edge"] == "lowest" else "higher"
            warnings.append(
                f"{row['name']}: the best learning rate {row['lr']:g} is the {row['lr_at_edge']} that was "
                f"tried; add a {other} one and run again"
            )
        if 0 < row["loss"]["n"] < len(plan[row["name"]][2]):
            warnings.append(
                f"{row['name']}: {row['loss']['n']} of {len(plan[row['name']][2])} seeds finished, and its "
                "mean is over those"
            )
    measured = [run["environment"] for row in rows for run in row["runs"]]
    for key, what in (
        ("device", "devices"),
        ("torch", "versions of torch"),
        ("threads", "numbers of threads"),
    ):
        found = sorted({str(environment[key]) for environment in measured})
        if len(found) > 1:
            warnings.append(f"runs were measured on different {what}: {', '.join(found)}")
    return warnings
