"""The benchmark of weight constraints: it runs at a tiny shape, sets matrices where it says, tells all."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("constraint_cost", FOLDER / "constraint_cost.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def test_it_measures_every_rule_beside_the_steps_of_one_run(bench, monkeypatch, tmp_path):
    from llmnorm.config import PRESETS
    from llmnorm.modeling.weight_constraint import CONSTRAINTS
    from llmnorm.optim.spectral_constraints import constrain_spectra

    shape = PRESETS["2m"]._replace(hidden_size=32, intermediate_size=48)
    monkeypatch.setitem(PRESETS, "2m", shape)
    reached = []

    def watched(model, optimizer=None):
        before = max(bench.largest(p) for p in model.model.layers[0].parameters() if p.ndim == 2)
        constrain_spectra(model, optimizer)
        reached.append(before)

    monkeypatch.setattr("llmnorm.optim.constraints.constrain_spectra", watched)
    output = tmp_path / "cost.json"
    assert bench.main(["--size", "2m", "--repeats", "2", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    rows = record["results"]
    assert {row.partition(",")[0] for row in rows} >= {f"step of {name}" for name in ("muon", "adamw")} | {
        *CONSTRAINTS
    }
    assert all(0 < row["min"] <= row["median"] <= row["max"] for row in rows.values())
    assert {round(value, 4) for value in reached} >= {bench.ABOVE, bench.BELOW}
    table = bench.table(record)
    assert all(f"| {row} |" in table for row in rows)
    cost, step = rows["stiefel"]["median"], rows["step of muon"]["median"]
    assert f"| {bench.short(cost / step)} |" in next(
        line for line in table.splitlines() if "| stiefel" in line
    )
    assert [bench.short(x) for x in (1690.0, 7.04, 0.64, 0.0055)] == ["1690", "7", "0.64", "0.005"]


def test_the_page_has_the_table_of_the_committed_measurement(bench):
    record = json.loads(bench.RESULT.read_text(encoding="utf-8")) if bench.RESULT.exists() else None
    assert bench.table(record) in bench.PAGE.read_text(encoding="utf-8")


def test_weights_below_the_cap_are_left_alone_to_the_last_bit():
    from llmnorm.optim.spectral_caps import hard_cap, is_within, normalize, spectral_norm

    for m, n in ((12, 20), (20, 12)):
        weight = torch.randn(m, n, generator=torch.Generator().manual_seed(m))
        largest = float(spectral_norm(weight))
        for factor, within in ((1 + 1e-6, True), (1 - 1e-6, False)):
            assert is_within(weight, largest * factor) == within
            for rule in (hard_cap, normalize):
                changed = rule(weight, largest * factor)
                assert torch.equal(changed, weight) == within
                assert float(spectral_norm(changed)) <= largest * factor * (1 + 1e-7)
    assert not is_within(torch.full((3, 4), torch.nan), 1.0)
