"""The Shakespeare benchmark: valid runs, a tight model below 10 by construction, a table from the JSON."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm.config import load_run_config
from llmnorm.evaluation.certificate import certify
from llmnorm.modeling import LlmNormForCausalLM, initialize_weights
from llmnorm.optim import project_weights
from llmnorm.training.plan import planned_model_config

ROOT = Path(__file__).parents[1]
SIZE = {"steps": 8, "width": 32, "length": 16, "batch": 2}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("lipschitz_shakespeare")


def test_every_run_is_a_valid_config_and_caps_what_it_says(benchmark: Any, tmp_path: Path) -> None:
    for name in benchmark.RUNS:
        config = load_run_config(benchmark.CONFIG, benchmark.overrides(name, SIZE, tmp_path))
        assert config.model.architecture == "lipschitz"
        assert (config.model.hidden_size, config.train.max_steps) == (32, 8)
        constraint = config.model.weight_constraint
        assert (
            constraint.name == {"muon": "spectral_soft_cap", "adamw": "spectral_cap"}[config.optimizer.name]
        )
        if "cap" in name:
            assert name == f"{config.optimizer.name}_cap{constraint.max_norm:g}"


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_constant_of_the_tight_run_is_below_10_whatever_it_learns(
    benchmark: Any, tmp_path: Path, scale: float
) -> None:
    """Also for weights far beyond the caps, which the constraint brings back."""
    config = load_run_config(benchmark.CONFIG, benchmark.overrides("muon_below_10", SIZE, tmp_path))
    model = LlmNormForCausalLM(planned_model_config(config))
    initialize_weights(model, seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    project_weights(model)
    assert certify(model).log10_lipschitz < 1.0
    if scale > 1:
        assert certify(model).log10_lipschitz > 0.8  # the caps are reached, so the claim is not idle


def test_the_table_names_every_certified_run_in_order(benchmark: Any) -> None:
    def row(optimizer: str, log10: float) -> dict[str, Any]:
        pairs = {"logits_rms": log10, "logit_difference": log10 + 1}
        proof = {"log10": pairs, "log10_published": pairs, "log10_lower_bound": log10 - 1}
        shared = {"size": SIZE, "lr": 0.1, "parameters": 5, "accuracy": 0.25, "loss": 2.5}
        own = {"optimizer": optimizer, "constraint": {"max_norm": 2.0}, "certificate": proof}
        return {**shared, **own, "loss_at_10": 5.5}

    content = {
        "runs": {"large": row("adamw", 7.0), "small": row("muon", 0.5)},
        "environment": {"device": "CPU", "torch": "2", "date": "today"},
    }
    content["runs"]["unproven"] = {k: v for k, v in row("muon", 0).items() if k != "loss_at_10"}
    lines = benchmark.table(content).splitlines()
    assert lines[2] == "| small | muon | 2 | 25.0 % | 2.500 | 0.50 | 5.5000 | 1.50 | -0.50 | 0.50 |"
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| small", "| large"]
    assert "unproven" not in "\n".join(lines)


def test_the_committed_table_is_that_of_the_json(benchmark: Any) -> None:
    if not benchmark.RESULT.exists():
        pytest.skip("the benchmark has not been run")
    page = (ROOT / "docs" / "lipschitz.md").read_text(encoding="utf-8")
    table = benchmark.table(json.loads(benchmark.RESULT.read_text()))
    assert f"<!-- {benchmark.MARK} -->\n{table}\n<!-- end of {benchmark.MARK} -->" in page
