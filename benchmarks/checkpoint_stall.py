"""What asynchronous checkpoints cost the training step: intervals with a save against intervals without,
interleaved.

    python benchmarks/checkpoint_stall.py [--sizes 2m 9m 20m] [--interval 50] [--repeats 5]

One side is `interval` steps (forward, backward, clip, AdamW); the other begins with an asynchronous save of
weights, both moments and random states, and ends when that save is on the disk, as a next save would have to
wait for it. The writing of batches, logging and evaluation is left out, so the share is the largest that it
can be. Reported and written to benchmarks/results/checkpoint_stall.json: the median over repeats of the ratio
with / without. The goal is at most 1.05.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from llmnorm import LlmNormConfig, LlmNormForCausalLM, create_optimizer
from llmnorm.checkpoint import CheckpointStore, model_tensors, optimizer_tensors, rng_tensors
from llmnorm.config.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "checkpoint_stall.json"
# Beside the real runs: the system's temporary folder may be memory.
SCRATCH = Path(__file__).parent.parent / "runs"
VOCAB_SIZE, BATCH, SEQUENCE = 2048, 8, 128


class Run:
    """A model in training, and the store that saves it."""

    def __init__(self, size: str, directory: Path) -> None:
        torch.manual_seed(0)
        config = LlmNormConfig(norm="pre_rmsnorm", vocab_size=VOCAB_SIZE, **PRESETS[size].sizes())
        self.model = LlmNormForCausalLM(config)
        self.optimizer = create_optimizer("adamw", self.model, lr=1e-3)
        self.ids = torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE))
        self.store = CheckpointStore(directory, keep=2, asynchronous=True)
        self.saves = 0

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self) -> None:
        self.saves += 1
        tensors, state = optimizer_tensors(self.model, self.optimizer)
        self.store.save(
            self.saves, {**model_tensors(self.model), **tensors, **rng_tensors(0)}, {"optimizer": state}
        )

    def interval(self, steps: int, saving: bool) -> tuple[float, float]:
        """(seconds of the interval, seconds of it spent in the call to save)."""
        start = time.perf_counter()
        if saving:
            self.save()
        call = time.perf_counter() - start
        for _ in range(steps):
            self.step()
        self.store.wait()
        return time.perf_counter() - start, call


def measure(size: str, steps: int, repeats: int) -> dict[str, object]:
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as directory:
        run = Run(size, Path(directory))
        run.interval(3, saving=True)
        rows = []
        for repeat in range(repeats):
            order = (True, False) if repeat % 2 else (False, True)
            rows.append({saving: run.interval(steps, saving) for saving in order})
        start = time.perf_counter()
        run.save()
        run.store.wait()
        idle = time.perf_counter() - start
        size_bytes = sum(file.stat().st_size for file in (Path(directory) / f"step_{run.saves}").iterdir())
    ratios = sorted(row[True][0] / row[False][0] for row in rows)
    return {
        "size": size,
        "ratio_median": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "step_ms": round(1e3 * statistics.median(row[False][0] for row in rows) / steps, 1),
        "save_call_ms": round(1e3 * statistics.median(row[True][1] for row in rows), 1),
        "save_alone_ms": round(1e3 * idle, 1),
        "checkpoint_mb": round(size_bytes / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["2m", "9m", "20m"], choices=sorted(PRESETS))
    parser.add_argument("--interval", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    for size in arguments.sizes:
        rows.append(measure(size, arguments.interval, arguments.repeats))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "what": "interval of training steps with one asynchronous checkpoint / without",
        "goal": 1.05,
        "interval": arguments.interval,
        "batch": [BATCH, SEQUENCE],
        "rows": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load_before": round(load, 2),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/checkpoint_stall.py", *sys.argv[1:]]),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
