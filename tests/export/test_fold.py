"""Folding into stock classes: the same function, or a reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Glm4ForCausalLM,
    LlamaForCausalLM,
    MiniMaxForCausalLM,
    Olmo2ForCausalLM,
    Qwen3ForCausalLM,
    StableLmForCausalLM,
)

from llmnorm.errors import UserError
from llmnorm.export import NotFoldableError, absorb, export_checkpoint, fold_table, fold_to_stock
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.equation import Layer, ResidualPlan, Sublayer

IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
LAYERNORM = {"norm_options": {"norm_type": "layernorm"}}


POST = {"norm_options": {"embedding_norm": True, "final_norm": False}}
# The paper's initialization, times the fixture's factor, would leave every softmax at one position.
DEEPNORM = {"norm_options": {**POST["norm_options"], "own_init": False}}
PERI = {"norm_options": {"embedding_norm": True}}
ODD_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48}
BIASES = {"attention_bias": True, "mlp_bias": True}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0}}


def without(model: LlmNormForCausalLM, *names: str) -> LlmNormForCausalLM:
    """The model with the parameters whose names end so set to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.zero_()
    return model


RECENTERED = {"norm_options": {"recentered": True}}
# (norm, model keys, parameters set to zero, the class asked for, the class)
FOLDS: list[tuple[Any, dict[str, Any], tuple[str, ...], str | None, type]] = [
    ("pre_rmsnorm", {}, (), None, LlamaForCausalLM),
    ("pre_rmsnorm", {**BIASES, "head_dim": 16}, (), None, LlamaForCausalLM),
    ("layernorm_scaling", ODD_HEADS, (), None, LlamaForCausalLM),
    ("mix_ln", {"norm_options": {"num_post_layers": 0}}, (), None, LlamaForCausalLM),
    (["pre_rmsnorm", "layernorm_scaling"] * 2, {}, (), None, LlamaForCausalLM),
    ("scalenorm", {}, (), None, LlamaForCausalLM),
    ("scalenorm", {"norm_options": {"fixnorm": True}}, (), None, LlamaForCausalLM),
    ("pre_rmsnorm", {**RECENTERED, **ODD_HEADS}, (), None, StableLmForCausalLM),
    ("pre_rmsnorm", RECENTERED, ("model.norm.bias",), "llama", LlamaForCausalLM),
    ("pre_crmsnorm", ODD_HEADS, (), None, LlamaForCausalLM),
    ("pre_crmsnorm", {**BIASES, "head_dim": 16}, (), None, LlamaForCausalLM),
    ("skipinit", BIASES, (), None, LlamaForCausalLM),
    ("rezero", {}, (), None, LlamaForCausalLM),
    ("layerscale", BIASES, (), None, LlamaForCausalLM),
    ("gpas", {}, (), None, LlamaForCausalLM),
    (["gpas", "skipinit", "gpas", "layernorm_scaling"], {}, (), None, LlamaForCausalLM),
    (
        "gpas",
        {"norm_options": {"base": "layernorm_scaling", "norm_type": "layernorm"}},
        (),
        None,
        StableLmForCausalLM,
    ),
    ("gpas", {"norm_options": {"base": "sandwich"}}, (), None, Glm4ForCausalLM),
    (
        "pre_ln",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        (),
        None,
        StableLmForCausalLM,
    ),
    ("pre_ln", ODD_HEADS, (), None, StableLmForCausalLM),
    ("pre_ln", {"attention_bias": True}, ("o_proj.bias",), None, StableLmForCausalLM),
    ("pre_ln", {}, ("model.norm.bias",), "llama", LlamaForCausalLM),
    ("pre_ln", BIASES, ("model.norm.bias",), None, LlamaForCausalLM),
    ("layernorm_scaling", LAYERNORM, (), None, StableLmForCausalLM),
    ("layerscale", LAYERNORM, ("model.norm.bias",), "llama", LlamaForCausalLM),
    ("qk_norm", {"attention_bias": True, "head_dim": 16}, (), None, Qwen3ForCausalLM),
    ("qk_norm", {**ODD_HEADS, **YARN}, (), None, Qwen3ForCausalLM),
    ("qk_norm", LAYERNORM, ("q_norm.bias", "k_norm.bias"), None, StableLmForCausalLM),
    ("reordered", {"attention_bias": True}, (), None, Olmo2ForCausalLM),
    ("reordered", ODD_HEADS, (), None, Olmo2ForCausalLM),
    ("sandwich", {"head_dim": 12}, (), None, Glm4ForCausalLM),
    ("sandwich", {**ODD_HEADS, **YARN, "attention_bias": True}, ("o_proj.bias",), None, Glm4ForCausalLM),
    ("sandwich", {"attention_bias": True, "hidden_act": "gelu"}, (), None, Gemma2ForCausalLM),
    ("sandwich", {**ODD_HEADS, "head_dim": 12}, (), "gemma2", Gemma2ForCausalLM),
    ("peri_ln", PERI, (), None, Glm4ForCausalLM),
    ("peri_ln", PERI, (), "gemma2", Gemma2ForCausalLM),
    ("post_rmsnorm", {**POST, **ODD_HEADS}, (), None, MiniMaxForCausalLM),
    ("deepnorm", {**DEEPNORM, "head_dim": 16}, (), None, MiniMaxForCausalLM),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("norm", "keys", "zeros", "wanted", "stock_class"), FOLDS)
@torch.no_grad()
def test_o11_the_same_logits_and_the_same_text(
    make_model: Callable,
    norm: Any,
    keys: dict,
    zeros: tuple,
    wanted: str | None,
    stock_class: type,
    tied: bool,
) -> None:
    """O10 and O11: every fold, with random gains, shifts, scales and gates, grouped and odd heads."""
    model = without(make_model(norm, tie_word_embeddings=tied, **keys), *zeros)
    stock = fold_to_stock(model, stock_class=wanted)
    assert type(stock) is stock_class
    # Equal up to fp32 roundings in another order, some 1e-6 of logits of a few units; GPAS also up to
    # epsilon.
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-5, atol=5e-5)
    changed = norm in ("peri_ln", "pre_crmsnorm") or "model.norm.bias" in zeros
    changed |= model.config.norm_options.get("fixnorm", False) or model.config.is_recentered
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) is (tied and not changed)
    assert stock.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = {"inputs": IDS[:, :6], "attention_mask": torch.ones_like(IDS[:, :6])}
    assert torch.equal(stock.generate(**prompt, **greedy), model.generate(**prompt, **greedy))


@pytest.mark.parametrize(
    ("norm", "keys", "stock_class"),
    [
        ("qk_norm", {}, "qwen3"),
        ("reordered", {}, "olmo2"),
        ("sandwich", {}, "glm4"),
        ("sandwich", {}, "gemma2"),
        ("deepnorm", DEEPNORM, "minimax"),
        ("pre_ln", {}, "stablelm"),
        ("gpas", {}, "llama"),
    ],
)
def test_o11_a_stock_export_loads_by_its_own_name_and_verifies(
    make_model: Callable, tmp_path: Path, norm: str, keys: dict, stock_class: str
) -> None:
    model = make_model(norm, **keys)
    folder = export_checkpoint(model, tmp_path / "out", format="stock", stock_class=stock_class)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == stock_class and "auto_map" not in config and not list(folder.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=5e-5)


def test_o11_minimax_files_have_the_names_of_minimax(make_model: Callable, tmp_path: Path) -> None:
    """What transformers itself writes for MiniMax, so that other readers of the format find it."""
    model = make_model("post_rmsnorm", **POST)
    folder = export_checkpoint(model, tmp_path / "out", format="stock")
    stock = fold_to_stock(model)
    theirs = MiniMaxForCausalLM(stock.config)
    theirs.load_state_dict(stock.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "theirs"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_bf16_stock_exports_are_what_their_rounded_weights_compute(
    make_model: Callable, tmp_path: Path
) -> None:
    model = make_model("sandwich").bfloat16()
    for stock_class in ("glm4", "gemma2"):
        folder = export_checkpoint(model, tmp_path / stock_class, format="stock", stock_class=stock_class)
        assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("norm", ["layernorm_scaling", "mix_ln"])
def test_o5_o19_an_unfolded_export_never_loads_as_llama(
    make_model: Callable, tmp_path: Path, norm: str
) -> None:
    """LNS has the very keys and shapes of Llama: without the interlock its factors would vanish in
    silence.
    """
    folder = export_checkpoint(make_model(norm), tmp_path / "out")
    with pytest.raises(Exception, match=f"not a Llama: norm={norm}"):
        LlamaForCausalLM.from_pretrained(folder)


@torch.no_grad()
def test_o10_gates_that_turn_the_stream_around_fold(make_model: Callable) -> None:
    """1 - SiLU(gate) is negative from gate 1.28 on; then N(Cx) = -N(x), and the gains take the sign.

    C is 0.005 at the end here, so an epsilon of 1e-6 would tell the two models apart.
    """
    model = make_model("gpas", rms_norm_eps=1e-12)
    for layer, gate in zip(model.model.layers, (1.6, -1.0, 2.0, 1.5), strict=True):
        layer.attention_sum.gate.fill_(gate)
    stock = fold_to_stock(model)
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-4, atol=2e-4)


def test_docs_table_is_what_the_code_folds() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    written = page.split(fold_table.BEGIN + "\n")[1].split(fold_table.END)[0]
    assert written == fold_table.fold_table(), "run python -m llmnorm.export.fold_table docs/export.md"


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
    monkeypatch.setattr(absorb, "residual_plan", lambda *_: plan)
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
        ("post_ln", {}, "layer 1's attention sublayer normalizes the residual sum by layernorm"),
        (
            "post_rmsnorm",
            {},
            "minimax begins with a norm.* and minimax ends with the norm of its last sublayer",
        ),
        ("deepnorm", PERI, "ends with the norm of its last sublayer, after which this model has one more"),
        (
            "mix_ln",
            {"norm_options": {"num_post_layers": 1}},
            "layer 1's attention .* in one layer and not in another",
        ),
        (["pre_ln", "pre_rmsnorm", "pre_rmsnorm", "pre_rmsnorm"], {}, "it mixes layernorm, rmsnorm"),
        (["qk_norm", "pre_rmsnorm"] * 2, {}, "normalizes its q, k projections by rmsnorm.* not in another"),
        ("sandwich", LAYERNORM, "layer 1's attention sublayer normalizes its output by layernorm"),
        ("reordered", LAYERNORM, "normalizes its output by layernorm"),
        ("hybrid_norm", {}, "layer 1's attention sublayer does not normalize its input"),
        ("none", {}, "does not normalize its input"),
        (
            "pre_ln",
            {"attention_bias": True},
            "StableLmForCausalLM, but not with the biases of self_attn.o_proj",
        ),
        (
            "pre_ln",
            BIASES,
            "mlp.gate_proj.*; it folds into LlamaForCausalLM, but not with the shift of the final norm",
        ),
        ("pre_ln", {"head_dim": 16}, "not with head_dim=16"),
        ("pre_crmsnorm", {"norm_options": {"head_bias": True}}, "has a bias on its head"),
        ("qk_norm", LAYERNORM, "not with the shifts of the norms of queries and keys"),
        ("qk_norm", {"mlp_bias": True}, "Qwen3ForCausalLM, but not with the biases of mlp.gate_proj"),
        ("reordered", {"head_dim": 16}, "Olmo2ForCausalLM, but not with head_dim=16"),
        ("sandwich", {"mlp_bias": True}, "Glm4ForCausalLM, but .*; it folds into Gemma2ForCausalLM, but not"),
    ],
)
def test_what_has_no_stock_class_says_why(make_model: Callable, norm: Any, keys: dict, reason: str) -> None:
    with pytest.raises(NotFoldableError, match=reason):
        fold_to_stock(make_model(norm, **keys))


def test_the_class_asked_for(make_model: Callable, tmp_path: Path) -> None:
    with pytest.raises(NotFoldableError, match=r"no llama: layer 1.* by rmsnorm, and llama does not do that"):
        fold_to_stock(make_model("sandwich"), stock_class="llama")
    with pytest.raises(UserError, match="stock_class='gema2' is not written here; did you mean gemma2"):
        fold_to_stock(make_model("sandwich"), stock_class="gema2")
    with pytest.raises(UserError, match="stock_class=llama does nothing with format=hf"):
        export_checkpoint(make_model("pre_rmsnorm"), tmp_path / "out", stock_class="llama")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_stream_times_zero_is_refused(make_model: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("pre_rmsnorm")
    silent = Sublayer(norm_in="rmsnorm", output_scale=0.0)
    plan = ResidualPlan((Layer(silent, silent),) * 4, "rmsnorm")
    monkeypatch.setattr(absorb, "residual_plan", lambda *_: plan)
    with pytest.raises(
        NotFoldableError, match=r"model.layers.0.attention multiplies the residual stream by 0"
    ):
        fold_to_stock(model)
