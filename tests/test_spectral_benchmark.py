"""The benchmark of matrix optimizers: what it does without a GPU, its formulas, and the table in the docs."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmnorm.evaluation.compare_study import load_study

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("spectral_gpu", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("spectral_gpu")


def test_without_a_gpu_one_sentence_and_nothing_written(benchmark, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--results", str(tmp_path / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "measures a GPU and there is none" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_table_of_the_page_is_that_of_the_json(benchmark) -> None:
    page = benchmark.PAGE.read_text(encoding="utf-8")
    record = json.loads(benchmark.RESULTS.read_text()) if benchmark.RESULTS.exists() else None
    assert f"<!-- spectral_gpu -->\n{benchmark.table(record)}\n<!-- end of spectral_gpu -->" in page


def test_the_study_reads_fifty_million_tokens_with_each_method(benchmark) -> None:
    study = load_study([benchmark.STUDY], interval=False)
    names = ["adamw", "muon", "normuon", "scale", "conda", "sinkgd", "stable_spam", "apollo_mini"]
    assert [variant.name for variant in study.variants] == names
    assert study.base.tokens_per_step == benchmark.TOKENS_PER_UPDATE
    assert study.steps == math.ceil(50e6 / benchmark.TOKENS_PER_UPDATE)
    assert all(len(variant.lrs) == 1 for variant in study.variants)
    assert {variant.config.model.hidden_size for variant in study.variants} == {512}


def test_the_answers_are_their_formulas(benchmark) -> None:
    took = dict.fromkeys(benchmark.STEPS, 0.010) | {
        "scale": 0.006,
        "muon": 0.030,
        "forward and backward": 0.5,
    }
    steps = {"preset": "1b", "parameters": 10**9, "tokens_of_a_pass": 8192, "seconds": took}
    found = benchmark.answers(steps)
    assert found["scale / torch fused adamw"] == pytest.approx(0.6)
    # 524288 tokens take 64 passes of half a second.
    assert found["added share of muon"] == pytest.approx(0.020 / 32.010)
    record = {
        "device": "a card",
        "versions": {"torch": "2"},
        "date": "today",
        "command": "it",
        "steps": steps,
    }
    assert "| muon | 30.00 | 3.00 | +0.06 % |" in benchmark.table(record)
    assert "| scale | 6.00 | 0.60 | -0.01 % |" in benchmark.table(record)


def test_the_smoke_run_times_every_method_on_one_model(benchmark, tmp_path) -> None:
    results = tmp_path / "results.json"
    words = ["--smoke", "--parts", "steps", "--rounds", "1", "--results", str(results)]
    assert benchmark.main(words) == 0
    record = json.loads(results.read_text())
    assert set(record["steps"]["seconds"]) == {"forward and backward", *benchmark.STEPS}
    assert all(value > 0 for value in record["steps"]["seconds"].values())
    assert record["answers"] == pytest.approx(benchmark.answers(record["steps"]))


def test_smoke_does_not_overwrite_results(benchmark, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--smoke"])
    assert "--smoke measures nothing; give --results FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_the_smoke_run_trains_and_goes_on_with_what_is_missing(benchmark, tmp_path) -> None:
    results = tmp_path / "results.json"
    words = ["--smoke", "--parts", "training", "--output_dir", str(tmp_path / "study")]
    words += ["--results", str(results), "--minutes", "60"]
    assert benchmark.main([*words, "--methods", "adamw", "scale"]) == 0
    first = json.loads(results.read_text())["training"]
    assert [row["name"] for row in first["variants"]] == ["adamw", "scale"] and first["not_run"] == []
    assert benchmark.main([*words, "--methods", "adamw", "scale", "sinkgd"]) == 0
    record = json.loads(results.read_text())
    rows = {row["name"]: row for row in record["training"]["variants"]}
    assert list(rows) == ["adamw", "scale", "sinkgd"]
    assert [rows["adamw"], rows["scale"]] == first["variants"]
    assert rows["sinkgd"]["optimizer_seconds"] > 0 and len(rows["sinkgd"]["runs"][0]["curve"]) >= 1
    assert f"| sinkgd | 0.02 | {rows['sinkgd']['loss']['mean']:.4f} |" in benchmark.table(record)
