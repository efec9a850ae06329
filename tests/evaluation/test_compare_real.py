"""`llmnorm compare` on models that are really trained: four runs, one of them stopped half-way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_cases import ROOT, write_study

from llmnorm.config import load_run_config
from llmnorm.evaluation import read_metrics

STEPS = 60


def start(study: Path, out: Path) -> subprocess.Popen[str]:
    words = ["compare", str(study), "--output_dir", str(out), "--steps", str(STEPS), "--seeds", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "llmnorm.cli", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_real_runs_stopped_and_gone_on_with(tmp_path: Path) -> None:
    variants = {"adamw": {}, "sinkgd": {"optimizer": {"name": "sinkgd", "lr_mode": "adam_rms"}}}
    out = tmp_path / "out"
    study = write_study(tmp_path, variants, lrs=[1e-2])
    process = start(study, out)
    metrics = out / "runs/seeds/adamw/lr_0.01/seed_1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 8:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "start the same command again to go on" in output, output
    stopped_after = read_metrics(metrics)[-1]["step"]
    assert 5 <= stopped_after < STEPS

    process = start(study, out)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert f"going on after step {stopped_after}" in metrics.with_name("train.log").read_text()
    results = json.loads((out / "results.json").read_text())
    assert results["not_run"] == []
    assert "wrote" in output and (out / "plot.svg").exists()

    for row in results["variants"]:
        assert (row["loss"]["n"], row["steps"], row["tokens"]) == (2, STEPS, STEPS * 4 * 16)
        assert row["parameters"] == row_parameters(row["name"])
        for run in row["runs"]:
            folder = out / f"runs/seeds/{row['name']}/lr_0.01/seed_{run['seed']}"
            rows = read_metrics(folder / "metrics.jsonl")
            assert run["loss"] == rows[-1]["eval/loss"] and rows[-1]["step"] == STEPS
            assert 1.0 < run["loss"] < 5.6, "below the logarithm of the vocabulary: it has learned"
            config = load_run_config(folder / "config.yaml")
            assert (config.seed, config.optimizer.lr) == (run["seed"], 0.01)
            assert not (folder / "checkpoints").exists(), "a finished run keeps its numbers"
            assert not (folder / "export").exists()
    # AdamW: two fp32 moments and a 4-byte step of each of the 12 tensors.
    adamw, sinkgd = (row["state_bytes"] for row in results["variants"])
    assert adamw == 8 * row_parameters("adamw") + 4 * 12
    hidden = 4 * 32 * 32 + 3 * 32 * 64
    assert sinkgd == adamw - 8 * hidden - 4 * 7, "and none of the seven hidden matrices has any"
    assert results["variants"][1]["difference"]["n"] == 2


def row_parameters(name: str) -> int:
    """Embedding and head of 320 rows, one block, three norms."""
    return 2 * 320 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32


@pytest.mark.parametrize("name", ["base_2m", "norms_2m", "optimizers_2m"])
def test_committed_studies_load_without_a_word(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmnorm.config.architecture import NormName
    from llmnorm.evaluation.compare_study import load_study
    from llmnorm.optim import create_optimizer

    monkeypatch.chdir(ROOT)
    path = Path("configs/compare") / f"{name}.yaml"
    if name == "base_2m":
        config = load_run_config(path)
        assert (config.train.global_batch_size, config.data.sequence_length) == (8, 128)
    else:
        study = load_study([path], ["data.train_files=other.txt"])
        assert (study.sweep_steps, study.steps, study.seeds) == (150, 400, 3)
        assert all(len(variant.lrs) == 3 for variant in study.variants)
        configs = [variant.config for variant in study.variants]
        assert {config.data.train_files for config in configs} == {"other.txt"}
        if name == "norms_2m":
            assert {config.model.norm for config in configs} == set(NormName.__args__)
        else:
            assert {config.optimizer.name for config in configs} == set(create_optimizer.names())
    assert capsys.readouterr().err == ""
