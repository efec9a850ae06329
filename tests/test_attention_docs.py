"""The tables of docs/attention.md are those that the committed measurements make."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("attention", "mqar", "tables"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_table_of_times_is_that_of_the_json() -> None:
    attention = importlib.import_module("attention")
    content = json.loads((RESULTS / "attention_cpu.json").read_text())
    assert f"<!-- attention_cpu -->\n{attention.table(content)}\n<!-- end of attention_cpu -->" in PAGE
    assert content["summary"] == attention.summary(content["rows"])
    # What the page claims: cost grows linearly, and the length from which it pays.
    assert content["summary"]["nalaformer"]["exponent"] <= 1.1
    assert content["summary"]["nalaformer"]["crossover"] == 4096


def test_the_table_of_recall_is_that_of_the_json() -> None:
    mqar = importlib.import_module("mqar")
    assert f"<!-- mqar -->\n{mqar.table(RESULTS / 'mqar.json')}\n<!-- end of mqar -->" in PAGE


def test_recall_asks_for_what_was_told() -> None:
    """Each repeated key's label is the value that followed it, and nothing else is a label."""
    import torch

    mqar = importlib.import_module("mqar")
    ids, labels = mqar.draw(3, 5, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (3, 20)
    for row, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        told = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(told) == 5
        assert {place for place, label in enumerate(answers) if label != -100} == set(range(10, 20, 2))
        assert all(answers[place] == told[row[place]] == row[place + 1] for place in range(10, 20, 2))


def test_recall_variants_have_one_number_of_parameters() -> None:
    mqar = importlib.import_module("mqar")
    budget = mqar._size({}, mqar.REFERENCE_WIDTH)
    for changes in mqar.VARIANTS.values():
        assert mqar._size(changes, mqar.matched_width(changes)) == pytest.approx(budget, rel=0.015)
