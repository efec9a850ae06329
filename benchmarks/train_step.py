"""A bare training step of ours against transformers' Llama with torch's AdamW, on the same batch.

    python benchmarks/train_step.py [--sizes 2m 9m 20m] [--repeats 7]

Each repeat times both sides one after the other and takes their ratio, so that what else the machine does
falls on both; the median over repeats is reported and written to benchmarks/results/train_step.json. The goal
is a ratio of at most 1.02.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from llmnorm import LlmNormConfig, LlmNormForCausalLM, create_optimizer
from llmnorm.config.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "train_step.json"
VOCAB_SIZE, BATCH, SEQUENCE = 2048, 8, 128
Step = Callable[[], None]


def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Step:
    """Forward, backward, clip, update: what both sides have to do for one step."""
    parameters = list(model.parameters())

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def contestants(size: str) -> tuple[Step, Step]:
    """(ours, theirs) at one size, from the same weights, on the same batch of random tokens."""
    shape = {**PRESETS[size].sizes(), "vocab_size": VOCAB_SIZE, "rms_norm_eps": 1e-6}
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    ours = LlmNormForCausalLM(LlmNormConfig(norm="pre_rmsnorm", **shape))
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, VOCAB_SIZE, (BATCH, SEQUENCE))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    return (
        training_step(ours, create_optimizer("adamw", ours, lr=1e-3), ids),
        training_step(theirs, adamw, ids),
    )


def seconds(step: Step, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def measure(size: str, repeats: int) -> dict[str, object]:
    """Median ratio ours / theirs over interleaved repeats, each side first in every other one."""
    ours, theirs = contestants(size)
    warm = max(seconds(ours, 2), seconds(theirs, 2))
    steps = max(3, round(3.0 / warm))  # about three seconds a side
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            b, a = seconds(theirs, steps), seconds(ours, steps)
        else:
            a, b = seconds(ours, steps), seconds(theirs, steps)
        pairs.append((a, b))
    ratios = [a / b for a, b in pairs]
    return {
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
        "steps_per_repeat": steps,
        "ours_ms_median": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "transformers_ms_median": round(1e3 * statistics.median(b for _, b in pairs), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["2m", "9m", "20m"], choices=sorted(PRESETS))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    results = {}
    for size in arguments.sizes:
        results[size] = measure(size, arguments.repeats)
        print(size, results[size], flush=True)
    record = {
        "what": "train step (forward, backward, clip, AdamW), llmnorm pre_rmsnorm / transformers Llama, fp32",
        "command": " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "batch": BATCH,
        "sequence_length": SEQUENCE,
        "vocab_size": VOCAB_SIZE,
        "repeats": arguments.repeats,
        "results": results,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
