"""Folding into stock classes: the same function, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, StableLmForCausalLM

from llmnorm.export import NotFoldableError, fold, fold_to_stock
from llmnorm.modeling.residual import Layer, ResidualPlan, Sublayer

IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
LAYERNORM = {"norm_options": {"norm_type": "layernorm"}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("norm", "keys", "stock_class"),
    [
        ("pre_rmsnorm", {}, LlamaForCausalLM),
        ("pre_rmsnorm", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}, LlamaForCausalLM),
        ("layernorm_scaling", {}, LlamaForCausalLM),
        ("mix_ln", {"norm_options": {"num_post_layers": 0}}, LlamaForCausalLM),
        (["pre_rmsnorm", "layernorm_scaling"] * 2, {}, LlamaForCausalLM),
        ("pre_ln", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, StableLmForCausalLM),
        ("layernorm_scaling", LAYERNORM, StableLmForCausalLM),
        ("scalenorm", {}, LlamaForCausalLM),
        ("skipinit", {"attention_bias": True, "mlp_bias": True}, LlamaForCausalLM),
        ("rezero", {}, LlamaForCausalLM),
        ("layerscale", {"attention_bias": True, "mlp_bias": True}, LlamaForCausalLM),
        ("layerscale", LAYERNORM, StableLmForCausalLM),
    ],
)
@torch.no_grad()
def test_the_same_logits(
    make_model: Callable, norm: Any, keys: dict[str, Any], stock_class: type, tied: bool
) -> None:
    model = make_model(norm, tie_word_embeddings=tied, **keys)
    stock = fold_to_stock(model)
    assert type(stock) is stock_class
    # Equal up to the order of fp32 roundings in a norm and a product.
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-5, atol=2e-5)
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) is tied
    assert stock.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


@torch.no_grad()
def test_layernorm_scaling_divides_gains_by_the_root_of_the_depth(make_model: Callable) -> None:
    model = make_model("layernorm_scaling")
    stock = fold_to_stock(model)
    for number, (ours, theirs) in enumerate(
        zip(model.model.layers, stock.model.layers, strict=True), start=1
    ):
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected = getattr(ours, name).weight / number**0.5
            torch.testing.assert_close(getattr(theirs, name).weight, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stock.model.norm.weight, model.model.norm.weight, rtol=0, atol=0)


@torch.no_grad()
def test_a_branch_scale_goes_into_the_output_projections(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x + b f(N(x)), the form of SkipInit and LayerScale with one number: W_o and W_down take b."""
    model = make_model("pre_rmsnorm", attention_bias=True, mlp_bias=True)
    scaled = Sublayer(norm_in="rmsnorm", branch_scale=0.5)
    plan = ResidualPlan((Layer(scaled, scaled),) * 4, "rmsnorm")
    monkeypatch.setattr(fold, "residual_plan", lambda *_: plan)
    stock = fold_to_stock(model)
    for ours, theirs in zip(model.model.layers, stock.model.layers, strict=True):
        torch.testing.assert_close(theirs.self_attn.o_proj.weight, ours.self_attn.o_proj.weight / 2)
        torch.testing.assert_close(theirs.mlp.down_proj.bias, ours.mlp.down_proj.bias / 2)
        torch.testing.assert_close(theirs.mlp.up_proj.weight, ours.mlp.up_proj.weight)


def test_bf16_folds_in_fp32_and_rounds_once(make_model: Callable) -> None:
    model = make_model("layernorm_scaling").bfloat16()
    gain = model.model.layers[2].input_layernorm.weight
    folded = fold_to_stock(model).model.layers[2].input_layernorm.weight
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, (gain.float() / 3**0.5).bfloat16())


@pytest.mark.parametrize(
    ("norm", "keys", "reason"),
    [
        ("post_ln", {}, "layer 1's attention sublayer normalizes the residual sum"),
        ("post_rmsnorm", {}, "normalizes the residual sum"),
        ("mix_ln", {"norm_options": {"num_post_layers": 1}}, "layer 1's attention"),
        (["pre_ln", "pre_rmsnorm", "pre_rmsnorm", "pre_rmsnorm"], {}, "it mixes layernorm, rmsnorm"),
        ("deepnorm", {}, "layer 1's attention sublayer normalizes the residual sum"),
        ("sandwich", {}, "layer 1's attention sublayer normalizes its output"),
        ("peri_ln", {"norm_options": {"embedding_norm": True}}, "normalizes its output"),
        ("reordered", {}, "normalizes its output"),
        ("qk_norm", {}, "layer 1's attention sublayer normalizes its q, k projections"),
        ("hybrid_norm", {}, "layer 1's attention sublayer does not normalize its input"),
        ("gpas", {}, "layer 1's attention sublayer scales the residual stream by a gate"),
        ("none", {}, "does not normalize its input"),
        ("pre_ln", {"attention_bias": True}, "not with attention_bias=true"),
        ("pre_ln", {"mlp_bias": True}, "not with mlp_bias=true"),
        ("pre_ln", {"head_dim": 16}, "not with head_dim=16"),
    ],
)
def test_what_has_no_stock_class_says_why(make_model: Callable, norm: Any, keys: dict, reason: str) -> None:
    with pytest.raises(NotFoldableError, match=reason):
        fold_to_stock(make_model(norm, **keys))
