"""The benchmark of optimizer steps: its arithmetic by hand, and that each side moves all weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("optimizer_step", FOLDER / "optimizer_step.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def test_refreshes_are_told_from_plain_steps_and_spread_over_their_gap(bench):
    assert (bench.GAP, bench.WARM) == (8, 2)
    # Updates 3 to 18; 9 and 17 find the subspace.
    method = [2.0] * 16
    method[9 - 3] = method[17 - 3] = 42.0
    row = bench.summary(method, [2.0] * 16, gap=200, first=3)
    assert row == {"plain": 1.0, "refresh": 21.0, "gap": 200, "amortized": 1.0 + 20.0 / 200, "worst": 21.0}
    assert bench.summary(method, [2.0] * 16, gap=1, first=3) == {
        "plain": 1.0,
        "amortized": 1.0,
        "worst": 21.0,
    }


def test_weights_and_gradients_are_random_and_every_side_moves_them(bench, monkeypatch):
    from llmnorm.config import PRESETS

    shape = PRESETS["2m"]._replace(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    monkeypatch.setitem(PRESETS, "2m", shape)
    names = []
    for name, build in bench.contestants(["galore", "galore, Q-GaLore", "muon", "torch.optim.Muon"]):
        model = bench.random_model("2m", 64, "cpu", torch.float32)
        contestant = build(model)
        bench.give_gradients(model)
        before = [p.detach().clone().double() for p in model.parameters()]
        assert all(p.grad.std() > 1e-4 and p.detach().double().std() > 1e-3 for p in model.parameters())
        for _ in range(3):
            contestant.optimizer.step()
        moved = [
            bool((p.detach().double() != b).any()) for p, b in zip(model.parameters(), before, strict=True)
        ]
        assert all(moved), name
        names.append((name, contestant.gap))
    assert names == [("galore", 200), ("muon", 1), ("galore, Q-GaLore", 200), ("torch.optim.Muon", 1)]


def test_the_table_names_what_was_not_measured(bench):
    row = {"plain": 1.5, "amortized": 1.6, "worst": 9.0, "refresh": 8.0, "ms": 2.0, "step_peak_bytes": None}
    record = {"device": "a CPU", "date": "2026-01-01", "note": "Busy.", "sizes": {}}
    rows = {"galore": row, "torchao AdamW8bit": {"absent": True}}
    record["sizes"]["2m"] = {"parameters": 5, "dtype": "float32", "rows": rows}
    text = bench.table({"cpu": record})
    assert "| galore | 1.50 | 8.00 | 1.60 | 9.00 | 2.00 |  |" in text
    assert "Not installed: torchao AdamW8bit." in text
    assert "Not yet measured on a GPU" in text and "Busy." in text
