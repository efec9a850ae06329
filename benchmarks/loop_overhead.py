"""The whole training loop against the bare step it contains: data, guards, metrics and logging included.

    python benchmarks/loop_overhead.py [--sizes 2m 9m 20m] [--repeats 7] [--workers 1]

The loop side is the step that `llmnorm.training.train` takes: a batch from the data loader, the token-exact
loss, clipping, the guards (spike detector on), AdamW, one row of metrics.jsonl, one progress line. The bare
side runs the same model and optimizer on one batch that is already in memory: forward, backward, torch's
clip_grad_norm_, AdamW. The two sides take turns step by step, so that whatever else the machine does falls
on both. Writes benchmarks/results/loop_overhead.json. The goal is a median ratio of at most 1.05.
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
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from llmnorm.config import PRESETS, load_run_config
from llmnorm.evaluation import describe_environment
from llmnorm.training.loop import Training
from llmnorm.training.signals import StopRequest

HERE = Path(__file__).parent
RESULT = HERE / "results" / "loop_overhead.json"
TEXT = HERE.parent / "samples" / "tinyshakespeare" / "train.txt"
BATCH, SEQUENCE_LENGTH = 8, 128


def build(size: str, folder: Path, workers: int) -> Training:
    values = {
        "output_dir": str(folder / size),
        "model.preset": size,
        "data.train_files": str(TEXT),
        "data.tokenizer": {"train": "bpe", "vocab_size": 2048},
        "data.sequence_length": SEQUENCE_LENGTH,
        "data.prepared_dir": str(folder / "prepared"),
        "data.num_workers": workers,
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-3,
        "train.max_steps": 1_000_000,
        "train.global_batch_size": BATCH,
        "train.precision": "fp32",
        "checkpoint.every": 1_000_000,
        "guards.spike": {"window": 64, "threshold": 1000.0},
    }
    return Training(load_run_config(None, values))


def bare_step(run: Training) -> Callable[[], None]:
    """Forward, backward, clip, update on one batch; reads nothing, writes nothing."""
    module, optimizer = run.model.module, run.optimizer
    parameters = list(module.parameters())
    (batch,) = next(run._batches).micro_batches
    inputs, labels = batch["input_ids"], batch["labels"]

    def step() -> None:
        loss = module(
            input_ids=inputs,
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=labels.numel(),
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(size: str, repeats: int, workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run = build(size, Path(folder), workers)
        run._read_on()
        stop = StopRequest()
        bare, loop = bare_step(run), lambda: run._step(stop)
        warm = statistics.median([seconds(bare) for _ in range(3)] + [seconds(loop) for _ in range(3)])
        steps = max(4, round(4.0 / warm))
        pairs = []
        for _ in range(repeats):
            times: dict[Callable[[], Any], list[float]] = {bare: [], loop: []}
            for number in range(steps):
                for step in (bare, loop) if number % 2 else (loop, bare):
                    times[step].append(seconds(step))
            pairs.append((statistics.median(times[bare]), statistics.median(times[loop])))
        run._batches.close()
    ratios = [loop_seconds / bare_seconds for bare_seconds, loop_seconds in pairs]
    return {
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "bare_ms_median": round(1e3 * statistics.median(bare for bare, _ in pairs), 2),
        "loop_ms_median": round(1e3 * statistics.median(loop for _, loop in pairs), 2),
        "steps_per_repeat": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["2m", "9m", "20m"], choices=sorted(PRESETS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1, help="data.num_workers")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    results = {}
    for size in arguments.sizes:
        results[size] = measure(size, arguments.repeats, arguments.workers)
        print(size, results[size], flush=True)
    record = {
        "what": "whole loop step / bare step (forward, backward, clip, AdamW), fp32, same model in one "
        "process",
        "goal": 1.05,
        "command": " ".join(["python", "benchmarks/loop_overhead.py", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "sequence_length": SEQUENCE_LENGTH,
        "num_workers": arguments.workers,
        "repeats": arguments.repeats,
        "load_before": round(load, 1),
        "environment": describe_environment(),
        "results": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
