"""A run small enough for a test: two layers, a few hundred lines of Shakespeare, a tokenizer of 320 ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmnorm.config import RunConfig, load_run_config

SAMPLES = Path(__file__).parents[2] / "samples" / "tinyshakespeare"


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with train.txt, validation.txt and the shards that the first run prepares for all."""
    folder = tmp_path_factory.mktemp("texts")
    for name, size in (("train", 20_000), ("validation", 2_000)):
        text = (SAMPLES / f"{name}.txt").read_text(encoding="utf-8")[:size]
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def run_config(texts, tmp_path) -> Callable[..., RunConfig]:
    """The config of a run in tmp_path / "run", with dotted changes."""

    def build(**changes: Any) -> RunConfig:
        values = {
            "output_dir": str(tmp_path / "run"),
            "model.hidden_size": 32,
            "model.intermediate_size": 64,
            "model.num_hidden_layers": 2,
            "model.num_attention_heads": 2,
            "model.norm": "mix_ln",
            "data.train_files": str(texts / "train.txt"),
            "data.validation_files": str(texts / "validation.txt"),
            "data.tokenizer": {"train": "bpe", "vocab_size": 320},
            "data.sequence_length": 32,
            "data.prepared_dir": str(texts / "prepared"),
            "data.prepare_workers": 1,
            "data.num_workers": 0,
            "optimizer.name": "adamw",
            "optimizer.lr": 3e-3,
            "schedule.name": "cosine",
            "schedule.warmup_steps": 2,
            "train.max_steps": 6,
            "train.global_batch_size": 4,
            "train.precision": "fp32",
            "checkpoint.every": 2,
            "export.at_end": False,
        }
        return load_run_config(None, {**values, **changes})

    return build


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """The rows of a run's metrics.jsonl that have a key."""

    def read(run: Path | str, key: str = "loss") -> list[dict[str, Any]]:
        lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if key in row]

    return read
