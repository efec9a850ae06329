from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MINIMAL = """\
output_dir: runs/x
model: {preset: 2m, norm: mix_ln}
data:
  train_files: a.txt
  tokenizer: {train: bpe, vocab_size: 512}
  sequence_length: 64
optimizer: {lr: 1e-3}
schedule:
  name: cosine
  warmup_steps: 2
  min_lr_ratio: 0.2
train:
  max_steps: 10
  global_batch_size: 8
"""


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the minimal run, with replacements, and returns its path."""

    def write(*replacements: tuple[str, str], text: str = MINIMAL) -> Path:
        for old, new in replacements:
            assert old in text, f"{old!r} is not in the minimal config"
            text = text.replace(old, new)
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def minimal(write_config: Callable[..., Path]) -> Path:
    return write_config()
