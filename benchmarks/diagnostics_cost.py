"""What diagnostics cost a run that has them every 50 updates, layer removal left out.

    python benchmarks/diagnostics_cost.py [--sizes 2m 9m] [--repeats 9]

A diagnosed update is the step of `llmnorm.training.train` with its gradients, weights, streams, attention and
gains measured and its row written; a plain one is the same step without. The two take turns in one process,
on one run. cost = (diagnosed - plain) / (50 * plain), the share of step time at diagnostics.every: 50. Writes
benchmarks/results/diagnostics_cost.json. The goal is a median of at most 0.02.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from llmnorm.config import PRESETS, load_run_config
from llmnorm.evaluation import describe_environment
from llmnorm.training.loop import Training
from llmnorm.training.signals import StopRequest

HERE = Path(__file__).parent
RESULT = HERE / "results" / "diagnostics_cost.json"
TEXT = HERE.parent / "samples" / "tinyshakespeare" / "train.txt"
BATCH, SEQUENCE_LENGTH, EVERY = 8, 128, 50


def build(size: str, folder: Path) -> Training:
    values = {
        "output_dir": str(folder / size),
        "model.preset": size,
        "data.train_files": str(TEXT),
        "data.tokenizer": {"train": "bpe", "vocab_size": 2048},
        "data.sequence_length": SEQUENCE_LENGTH,
        "data.prepared_dir": str(folder / "prepared"),
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-3,
        "train.max_steps": 1_000_000,
        "train.global_batch_size": BATCH,
        "train.precision": "fp32",
        "checkpoint.every": 1_000_000,
        "diagnostics.every": EVERY,
    }
    return Training(load_run_config(None, values))


def seconds(run: Training, stop: StopRequest, diagnosed: bool) -> tuple[float, float]:
    """(wall, CPU) seconds of one update."""
    run.observer.diagnostics.due = lambda step: diagnosed  # type: ignore[method-assign]
    wall, cpu = time.perf_counter(), time.process_time()
    run._step(stop)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(size: str, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run, stop = build(size, Path(folder)), StopRequest()
        run._read_on()
        for diagnosed in (False, True):
            seconds(run, stop, diagnosed)
        pairs = []
        for _ in range(repeats):
            plain = [seconds(run, stop, False) for _ in range(2)]
            pairs.append((tuple(map(min, zip(*plain, strict=True))), seconds(run, stop, True)))
        run._batches.close()
    costs = {
        clock: [(diagnosed[k] - plain[k]) / (EVERY * plain[k]) for plain, diagnosed in pairs]
        for k, clock in enumerate(("wall", "cpu"))
    }
    return {
        **{
            f"{clock}_cost_{name}": round(function(values), 5)
            for clock, values in costs.items()
            for name, function in (("median", statistics.median), ("min", min), ("max", max))
        },
        "plain_ms_median": round(1e3 * statistics.median(plain[0] for plain, _ in pairs), 1),
        "diagnosed_ms_median": round(1e3 * statistics.median(diagnosed[0] for _, diagnosed in pairs), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["2m", "9m"], choices=sorted(PRESETS))
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    results = {}
    for size in arguments.sizes:
        results[size] = measure(size, arguments.repeats)
        print(size, results[size], flush=True)
    record = {
        "what": "(diagnosed step - plain step) / (50 plain steps), fp32, in one process; a plain step is the "
        "faster of two",
        "goal": 0.02,
        "command": " ".join(["python", "benchmarks/diagnostics_cost.py", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "sequence_length": SEQUENCE_LENGTH,
        "probed_sequences": 4,
        "repeats": arguments.repeats,
        "load_before": round(load, 1),
        "environment": describe_environment(),
        "results": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
