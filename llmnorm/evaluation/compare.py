"""`llmnorm compare`: variants of a run at their best learning rate, over paired seeds, with the spread.

sweep of learning rates (one seed) -> the best rate of each variant -> paired seeds at that rate ->
results.json -> table.md, plot.svg, report.html

    output_dir/state.json     what is compared, so that no other comparison is mixed in
    output_dir/runs/          ordinary run directories, see compare_runs

Everything is resumable: the same command goes on with what is missing. More rates, seeds or variants may be
asked for later, and what has been trained stays. Training is the command line's, in processes of its own.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmnorm.config.dotted import flatten
from llmnorm.errors import UserError
from llmnorm.evaluation.compare_page import write_pages
from llmnorm.evaluation.compare_results import best_rate, build_results
from llmnorm.evaluation.compare_runs import Run, Runner, seed_run, sweep_run
from llmnorm.evaluation.compare_study import DECIDED, Study, Variant, load_study

# Keys of a variant that change neither its losses nor what they are compared with.
FREE = (
    "data.prepared_dir",
    "data.prepare_workers",
    "data.num_workers",
    "train.log_every",
    "tracking",
    "seed",
)
SETTINGS = ("sweep_steps", "steps", "equal", "sweep_seed")
PAIR = re.compile(r"\[\s+([-+.\de]+),\s+([-+.\de]+|null)\s+\]")  # of numbers, as json writes it
Plan = dict[str, tuple[list[Run], float | None, list[Run]]]


def compare(
    files: Sequence[str | Path],
    output_dir: str | Path,
    *,
    changes: Sequence[str] = (),
    interval: bool = True,
    jobs: int = 1,
    keep_checkpoints: bool = False,
    retry_failed: bool = False,
    command: str = "",
    **settings: Any,
) -> bool:
    """Train what has not been trained and write the results; False if it was stopped before the end.

    files, changes, settings: see `load_study`. jobs: runs at a time. keep_checkpoints: leave the last
    checkpoint in each finished run, which takes disk space. retry_failed: start failed runs again, from
    nothing. command: recorded in the results. A run that fails is listed in the results and stops no other.

    Raises `UserError`, with nothing written, for mistakes in the study and for a folder of something else.
    """
    study = load_study(files, changes, interval=interval, **settings)
    comparison = Comparison(study, Path(output_dir))
    with comparison.alone() as lock, Runner(jobs, keep_checkpoints, lock.fileno(), _note) as runner:
        comparison.record()
        if retry_failed:
            comparison.forget_failed()
        _note(comparison.summary())
        for note in study.notes():
            _note(f"note: {note}")
        runner.train([run for sweep, _, _ in comparison.plan().values() for run in sweep])
        comparison.settle()
        measured = [run for _, _, runs in comparison.plan().values() for run in runs]
        runner.train(sorted(measured, key=lambda run: run.seed))  # an early stop leaves whole pairs
        results = build_results(
            study, comparison.plan(), command=command, environment=runner.environment, interval=interval
        )
        (comparison.root / "results.json").write_text(_as_text(results), encoding="utf-8")
        written = [comparison.root / "results.json", *write_pages(results, comparison.root)]
        for warning in results["warnings"]:
            _note(f"warning: {warning}")
        if results["not_run"]:
            _note(f"{len(results['not_run'])} runs have no result:")
            for entry in results["not_run"]:
                _note(f"  {entry['run']}: {entry['status']}: {entry['reason']}")
        _note("wrote\n" + "\n".join(f"  {path}" for path in written))
        if runner.stopped.is_set():
            _note("stopped; start the same command again to go on")
        return not runner.stopped.is_set()


def list_runs(
    files: Sequence[str | Path],
    output_dir: str | Path,
    *,
    changes: Sequence[str] = (),
    interval: bool = True,
    **settings: Any,
) -> None:
    """Print every run that has no result yet, and why; write nothing."""
    comparison = Comparison(load_study(files, changes, interval=interval, **settings), Path(output_dir))
    print(comparison.summary())
    for name, (sweep, lr, runs) in comparison.plan().items():
        for run in (*sweep, *runs):
            outcome = run.outcome()
            if outcome["status"] != "finished":
                print(f"  {run.key}: {outcome['status']}: {outcome['reason']}")
        if lr is None or not runs:
            failed = all(run.outcome()["status"] == "failed" for run in sweep)
            reason = "no learning rate finished" if failed else "wait for the sweep"
            print(f"  {name}, {comparison.study.seeds} seeds: {reason}")


class Comparison:
    """A study in its folder: which runs it is made of, and which come next."""

    def __init__(self, study: Study, root: Path) -> None:
        """Only reads. Raises `UserError` for the folder of another comparison, or of something else."""
        self.study, self.root = study, root
        self.state_file = root / "state.json"
        self.timed_steps: dict[str, int] = {}
        if self.state_file.exists():
            state = json.loads(self.state_file.read_text(encoding="utf-8"))
            self._check_same(state)
            self.timed_steps = state["timed_steps"]
            self._before: dict[str, Any] = state["variants"]
        elif root.exists() and (not root.is_dir() or any(path.name != "lock" for path in root.iterdir())):
            raise UserError(
                f"--output_dir {root} holds something that is not a comparison; give an empty or a new folder"
            )
        else:
            self._before = {}

    def _identity(self) -> dict[str, Any]:
        study = self.study
        settings = {key: getattr(study, key) for key in SETTINGS}
        if study.equal == "time":
            settings["baseline"] = study.baseline
        variants = {
            variant.name: {
                key: value
                for key, value in flatten(variant.config.to_dict()).items()
                if key not in DECIDED and not key.startswith(FREE)
            }
            for variant in study.variants
        }
        return {"settings": settings, "variants": variants}

    def _check_same(self, state: Mapping[str, Any]) -> None:
        """Recorded keys must be equal; a later version may have keys that the recorded config lacks."""
        now = self._identity()
        differences = [
            (key, before, now["settings"].get(key))
            for key, before in state["settings"].items()
            if before != now["settings"].get(key)
        ]
        shared = [name for name in state["variants"] if name in now["variants"]]
        for name in shared:
            differences += [
                (f"{key} of {name}", before, now["variants"][name].get(key))
                for key, before in state["variants"][name].items()
                if before != now["variants"][name].get(key)
            ]
        if not shared:
            differences.append(("variants", ", ".join(state["variants"]), ", ".join(now["variants"])))
        if differences:
            key, before, after = differences[0]
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise UserError(
                f"--output_dir {self.root} holds another comparison: {key} was {before!r} and is now "
                f"{after!r}{more}; give a new folder, or go back to what was compared. Rates, seeds and "
                "variants may be added"
            )

    @contextmanager
    def alone(self) -> Iterator[IO[bytes]]:
        """Hold the folder's lock. Runs inherit it, so one whose comparison was killed still holds it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            stream = (self.root / "lock").open("ab")
        except OSError as error:
            raise UserError(
                f"--output_dir {self.root} cannot be written ({error.strerror}); give another folder, or "
                "permit writing there"
            ) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"--output_dir {self.root} is in use: another llmnorm compare works there, or a run "
                    "that it started goes on; wait for it, or stop it"
                ) from None
            yield stream

    def record(self) -> None:
        state = self._identity()
        state["variants"] = self._before | state["variants"]
        state["timed_steps"] = self.timed_steps
        draft = self.state_file.with_name("state.json.tmp")
        draft.write_text(json.dumps({"format": 1, **state}, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.state_file)

    def settle(self) -> None:
        """Fix the steps of each variant under `equal: time`, once the sweep has timed it and the baseline."""
        if self.study.equal != "time":
            return
        seconds = {variant.name: self._seconds_per_step(variant) for variant in self.study.variants}
        base = seconds[self.study.baseline]
        for name, own in seconds.items():
            if base is not None and own is not None and name not in self.timed_steps:
                self.timed_steps[name] = max(1, round(self.study.steps * base / own))
                _note(
                    f"{name}: {own:.4g} s per step, so {self.timed_steps[name]} steps take the baseline's "
                    "time"
                )
        self.record()

    def _seconds_per_step(self, variant: Variant) -> float | None:
        sweep = self.sweep(variant)
        if best_rate(sweep) is None:
            return None
        outcomes = [run.outcome() for run in sweep]
        return statistics.median(
            outcome["seconds_per_step"] for outcome in outcomes if outcome["status"] == "finished"
        )

    def sweep(self, variant: Variant) -> list[Run]:
        """The runs that choose the rate; a single rate needs none, unless its steps must be timed."""
        study = self.study
        if len(variant.lrs) == 1 and study.equal == "tokens":
            return []
        steps = study.equal_tokens(variant, study.sweep_steps)
        return [sweep_run(self.root, variant, lr, study.sweep_seed, steps) for lr in variant.lrs]

    def plan(self) -> Plan:
        """variant -> (its sweep, its best rate once known, its measured runs once the rate and steps are)."""
        plan: Plan = {}
        study = self.study
        for variant in study.variants:
            sweep = self.sweep(variant)
            lr = best_rate(sweep) if sweep else variant.lrs[0]
            steps: int | None = study.equal_tokens(variant, study.steps)
            if study.equal == "time":
                steps = self.timed_steps.get(variant.name)
            seeds = study.run_seeds if lr is not None and steps is not None else []
            runs = [seed_run(self.root, variant, lr, seed, steps) for seed in seeds if lr and steps]
            plan[variant.name] = (sweep, lr, runs)
        return plan

    def forget_failed(self) -> None:
        for sweep, _, runs in self.plan().values():
            for run in (*sweep, *runs):
                if run.outcome()["status"] == "failed":
                    shutil.rmtree(run.path)

    def summary(self) -> str:
        """How many runs there are and how many of them have ended."""
        plan = self.plan()
        sweeps = [run for sweep, _, _ in plan.values() for run in sweep]
        measured = [run for _, _, runs in plan.values() for run in runs]
        ended = sum(run.outcome()["status"] == "finished" for run in (*sweeps, *measured))
        total = len(sweeps) + len(self.study.variants) * self.study.seeds
        return (
            f"{self.study.title}: {len(self.study.variants)} variants; {len(sweeps)} runs of "
            f"{self.study.sweep_steps} steps choose learning rates, then {self.study.seeds} seeds x "
            f"{self.study.steps} steps each; {ended} of {total} runs are finished"
        )


def _as_text(results: dict[str, Any]) -> str:
    """JSON to be read and compared by people: a key to a line, and a point of a curve to a line."""
    text = json.dumps(results, indent=1, allow_nan=False)
    return PAIR.sub(r"[\1, \2]", text) + "\n"


def _note(line: str) -> None:
    print(line, flush=True)
