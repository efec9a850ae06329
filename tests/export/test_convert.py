"""O4: Pre-LN -> Pre-RMSNorm -> Pre-CRMSNorm, exact in fp64, refused by name, nothing written on failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StableLmConfig, StableLmForCausalLM

from llmnorm.cli import main
from llmnorm.errors import UserError
from llmnorm.export import (
    ExportMismatch,
    convert,
    convert_checkpoint,
    fold_to_stock,
    initial_weights,
    load_model,
)
from llmnorm.export.convert import logits_difference, to_pre_rmsnorm
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.optim import project_weights

ModelMaker = Callable[..., LlmNormForCausalLM]
RunMaker = Callable[..., Path]
# 3 query heads over one key-value head of 10.
ODD_HEADS = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1}
BIASES = {"attention_bias": True, "mlp_bias": True}
# fp64 logits of a few units after four layers; the conversions came out at 1e-15 or 2e-15.
EXACT = 1e-13
STOCK = 1e-5  # transformers' Llama normalizes in fp32 whatever the dtype


def in_fp64(model: LlmNormForCausalLM, without: tuple[str, ...] = ()) -> LlmNormForCausalLM:
    """The model in fp64, with parameters whose names end so at zero."""
    with torch.no_grad():
        for name, parameter in model.double().named_parameters():
            if name.endswith(without or ("nothing",)):
                parameter.zero_()
    return model


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("to", ["pre_rmsnorm", "pre_crmsnorm"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keys", [{"head_dim": 16, "mlp_bias": True}, {**ODD_HEADS, "attention_bias": True}])
def test_o4_the_same_logits_in_fp64(
    make_model: ModelMaker, make_run: RunMaker, tmp_path: Path, keys: dict[str, Any], tied: bool, to: str
) -> None:
    """Random gains and shifts everywhere, the final norm's among them."""
    model = in_fp64(make_model("pre_ln", tie_word_embeddings=tied, rms_norm_eps=1e-3, **keys))
    result = convert_checkpoint(make_run(model), tmp_path / "out", to)
    loaded = load_model(tmp_path / "out")
    assert loaded.config.norm == to and next(loaded.parameters()).dtype == torch.float64
    assert result.difference < EXACT
    assert logits_difference(model, loaded) < EXACT
    # A recentered model reads the embedding through a centering, so a tied head stays tied.
    assert loaded.config.tie_word_embeddings is (tied and to == "pre_rmsnorm")
    assert any("untied" in note for note in result.notes) is (tied and to == "pre_crmsnorm")
    assert any("no optimizer state was taken over" in note for note in result.notes) is (to == "pre_crmsnorm")


def test_o4_the_stream_has_no_mean(make_model: ModelMaker, make_run: RunMaker, tmp_path: Path) -> None:
    model = in_fp64(make_model("pre_ln", **ODD_HEADS, **BIASES))
    convert_checkpoint(make_run(model), tmp_path / "out", "pre_rmsnorm")
    streams: list[torch.Tensor] = []
    loaded = load_model(tmp_path / "out")
    for one in (model, loaded):
        for layer in one.model.layers:
            layer.register_forward_hook(lambda module, args, output: streams.append(output))
        one(torch.arange(20)[None])
    theirs, ours = streams[:4], streams[4:]
    for before, after in zip(theirs, ours, strict=True):
        assert before.mean(-1).abs().max() > 1e-2
        assert after.mean(-1).abs().max() < 1e-15 * after.abs().max() * 10
        torch.testing.assert_close(after, before - before.mean(-1, keepdim=True), rtol=0, atol=1e-12)


def test_o4_there_and_on_and_back(make_model: ModelMaker, make_run: RunMaker, tmp_path: Path) -> None:
    """LN -> RMS -> CRMS, and the fold of that is RMS at full width again: Llama."""
    model = in_fp64(make_model("pre_ln", **ODD_HEADS), without=("model.norm.bias",))
    convert_checkpoint(make_run(model), tmp_path / "rms", "pre_rmsnorm")
    convert_checkpoint(tmp_path / "rms", tmp_path / "crms", "pre_crmsnorm")
    crms = load_model(tmp_path / "crms")
    assert crms.config.norm_options == {"head_bias": False}
    assert crms.config.attention_bias and crms.config.mlp_bias  # what the shifts before the branches became
    assert crms.model.layers[0].self_attn.q_proj.weight.shape == (30, 29)
    llama = fold_to_stock(crms)
    assert llama.config.model_type == "llama" and llama.config.hidden_size == 30
    assert logits_difference(model, crms) < EXACT
    assert logits_difference(model, llama) < STOCK


def test_a_converted_export_starts_a_run(make_model: ModelMaker, make_run: RunMaker, tmp_path: Path) -> None:
    """What `model.init_from` does with it, training's own recentering included."""
    model = in_fp64(make_model("pre_ln", tie_word_embeddings=True, **ODD_HEADS))
    for to in ("pre_rmsnorm", "pre_crmsnorm"):
        convert_checkpoint(make_run(model, to), tmp_path / f"{to}-out", to)
        weights = initial_weights(str(tmp_path / f"{to}-out"), {"norm": to, "tie_word_embeddings": None})
        fresh = LlmNormForCausalLM(weights.config).double().eval()
        weights.copy_into(fresh)
        project_weights(fresh)
        assert logits_difference(model, fresh) < EXACT


@pytest.mark.parametrize("to", ["pre_rmsnorm", "pre_crmsnorm"])
def test_without_shifts_nothing_gets_a_bias(
    make_model: ModelMaker, make_run: RunMaker, tmp_path: Path, to: str
) -> None:
    model = in_fp64(make_model("pre_ln", **ODD_HEADS), without=("norm.bias",))
    convert_checkpoint(make_run(model), tmp_path / "out", to)
    loaded = load_model(tmp_path / "out")
    assert not [name for name in loaded.state_dict() if name.endswith("bias")]
    assert loaded.config.is_llama is (to == "pre_rmsnorm")
    assert logits_difference(model, loaded) < EXACT
    assert logits_difference(model, fold_to_stock(loaded)) < STOCK


@pytest.mark.parametrize("constant", [False, True])
def test_o4_a_tied_head_is_recentered_only_under_a_constant_final_gain(
    make_model: ModelMaker, make_run: RunMaker, tmp_path: Path, constant: bool
) -> None:
    model = in_fp64(make_model("pre_ln", tie_word_embeddings=True), without=("norm.bias",))
    if constant:
        torch.nn.init.constant_(model.model.norm.weight, 1.7)
    result = convert_checkpoint(make_run(model), tmp_path / "out", "pre_rmsnorm")
    loaded = load_model(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is constant
    assert any("untied" in note for note in result.notes) is not constant
    assert logits_difference(model, loaded) < EXACT
    # The negative: a recentered head tied all the same loses what the gains, spread by 0.2, make of its mean.
    loaded.lm_head.weight = loaded.model.embed_tokens.weight
    assert (logits_difference(model, loaded) < EXACT) is constant
    assert constant or logits_difference(model, loaded) > 0.01


def test_a_stock_layernorm_model(tmp_path: Path) -> None:
    config = StableLmConfig(
        vocab_size=120,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )
    torch.manual_seed(0)
    stock = StableLmForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stock.save_pretrained(tmp_path / "stock")
    for to in ("pre_rmsnorm", "pre_crmsnorm"):
        convert_checkpoint(tmp_path / "stock", tmp_path / to, to)
        assert logits_difference(stock, load_model(tmp_path / to)) < EXACT


def test_bf16_is_converted_exactly_and_rounded_once(
    make_model: ModelMaker, make_run: RunMaker, tmp_path: Path
) -> None:
    model = make_model("pre_ln").bfloat16()
    result = convert_checkpoint(make_run(model), tmp_path / "out", "pre_crmsnorm")
    loaded = load_model(tmp_path / "out")
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert result.difference < 1e-5  # before rounding, in fp32
    rounded = logits_difference(model.float(), loaded.float())
    assert 1e-4 < rounded < 0.05  # weights rounded by 2^-9, through four layers
    assert any(f"its logits differ by {rounded:.1e}" in note for note in result.notes)


def test_a_conversion_that_computes_something_else_writes_nothing(
    make_model: ModelMaker, make_run: RunMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(config: Any, state: Any, trained: bool) -> convert.Draft:
        draft = to_pre_rmsnorm(config, state, trained)
        draft.state["model.layers.1.mlp.down_proj.weight"] = state["model.layers.1.mlp.down_proj.weight"]
        return draft

    run = make_run(in_fp64(make_model("pre_ln")))
    before = contents(tmp_path)
    monkeypatch.setitem(convert.TARGETS, "pre_rmsnorm", wrong)
    with pytest.raises(ExportMismatch, match=r"logits differ by .* Nothing was written"):
        convert_checkpoint(run, tmp_path / "out", "pre_rmsnorm")
    assert contents(tmp_path) == before


def test_an_export_that_fails_leaves_nothing(
    make_model: ModelMaker, make_run: RunMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(make_model("pre_ln"))
    before = contents(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmnorm.export.hf.save_torch_state_dict", full)
    with pytest.raises(UserError, match="No space left on device"):
        convert_checkpoint(run, tmp_path / "out", "pre_rmsnorm")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("norm", "keys", "to", "reason"),
    [
        ("post_ln", {}, "pre_rmsnorm", "has norm=post_ln, and only Pre-LN has an equivalent"),
        ("pre_rmsnorm", {}, "pre_crmsnorm", "has norm=pre_rmsnorm, and only Pre-LN"),
        ("pre_rmsnorm", {"norm_options": {"recentered": True}}, "pre_rmsnorm", "only Pre-LN"),
        (
            "mix_ln",
            {"norm_options": {"norm_type": "layernorm", "num_post_layers": 1}},
            "pre_rmsnorm",
            "mix_ln",
        ),
        (
            "pre_ln",
            {"attention_options": {"gate": "head"}},
            "pre_crmsnorm",
            "softmax attention without options",
        ),
    ],
)
def test_what_is_not_pre_ln_is_refused_by_name(
    make_model: ModelMaker,
    make_run: RunMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    norm: str,
    keys: dict[str, Any],
    to: str,
    reason: str,
) -> None:
    run = make_run(make_model(norm, **keys))
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "--to", to, str(run), str(tmp_path / "out")])
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_bad_arguments_are_refused(
    make_model: ModelMaker, make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(make_run(make_model("pre_ln")))
    (tmp_path / "there").mkdir()
    before = contents(tmp_path)
    mistakes = {
        ("--to", "pre_ln", run, str(tmp_path / "out")): "invalid choice: 'pre_ln'",
        ("--to", "pre_rmsnorm", str(tmp_path / "absent"), str(tmp_path / "out")): "there is no such folder",
        ("--to", "pre_rmsnorm", run, str(tmp_path / "there")): "exists; give a folder that does not",
        ("--to", "pre_rmsnorm", str(tmp_path / "there"), str(tmp_path / "out")): "neither config.json",
        ("--to", "pre_rmsnorm", run): "the following arguments are required: output",
    }
    for words, reason in mistakes.items():
        with pytest.raises(SystemExit) as exit_:
            main(["convert", *words])
        assert exit_.value.code == 2
        assert reason in capsys.readouterr().err
    assert contents(tmp_path) == before
    with pytest.raises(UserError, match="known are pre_rmsnorm, pre_crmsnorm"):
        convert_checkpoint(run, tmp_path / "out", "rmsnorm")


def test_the_command_says_what_it_wrote(
    make_model: ModelMaker, make_run: RunMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(make_model("pre_ln")), tmp_path / "out"
    main(["convert", "--to", "pre_crmsnorm", str(run), str(out)])
    said = capsys.readouterr().out
    assert f"wrote {out}; its logits differ by " in said
    assert "note: trained on, this is a model of its own" in said
    assert f"model.init_from: {out} starts from these weights" in said
