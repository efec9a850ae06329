"""Runs whose optimizer is a class by its path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmnorm.config import load_run_config
from llmnorm.errors import UserError
from llmnorm.training import train
from llmnorm.training.plan import format_plan, make_plan

ADAFACTOR = {"optimizer.name": "custom", "optimizer.class_path": "torch.optim.Adafactor", "optimizer.d": 2.0}


def test_adafactor_resumes_to_the_last_bit(run_config: Callable, rows: Callable, tmp_path: Path) -> None:
    """Factored second moments have another shape than their parameter, and d is an option of its own."""
    constant = {"schedule.name": "constant", "train.max_steps": 4, **ADAFACTOR}
    whole = train(run_config(**{**constant, "output_dir": str(tmp_path / "whole")})).output_dir
    halves = str(tmp_path / "halves")
    train(run_config(**{**constant, "output_dir": halves, "train.max_steps": 2}))
    train(run_config(**{**constant, "output_dir": halves}))
    keys = ("step", "loss", "grad_norm", "lr")
    whole_rows, half_rows = ([{k: row[k] for k in keys} for row in rows(run)] for run in (whole, halves))
    assert whole_rows == half_rows and len(whole_rows) == 4


def test_the_plan_counts_its_state(run_config: Callable) -> None:
    config = run_config(**ADAFACTOR, **{"model.vocab_size": 320})
    text = format_plan(make_plan(config))
    assert "as torch.optim.Adafactor sees them" in text
    adamw = make_plan(run_config(**{"model.vocab_size": 320})).memory.optimizer
    assert 0 < make_plan(config).memory.optimizer < adamw / 8, "rows and columns instead of matrices"


def test_class_path_implies_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: out\nmodel: {preset: 2m}\ndata: {train_files: a.txt, validation_fraction: 0.1, "
        "tokenizer: gpt2, sequence_length: 8}\ntrain: {max_steps: 1, global_batch_size: 1}\n"
        "optimizer: {class_path: torch.optim.Adafactor, lr: 1.0e-3, beta2_decay: -0.7}\n"
    )
    section = load_run_config(file).optimizer
    assert (section.name, section.method) == ("custom", "torch.optim.Adafactor")
    around = {"weight_decay": 0.0, "fused_backward": False, "lr_multipliers": {}}
    assert section.options(0) == {**around, "beta2_decay": -0.7}
    override = ["--optimizer.class_path", "torch.optim.SGD", "--optimizer.momentum", "0.9"]
    changed = load_run_config(file, override).optimizer
    assert changed.options(0) == {**around, "momentum": 0.9}
    assert "drops optimizer.beta2_decay, which belonged to the former choice" in capsys.readouterr().err
    assert load_run_config(file, ["--optimizer.name", "adamw"]).optimizer.method == "adamw"
    assert "drops optimizer.class_path, optimizer.beta2_decay" in capsys.readouterr().err
    file.write_text(file.read_text().replace("{class_path", "{name: adamw, class_path"))
    with pytest.raises(UserError, match=r"class_path .* of optimizer.name=adamw; it belongs to custom"):
        load_run_config(file)
