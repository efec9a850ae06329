"""The benchmark of refresh stalls: the steps that it calls quiet and busy are those."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llmnorm import create_optimizer
from llmnorm.config import PRESETS

FOLDER = Path(__file__).parents[1] / "benchmarks"
GAP = 5


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("refresh_stall", FOLDER / "refresh_stall.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = PRESETS["2m"]._replace(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    monkeypatch.setitem(PRESETS, "2m", shape)
    yield module
    sys.modules.pop("optimizer_step", None)


def test_matrices_refresh_in_the_steps_that_it_counts(bench: ModuleType) -> None:
    model = bench.random_model("2m", 64, "cpu", torch.float32)
    optimizer = create_optimizer("galore", model, 1e-3, update_proj_gap=GAP, stagger=True)
    bench.give_gradients(model)
    expected = bench.refreshing([name for name, _ in bench.hidden(optimizer)], GAP)
    assert sum(expected.values()) == 7
    optimizer.step()
    for step in range(2, GAP + 2):
        before = {name: optimizer.state[p]["basis"].clone() for name, p in bench.hidden(optimizer)}
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        found = [
            name
            for name, p in bench.hidden(optimizer)
            if not torch.equal(optimizer.state[p]["basis"], before[name])
        ]
        assert len(found) == expected[step], step


def test_a_row_has_the_three_times_and_the_table_their_ratios(bench: ModuleType) -> None:
    row = bench.measure("2m", "svd", 200, "cpu", 64)
    assert row["matrices"] == 7 and 1 <= row["most_in_one_step"] < 7
    assert all(row[f"{key}_ms"] > 0 for key in ("usual", "at_once", "in_turns"))
    row |= {"usual_ms": 10.0, "at_once_ms": 250.0, "in_turns_ms": 15.0}
    record = {"size": "2m", "device": "a CPU", "date": "2026-01-01", "note": "", "command": "x", "rows": {}}
    text = bench.table({"cpu": {**record, "rows": {"svd": row}}})
    assert "| svd | 10 | 250 | 25.0 | 15 | 1.50 | 7, " in text
