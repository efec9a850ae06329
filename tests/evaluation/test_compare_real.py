"""`llmnorm compare` on models that are really trained: four runs, one of them stopped half-way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compare_cases import ROOT, call, stop_when, write_study

from llmnorm.config import load_run_config
from llmnorm.evaluation import read_metrics
from llmnorm.evaluation.compare_study import load_study
from llmnorm.optim import create_optimizer

STEPS = 100


def test_real_runs_stopped_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    variants = {"adamw": {}, "sinkgd": {"optimizer": {"name": "sinkgd", "lr_mode": "adam_rms"}}}
    out = tmp_path / "out"
    words = (write_study(tmp_path, variants, lrs=[1e-2], steps=STEPS, seeds=2), "--output_dir", out)
    metrics = out / "runs/seeds/adamw/lr_0.01/seed_1/metrics.jsonl"
    with stop_when(lambda: metrics.exists() and metrics.read_text().count("\n") > 5):
        assert call(*words) == 1
    stopped_after = read_metrics(metrics)[-1]["step"]
    assert 5 <= stopped_after < STEPS
    assert f"adamw lr 0.01 seed 1: stopped after step {stopped_after} of {STEPS}" in capsys.readouterr().out

    assert call(*words) == 0
    assert f"going on after step {stopped_after}" in metrics.with_name("train.log").read_text()
    results = json.loads((out / "results.json").read_text())
    assert results["not_run"] == []

    for row in results["variants"]:
        assert (row["loss"]["n"], row["steps"], row["tokens"]) == (2, STEPS, STEPS * 4 * 16)
        assert row["parameters"] == parameters()
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
    assert adamw == 8 * parameters() + 4 * 12
    hidden = 4 * 32 * 32 + 3 * 32 * 64
    assert sinkgd == adamw - 8 * hidden - 4 * 7, "and none of the seven hidden matrices has any"
    assert results["variants"][1]["difference"]["n"] == 2


def parameters() -> int:
    """Embedding and head of 320 rows, one block, three norms."""
    return 2 * 320 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32


@pytest.mark.parametrize("name", ["base_2m", "norms_2m", "optimizers_2m"])
def test_committed_studies_load_without_a_word(
    name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.chdir(ROOT)
    path = Path("configs/compare") / f"{name}.yaml"
    if name == "base_2m":
        config = load_run_config(path)
        assert (config.train.global_batch_size, config.data.sequence_length) == (8, 128)
    else:
        study = load_study([path], ["data.train_files=other.txt"])
        assert (study.sweep_steps, study.steps, study.seeds) == (150, 400, 3)
        wider = {"apollo_mini": 4, "novograd": 4}  # whose best rate had been at the edge of three
        assert all(len(variant.lrs) == wider.get(variant.name, 3) for variant in study.variants)
        configs = [variant.config for variant in study.variants]
        assert {config.data.train_files for config in configs} == {"other.txt"}
        if name == "norms_2m":
            six = {"pre_ln", "post_ln", "pre_rmsnorm", "post_rmsnorm", "mix_ln", "layernorm_scaling"}
            assert {config.model.norm for config in configs} >= six
            assert "scaled" in {config.model.init for config in configs}
        else:
            names = {config.optimizer.name for config in configs}
            assert study.baseline == "adamw" and names == set(create_optimizer.names())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "tokens"), [("fourbit_2m", 400_000), ("fourbit_60m", 50_000_000)])
def test_the_4_bit_studies_set_both_optimizers_against_each_other_with_and_without_4_bits(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = Path("configs/compare") / f"{name}.yaml"
    study = load_study([path], ["data.train_files=other.txt"], interval=False)
    configs = {variant.name: variant.config for variant in study.variants}
    asked = {
        (config.optimizer.name, bool(config.model.quantization), config.train.grad_clip)
        for config in configs.values()
    }
    assert asked == {
        ("adamw", False, 1.0),
        ("adamw", False, None),
        ("stable_spam", False, None),
        ("adamw", True, None),
        ("stable_spam", True, None),
    }
    assert configs[study.baseline].train.grad_clip == 1.0
    for config in configs.values():
        assert study.steps * config.train.global_batch_size * config.data.sequence_length >= tokens
        assert config.train.precision == "bf16"
