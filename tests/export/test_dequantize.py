"""Exports of 4-bit models: as trained, and as ordinary models with their weights on the grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from llmnorm.errors import UserError
from llmnorm.export import NotFoldableError, export_checkpoint, load_model
from llmnorm.export.dequantize import dequantized
from llmnorm.modeling.quantization import quantization_of, settle_quantization

QUANTIZATION = {"weights": "fp4", "activations": "int4", "group_size": 8}
TOKENS = torch.arange(24).reshape(2, 12)


def test_an_export_computes_with_the_quantization_it_was_trained_with(
    make_model: Callable, tmp_path: Path
) -> None:
    model = make_model("pre_rmsnorm", quantization=QUANTIZATION)
    loaded = load_model(export_checkpoint(model, tmp_path / "out"))
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    with pytest.raises(Exception, match="not a Llama"):
        LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_dequantized_weights_lie_on_their_grid_and_the_rest_is_untouched(make_model: Callable) -> None:
    model = make_model("pre_rmsnorm", quantization=QUANTIZATION)
    plain = dequantized(model)
    assert plain.config.quantization is None and model.config.quantization is not None
    quantizer = quantization_of(settle_quantization(QUANTIZATION)).weights
    for (name, ours), theirs in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        expected = quantizer(theirs) if "_proj" in name else theirs
        assert torch.equal(ours, expected), name
    again = dequantized(make_model("pre_rmsnorm", quantization={**QUANTIZATION, "activations": "none"}))
    assert again.config.quantization is None


def test_a_dequantized_model_folds_into_llama(make_model: Callable, tmp_path: Path) -> None:
    model = make_model("layernorm_scaling", quantization=QUANTIZATION)
    with pytest.raises(NotFoldableError, match="export with dequantize"):
        export_checkpoint(model, tmp_path / "out", format="stock")
    folder = export_checkpoint(model, tmp_path / "out", format="stock", dequantize=True)
    llama = LlamaForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(llama(TOKENS).logits, dequantized(model)(TOKENS).logits, rtol=0, atol=1e-5)


def test_dequantizing_a_plain_model_is_a_mistake(make_model: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dequantize does nothing"):
        export_checkpoint(make_model("pre_rmsnorm"), tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()
