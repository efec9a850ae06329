"""Exports of models whose projections multiply with functions of their stored matrices: ordinary models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llmnorm.evaluation.certificate import certify
from llmnorm.export import export_checkpoint, fold_to_stock, initial_weights, load_model
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.parametrized_linear import ParametrizedLinear
from llmnorm.modeling.weight_parametrization import PARAMETRIZATIONS
from llmnorm.optim import project_weights

TOKENS = torch.arange(24).reshape(2, 12)
COMPOSED = [{"name": "weight_standardization"}, {"name": "sigma_reparam", "initial_gain": 2.0}]
ALL_BUT_OUTPUT = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def make(make_model: Callable[..., Any], steps: Any, **keys: Any) -> Any:
    model = make_model(weight_parametrization=steps, **keys)
    project_weights(model)  # the fixture has moved the weights
    return model


@pytest.mark.parametrize("steps", [*PARAMETRIZATIONS, COMPOSED], ids=str)
def test_an_export_is_plain_and_computes_the_same(make_model, steps, tmp_path: Path) -> None:
    model = make(make_model, steps)
    folder = export_checkpoint(model, tmp_path / "out")
    loaded = load_model(folder)
    assert loaded.config.weight_parametrization is None
    assert json.loads((folder / "config.json").read_text())["weight_parametrization"] is None
    assert not any(isinstance(module, ParametrizedLinear) for module in loaded.modules())
    plain = make_model()
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)
    assert model.config.weight_parametrization is not None


def test_norms_to_return_to_stay_behind_and_any_start_may_set_a_constraint(make_model, tmp_path) -> None:
    nap = {"name": "normalize_and_project"}
    model = make_model(weight_constraint=nap)
    project_weights(model)
    folder = export_checkpoint(model, tmp_path / "out")
    exported = load_model(folder)
    assert exported.config.weight_constraint is None
    assert exported.state_dict().keys() == make_model().state_dict().keys()
    assert torch.equal(exported(TOKENS).logits, model(TOKENS).logits)
    assert isinstance(fold_to_stock(model), LlamaForCausalLM)
    for constraint in (nap, {"name": "spectral_cap", "max_norm": 2.0}):
        started = initial_weights(str(folder), {"weight_constraint": constraint})
        assert started.config.weight_constraint["name"] == constraint["name"]
        other = LlmNormForCausalLM(started.config)
        started.copy_into(other)
        assert torch.equal(other.eval()(TOKENS).logits, model(TOKENS).logits)


def test_it_folds_into_llama(make_model, tmp_path: Path) -> None:
    model = make(make_model, "spectral_norm")
    assert isinstance(fold_to_stock(model), LlamaForCausalLM)
    folder = export_checkpoint(model, tmp_path / "out", format="stock")
    llama = LlamaForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(llama(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)
    for layer in llama.model.layers:
        norm = torch.linalg.matrix_norm(layer.mlp.up_proj.weight.detach().double(), 2)
        assert float(norm) == pytest.approx(1.0, abs=1e-6)


def test_a_runs_checkpoint_keeps_it_and_starting_from_its_export_does_not(
    make_model, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    model = make(make_model, COMPOSED)
    run = make_run(model)
    again = initial_weights(str(run))
    continued = LlmNormForCausalLM(again.config)
    again.copy_into(continued)
    assert torch.equal(continued.eval()(TOKENS).logits, model(TOKENS).logits)
    assert initial_weights(str(run)).config.weight_parametrization == model.config.weight_parametrization
    export_checkpoint(run, run / "export")
    assert initial_weights(str(run / "export")).config.weight_parametrization is None
    torch.testing.assert_close(load_model(run)(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)


def test_the_certificate_is_of_the_matrices_that_multiply(make_model, tmp_path: Path) -> None:
    """Also of `method: power`, whose largest singular value is not quite what it should be."""
    step = {"name": "spectral_norm", "method": "power", "modules": ALL_BUT_OUTPUT}
    keys = {"architecture": "lipschitz", "num_hidden_layers": 2}
    model = make(make_model, step, norm="convex", **keys)
    found = certify(model)
    exported = load_model(export_checkpoint(model, tmp_path / "out"))
    assert certify(exported).log10_lipschitz == pytest.approx(found.log10_lipschitz, abs=1e-6)
    saved = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert saved["log10_lipschitz"] == pytest.approx(found.log10_lipschitz, abs=1e-6)
    stored = make_model("convex", **keys)  # the same stored matrices, multiplied with as they are
    assert certify(stored).log10_lipschitz > found.log10_lipschitz + 1
