"""O12: norms with running statistics fold exactly into a model without norms, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmnorm.export import NotFoldableError, export_checkpoint, fold_statistics, fold_to_stock
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.batch_statistics import BatchStatisticsNorm, batch_norms

IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
NORMS: dict[str, dict[str, Any]] = {
    "powernorm": {},
    "unified_norm": {"window": 2},
    "prepbn": {"interpolation_steps": 4, "norm_type": "layernorm"},
}


def trained(make_model: Callable, norm: Any, options: dict[str, Any], **keys: Any) -> LlmNormForCausalLM:
    """A model after five passes in training mode, statistics, gains and shifts off their first values."""
    model = make_model(norm, norm_options=options, **keys).train()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for kept in batch_norms(model):
            for parameter in kept.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for _ in range(5):
            model(IDS, use_cache=False)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_o12_the_same_logits_without_a_norm(make_model: Callable, norm: str, tied: bool) -> None:
    """fp64, to 1e-11 of logits of size 1 (2e-15 a fold); with biases of its own where it is tied."""
    keys = {"tie_word_embeddings": tied, "attention_bias": tied, "mlp_bias": tied}
    model = trained(make_model, norm, NORMS[norm], **keys).double()
    folded = fold_statistics(model)
    expected = model(IDS).logits
    torch.testing.assert_close(folded(IDS).logits, expected, rtol=1e-11, atol=1e-11)
    assert not any(isinstance(module, BatchStatisticsNorm) for module in folded.modules())
    assert [name for name, _ in folded.named_modules() if "norm" in name] == ["model.norm"]
    linear = folded.model.layers[0].mlp.up_proj
    assert isinstance(linear, nn.Linear) and linear.bias.abs().max() > 1e-3
    assert (folded.lm_head.weight is folded.model.embed_tokens.weight) is tied
    assert torch.equal(model(IDS).logits, expected)  # and the model is as it was


@torch.no_grad()
def test_bf16_folds_in_fp64_and_rounds_once(make_model: Callable) -> None:
    model = trained(make_model, "powernorm", {})
    exact = fold_statistics(model.double()).state_dict()
    rounded = fold_statistics(model.bfloat16())
    assert rounded.dtype == torch.bfloat16
    name = "model.layers.0.mlp.up_proj.weight"
    a, _ = model.model.layers[0].post_attention_layernorm.double().coefficients()
    weight = model.model.layers[0].mlp.up_proj.weight.double()
    assert torch.equal(rounded.state_dict()[name], (weight * a).bfloat16())
    torch.testing.assert_close(rounded.state_dict()[name].double(), exact[name], rtol=2**-6, atol=1e-4)


def test_a_folded_export_computes_the_same_and_generates_with_a_cache(
    make_model: Callable, tmp_path: Path
) -> None:
    model = trained(make_model, "prepbn", {"interpolation_steps": 4})
    folder = export_checkpoint(model, tmp_path / "folded", format="folded")
    loaded = LlmNormForCausalLM.from_pretrained(folder)
    assert loaded.config.norm == "none" and loaded.config.norm_options["final_affine"]
    # Two roundings to fp32 more in each layer.
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = [
        one.generate(IDS, use_cache=cache, **greedy) for one in (model, loaded) for cache in (True, False)
    ]
    assert all(torch.equal(text, texts[0]) for text in texts[1:])


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("pre_rmsnorm", {}, "layer 1 is not x .* at its input_layernorm, with N one of powernorm"),
        (["powernorm", "powernorm", "pre_ln", "powernorm"], {}, "layer 3 is not x"),
        ("prepbn", {"interpolation_steps": 10}, r"does not fold: lambda=0\.5 after 5 updates"),
        ("powernorm", {"token_rms": True}, "token_rms=true divides each token"),
    ],
)
def test_what_does_not_fold_is_named(
    make_model: Callable, tmp_path: Path, norm: Any, options: dict[str, Any], message: str
) -> None:
    model = trained(make_model, norm, options)
    with pytest.raises(NotFoldableError, match=message):
        fold_statistics(model)
    with pytest.raises(NotFoldableError, match=message):
        export_checkpoint(model, tmp_path / "folded", format="folded")
    assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize("norm", NORMS)
def test_no_stock_class_has_them(make_model: Callable, norm: str) -> None:
    with pytest.raises(NotFoldableError, match=f"norm={norm} folds into none of the stock classes"):
        fold_to_stock(make_model(norm))
