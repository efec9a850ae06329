"""The runs of a comparison: ordinary run directories, each trained by `python train.py` in its own process.

    runs/sweep/<variant>/lr_<rate>/             seed of the base, sweep_steps
    runs/seeds/<variant>/lr_<rate>/seed_<n>/    paired seeds at the best rate
        run.yaml  train.log  outcome.json       beside config.yaml, metrics.jsonl, report.html of every run

`outcome.json` is written when a run has ended. A run without one is started again and goes on from its
newest checkpoint; a run that failed keeps its reason and is left alone until it is asked for again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import llmnorm
from llmnorm.checkpoint import published_steps
from llmnorm.checkpoint.format import DTYPES, DamagedIndex, TensorRecord, read_index
from llmnorm.config import yaml_dialect
from llmnorm.errors import UserError
from llmnorm.evaluation.compare_study import Variant, run_values
from llmnorm.evaluation.environment import describe_environment
from llmnorm.evaluation.gradient_spikes import norms_of, summarize
from llmnorm.evaluation.report import read_metrics

TRAIN = Path(llmnorm.__file__).resolve().parents[1] / "train.py"
ENVIRONMENT = ("date", "device", "threads", "torch", "git_revision")


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    variant: Variant
    lr: float
    seed: int
    steps: int
    path: Path
    sweep: bool = False

    @property
    def key(self) -> str:
        """Short name, as in the log."""
        return f"{self.variant.name} lr {self.lr:g} " + ("sweep" if self.sweep else f"seed {self.seed}")

    @property
    def outcome_file(self) -> Path:
        return self.path / "outcome.json"

    def outcome(self) -> dict[str, Any]:
        """`status` finished, failed, interrupted or pending, with the numbers or the reason."""
        if self.outcome_file.exists():
            outcome = json.loads(self.outcome_file.read_text(encoding="utf-8"))
            assert isinstance(outcome, dict)
            return outcome
        if (self.path / "train.log").exists():
            reason = f"stopped or killed after step {self.steps_done()} of {self.steps}"
            return {"status": "interrupted", "reason": reason}
        return {"status": "pending", "reason": "not started"}

    def steps_done(self) -> int:
        metrics = self.path / "metrics.jsonl"
        return max((row["step"] for row in read_metrics(metrics)), default=0) if metrics.exists() else 0


def sweep_run(root: Path, variant: Variant, lr: float, seed: int, steps: int) -> Run:
    path = root / "runs" / "sweep" / variant.name / f"lr_{lr:g}"
    return Run(variant, lr, seed, steps, path, sweep=True)


def seed_run(root: Path, variant: Variant, lr: float, seed: int, steps: int) -> Run:
    path = root / "runs" / "seeds" / variant.name / f"lr_{lr:g}" / f"seed_{seed}"
    return Run(variant, lr, seed, steps, path)


def measure(run: Run) -> dict[str, Any] | None:
    """The numbers of a run that has reached its end, None before that.

    loss: held-out nats per token after the last update, None when it is not finite. Speed and the
    optimizer's time are medians over the updates after the first tenth. state_bytes and parameters are those
    of its checkpoint. curve: [step, held-out loss]. gradient_norm: see `gradient_spikes.summarize`.
    """
    if not (run.path / "report.html").exists() or not (run.path / "metrics.jsonl").exists():
        return None
    rows = read_metrics(run.path / "metrics.jsonl")
    evaluations = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    if run.steps not in evaluations:
        return None
    settled = [row for row in rows if "loss" in row and row["step"] > run.steps // 10]
    optimizer = [row["optimizer_seconds"] for row in settled if "optimizer_seconds" in row]
    last = [row["loss"] for row in settled if row["step"] > run.steps - max(1, run.steps // 10)]
    return {
        "loss": evaluations[run.steps],
        "training_loss": None if None in last else statistics.fmean(last),
        "tokens": max(row["tokens"] for row in settled),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in settled),
        "seconds_per_step": statistics.median(row["seconds"] for row in settled),
        "optimizer_seconds": statistics.median(optimizer) if optimizer else None,
        "peak_memory_gib": max(row["memory_gib"] for row in settled),
        **stored_sizes(run.path / "checkpoints"),
        "curve": [[step, loss] for step, loss in sorted(evaluations.items()) if step > 0],
        "gradient_norm": summarize(norms_of(rows)),
    }


def stored_sizes(checkpoints: Path) -> dict[str, int | None]:
    """Bytes of optimizer state and number of parameters, from the index of the newest checkpoint."""
    for step in reversed(published_steps(checkpoints)):
        try:
            tensors = read_index(checkpoints / f"step_{step}").tensors
        except DamagedIndex:
            continue
        state = [record for name, record in tensors.items() if name.startswith("optimizer/")]
        weights = [record for name, record in tensors.items() if name.startswith("model/")]
        return {
            "state_bytes": sum(_elements(record) * DTYPES[record.dtype].itemsize for record in state),
            "parameters": sum(_elements(record) for record in weights),
        }
    return {"state_bytes": None, "parameters": None}


def _elements(record: TensorRecord) -> int:
    elements = 1
    for length in record.shape:
        elements *= length
    return elements


class Runner:
    """Trains runs, `jobs` at a time; SIGTERM and SIGINT stop the running ones with a checkpoint each.

    As a context it catches the two signals. `inherited` is a file descriptor that the runs keep open.
    """

    def __init__(
        self, jobs: int, keep_checkpoints: bool, inherited: int, note: Callable[[str], None]
    ) -> None:
        if not TRAIN.exists():
            raise UserError(
                f"{TRAIN.name} is not beside the llmnorm package, which is installed without its source "
                "tree; run llmnorm compare from a checkout (pip install -e .)"
            )
        self.jobs, self.keep_checkpoints, self.inherited, self.note = jobs, keep_checkpoints, inherited, note
        self.stopped = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._environment = dict(os.environ)
        if jobs > 1:
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        threads = self._environment.get("OMP_NUM_THREADS")
        described = describe_environment() | ({"threads": int(threads)} if threads else {})
        self.environment = described
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Runner:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # No lock, because a handler may interrupt the thread that holds it; copying a set is one step.
        self.stopped.set()
        for process in self._running.copy():
            process.terminate()

    def train(self, runs: Sequence[Run]) -> None:
        """Train every run that has no outcome, and write it; a run that fails stops no other."""
        waiting = [run for run in runs if not run.outcome_file.exists()]
        places = [f"[{place}/{len(waiting)}]" for place in range(1, len(waiting) + 1)]
        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(self._train, waiting, places):
                pass

    def _train(self, run: Run, place: str) -> None:
        if self.stopped.is_set():
            return
        began = time.monotonic()
        numbers = measure(run)
        if numbers is None:
            code = self._process(run)
            numbers = measure(run)
        else:
            code = 0
        outcome = self._outcome(run, code, numbers)
        if outcome is None:
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else "stopped"
            self.note(f"{place} {run.key}: {why} after step {run.steps_done()} of {run.steps}")
            return
        outcome |= {"environment": {key: self.environment[key] for key in ENVIRONMENT}}
        _write(run.outcome_file, json.dumps(outcome, indent=1) + "\n")
        if outcome["status"] == "failed":
            self.note(f"{place} {run.key}: failed: {outcome['reason']}")
            return
        if not self.keep_checkpoints:
            shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        self.note(
            f"{place} {run.key}: loss {outcome['loss']:.4f} after {run.steps} steps, "
            f"{outcome['tokens_per_second']:,.0f} tokens/s, {time.monotonic() - began:.0f} s"
        )

    def _process(self, run: Run) -> int:
        """`python train.py` from start or newest checkpoint on; its exit code, negative for a signal."""
        run.path.mkdir(parents=True, exist_ok=True)
        config = run.path / "run.yaml"
        values = run_values(run.variant, run.path, run.lr, run.seed, run.steps, run.sweep)
        _write(config, yaml_dialect.write(values))
        with (run.path / "train.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), "--config", str(config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,  # an interrupt from the keyboard reaches it once, through us
                pass_fds=(self.inherited,),
            )
            self._running.add(process)
            if self.stopped.is_set():  # the signal may have come before the line above
                process.terminate()
            code = process.wait()
            self._running.discard(process)
        return code

    def _outcome(self, run: Run, code: int, numbers: dict[str, Any] | None) -> dict[str, Any] | None:
        """The outcome to record, None for a run that is to go on: stopped by us, or killed."""
        if numbers is not None and numbers["loss"] is not None:
            return {"status": "finished", "steps": run.steps, **numbers}
        if numbers is not None:
            return {"status": "failed", "reason": "the final held-out loss is not finite"}
        if code <= 0 or self.stopped.is_set():
            return None
        return {"status": "failed", "reason": _last_words(run.path / "train.log") or f"exit code {code}"}


def _last_words(log: Path) -> str:
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-1].removeprefix("error: ")[:400] if lines else ""


def _write(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
