"""Small studies for the tests of `llmnorm compare`, and a stand-in for train.py that takes no time."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from llmnorm import cli

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "tinyshakespeare" / "train.txt"

# Writes what a run of train.py leaves behind, with a loss that is a formula of lr, weight decay and seed.
# `train.sample_prompt` of a variant asks for trouble.
STAND_IN = """
import json, math, os, signal, sys, time
from pathlib import Path
import yaml

config = yaml.safe_load(Path(sys.argv[2]).read_text())
run, steps, lr = Path(config["output_dir"]), config["train"]["max_steps"], float(config["optimizer"]["lr"])
trouble = config["train"]["sample_prompt"]
with (run / "starts").open("a") as starts:
    starts.write("x")
if "fail" in trouble and lr > 0.002:
    sys.exit("Traceback\\n\\nerror: out of memory in " + str(run.resolve()))
if "sleep" in trouble and not (run / "slept").exists():
    (run / "slept").touch()
    time.sleep(60)
if "kill" in trouble and len((run / "starts").read_text()) == 1:
    (run / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 5.0}) + chr(10))
    os.kill(os.getpid(), signal.SIGKILL)
decay = config["optimizer"]["weight_decay"]
loss = 3 + abs(math.log10(lr) + 2.5) + decay + 0.01 * math.sin(7 * config["seed"] + 3 * decay)
seconds = 0.1 * (1 + 10 * decay)
rows = [
    {"step": s, "tokens": 64 * s, "loss": loss, "tokens_per_second": 64 / seconds, "seconds": seconds,
     "memory_gib": 0.5, "grad_norm": 30.0 if s == 15 and decay else 2.0,
     **({"optimizer_seconds": seconds / 10} if s % 2 == 0 else {})}
    for s in range(1, steps + 1)
]
every = config["evaluation"]["every"] or steps
for s in sorted({*range(every, steps + 1, every), steps}):
    rows.append({"step": s, "eval/loss": None if "nan" in trouble else loss + (steps - s) / steps})
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
(run / "report.html").write_text("")
"""


def loss_of(lr: float, decay: float, seed: int) -> float:
    """The formula of the stand-in."""
    return 3 + abs(math.log10(lr) + 2.5) + decay + 0.01 * math.sin(7 * seed + 3 * decay)


def base_config(folder: Path, text: Path) -> dict[str, Any]:
    """A run of a tiny model."""
    return {
        "output_dir": str(folder / "base"),
        "model": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "data": {
            "train_files": str(text),
            "validation_fraction": 0.1,
            "tokenizer": {"train": "bpe", "vocab_size": 300},
            "sequence_length": 16,
            "prepared_dir": str(folder / "prepared"),
            "prepare_workers": 1,
            "num_workers": 0,
        },
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "schedule": {"name": "cosine", "warmup_steps": 1},
        "train": {"max_steps": 5, "global_batch_size": 4, "precision": "fp32"},
        "evaluation": {"every": 5},
        "checkpoint": {"every": 5, "asynchronous": False},
    }


def write_study(folder: Path, variants: dict[str, Any], **keys: Any) -> Path:
    """study.yaml and its base in `folder`."""
    text = folder / "text.txt"
    text.write_text(SAMPLE.read_text(encoding="utf-8")[:8_000], encoding="utf-8")
    (folder / "base.yaml").write_text(yaml.safe_dump(base_config(folder, text)), encoding="utf-8")
    study = {"title": "A <small> study", "base": "base.yaml", "steps": 20, "sweep_steps": 10, "seeds": 3}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, "variants": variants, **keys}, sort_keys=False))
    return path


def call(*words: str | Path) -> int:
    """Exit code of `llmnorm compare` in this process."""
    try:
        cli.main(["compare", *map(str, words)])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@contextmanager
def stop_when(due: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
    """SIGTERM to this process, whose handler llmnorm compare has set by then, as soon as `due()` is true."""
    over = threading.Event()

    def watch() -> None:
        while not due():
            if over.is_set():
                return
            time.sleep(0.005)
        meanwhile()
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()
