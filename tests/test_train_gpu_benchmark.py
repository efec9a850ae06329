"""The benchmark of whole training steps: its arithmetic by hand, a tiny run on the CPU, its table in the
docs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("train_gpu", "tables", "budget"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("train_gpu")


def test_without_a_gpu_one_sentence_and_nothing_written(benchmark, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--results", str(tmp_path / "results.json")]) == 0
    assert "measures a GPU and there is none" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_smoke_does_not_overwrite_results(benchmark, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--smoke"])
    assert "--smoke measures nothing; give --results FILE" in capsys.readouterr().err


def test_the_table_of_the_page_is_that_of_the_json(benchmark) -> None:
    page = benchmark.PAGE.read_text(encoding="utf-8")
    record = json.loads(benchmark.RESULTS.read_text()) if benchmark.RESULTS.exists() else None
    assert f"<!-- train_gpu -->\n{benchmark.table(record)}\n<!-- end of train_gpu -->" in page


def test_mfu_and_shares_are_their_formulas(benchmark) -> None:
    parts = [[1.0, 2.0, 1.0], [1.0, 2.0, 2.0], [1.0, 3.0, 2.0]]  # steps of 4, 5 and 6 seconds
    row = benchmark.numbers(parts, tokens=1000, flops=1e9, peak=1e12)
    assert row["seconds"] == 5.0 and row["tokens_per_second"] == 200.0
    assert row["mfu"] == pytest.approx(200.0 * 1e9 / 1e12) and row["spread"] == pytest.approx(2.0 / 5.0)
    assert row["shares"] == {"forward": 0.2, "backward": 0.4, "clip and update": 0.4}


def test_the_smoke_run_trains_both_sides_and_adds_rows(benchmark, monkeypatch, tmp_path) -> None:
    """Both sides move their weights, a second call keeps the first one's rows, and an empty budget begins
    nothing."""
    results, losses = tmp_path / "results.json", {}
    words = ["--smoke", "--repeats", "1", "--results", str(results)]
    stock = benchmark.step_of

    def watched(model, ids, mode, attention, **options):
        step = stock(model, ids, mode, attention, **options)
        before = [p.detach().clone() for p in model.parameters()]

        def call(clock):
            step(clock)
            moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            losses[type(model).__name__] = all(moved)

        return call

    monkeypatch.setattr(benchmark, "step_of", watched)
    assert benchmark.main(words) == 0
    assert losses == {"LlmNormForCausalLM": True, "LlamaForCausalLM": True}
    record = json.loads(results.read_text())
    row = record["results"]["2m 32 eager"]
    assert row["failed"] == {} and row["ratio"] == row["transformers"]["seconds"] / row["ours"]["seconds"]
    for side in benchmark.SIDES:
        assert sum(row[side]["shares"].values()) == pytest.approx(1.0)
        assert row[side]["tokens_per_second"] == pytest.approx(benchmark.SMOKE_TOKENS / row[side]["seconds"])
    assert len(row["profile"]["kernels"]) == 20 and row["profile"]["busy"] > 0
    assert "| 2m, 32 | eager |" in benchmark.table(record)

    record["results"]["1b 2048 eager"] = row
    results.write_text(json.dumps(record))
    assert benchmark.main([*words, "--budget", "0"]) == 0
    assert json.loads(results.read_text()) == record


def test_a_side_that_fails_is_named_and_the_other_measured(benchmark, monkeypatch) -> None:
    def fails(*given):
        raise RuntimeError("no room: at all")

    monkeypatch.setattr(benchmark, "theirs", fails)
    monkeypatch.setattr(benchmark, "timed", lambda step, device, steps: [1.0, 2.0, 1.0])
    row = benchmark.measure("2m", 32, "eager", 1, torch.device("cpu"), smoke=True)
    assert row["failed"] == {"transformers": "RuntimeError: no room: at all"}
    assert row["ours"]["tokens_per_second"] == benchmark.SMOKE_TOKENS / 4.0 and "ratio" not in row
    record = {
        "device": "a card",
        "versions": {"torch": "2"},
        "date": "today",
        "command": "it",
        "liger": False,
    }
    assert "| RuntimeError |" in benchmark.table(record | {"results": {"2m 32 eager": row}})
