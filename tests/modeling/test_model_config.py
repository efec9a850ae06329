"""LlmNormConfig: Llama's keys and defaults, every rule, and a round trip through JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from llmnorm.modeling import (
    PRESETS,
    LlmNormConfig,
    LlmNormForCausalLM,
    initialize_weights,
    residual_plan,
)

ConfigMaker = Callable[..., LlmNormConfig]


def test_llama_keys_have_llama_defaults() -> None:
    ours, llama = LlmNormConfig().to_dict(), LlamaConfig().to_dict()
    own = {
        "architecture",
        "final_scale",
        "mlp",
        "mlp_options",
        "norm",
        "norm_options",
        "attention",
        "attention_options",
        "init",
        "mup",
        "quantization",
        "residual_dtype",
        "true_vocab_size",
        "weight_constraint",
        "weight_parametrization",
    }
    assert set(ours) - own == set(llama) - {"pretraining_tp"}
    different = {key for key in set(ours) - own if ours[key] != llama[key]}
    assert different == {"model_type"}
    assert (ours["bos_token_id"], ours["eos_token_id"], ours["norm"]) == (1, 2, "pre_rmsnorm")


def test_derived_values(make_config: ConfigMaker) -> None:
    config = make_config(num_key_value_heads=None)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert make_config(rope_theta=500.0).rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    given: dict[str, Any] = {"post_fraction": 0.5}
    assert make_config(norm="mix_ln", norm_options=given).norm_options["num_post_layers"] == 1
    assert given == {"post_fraction": 0.5}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 3, "num_layers=3 is not a key of LlmNormConfig; did you mean num_hidden_layers?"),
        ("hiden_size", 64, "did you mean hidden_size?"),
        ("norm_option", {}, "did you mean norm_options?"),
        ("qqqqq", 1, "qqqqq=1 is not a key of LlmNormConfig; known are vocab_size, hidden_size"),
        ("model_type", "llama", "model_type='llama' must be 'llmnorm'"),
        ("pretraining_tp", 2, "pretraining_tp=2 is not a key"),
        ("vocab_size", 0, "vocab_size=0 must be a positive integer"),
        ("hidden_size", 32.0, "hidden_size=32.0 must be a positive integer"),
        ("hidden_size", "32", "hidden_size='32' must be a positive integer"),
        ("intermediate_size", -1, "intermediate_size=-1 must be a positive integer"),
        ("num_hidden_layers", True, "num_hidden_layers=True must be a positive integer"),
        ("num_attention_heads", 0, "num_attention_heads=0 must be a positive integer"),
        ("num_attention_heads", 5, "num_attention_heads=5 must divide hidden_size=32"),
        ("num_key_value_heads", 3, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ("num_key_value_heads", 8, "num_key_value_heads=8 must divide num_attention_heads=4"),
        ("num_key_value_heads", 0, "num_key_value_heads=0 must be null or a positive integer"),
        ("head_dim", 7, "head_dim=7 must be even"),
        ("num_attention_heads", 32, "head_dim=1 must be even"),
        ("max_position_embeddings", None, "max_position_embeddings=None must be a positive integer"),
        ("initializer_range", 0, "initializer_range=0 must be a number above 0"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps=-1e-06 must be a number of at least 0"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps='1e-6' must be a number"),
        ("attention_dropout", 1.0, "attention_dropout=1.0 must be a number in [0, 1)"),
        ("tie_word_embeddings", 1, "tie_word_embeddings=1 must be true or false"),
        ("attention_bias", None, "attention_bias=None must be true or false"),
        ("mlp_bias", "no", "mlp_bias='no' must be true or false"),
        ("use_cache", 0, "use_cache=0 must be true or false"),
        ("hidden_act", "sliu", "hidden_act='sliu' is not a choice; did you mean silu?"),
        ("attention", "softmx", "attention='softmx' is not a choice; did you mean softmax?"),
        ("init", "depth-scaled", "init='depth-scaled' is not a choice; did you mean depth_scaled?"),
        ("residual_dtype", "float32", "residual_dtype='float32' is not a choice"),
        ("true_vocab_size", 62, "true_vocab_size=62 must not exceed vocab_size=61"),
        ("true_vocab_size", 0, "true_vocab_size=0 must be null or a positive integer"),
        ("pad_token_id", 61, "pad_token_id=61 must be below vocab_size=61"),
        ("pad_token_id", -1, "pad_token_id=-1 must be null or an integer of at least 0"),
        ("norm", "mixln", "norm='mixln' is not a norm; did you mean mix_ln?"),
        ("norm", ["pre_ln"], "norm lists 1 layers but num_hidden_layers=3"),
        ("norm_options", ["norm_type"], "norm_options=['norm_type'] must be a mapping"),
        ("norm_options", {"post_fraction": 0.5}, "post_fraction is not an option of norm=pre_rmsnorm"),
        ("rope_theta", -1.0, "rope_parameters.rope_theta=-1.0 must be a number above 0"),
        ("rope_parameters", {"rope_type": "ynar"}, "rope_parameters.rope_type='ynar' is not a choice"),
        ("rope_parameters", {"rope_type": "linear"}, "rope_parameters.factor is missing"),
        ("rope_parameters", {"factor": 2.0}, "rope_parameters.factor is not a key of rope_type=default"),
    ],
)
def test_mistakes_name_key_value_and_rule(
    make_config: ConfigMaker, key: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        make_config(**{key: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_post_fraction_out_of_range(make_config: ConfigMaker) -> None:
    for fraction in (-0.01, 1.01):
        with pytest.raises(ValueError, match=r"post_fraction=.* must be a number in \[0, 1\]"):
            make_config(norm="mix_ln", norm_options={"post_fraction": fraction})


def test_megatron_head_needs_a_head(make_config: ConfigMaker) -> None:
    with pytest.raises(ValueError, match="init='megatron_head' draws the output layer"):
        make_config(init="megatron_head", tie_word_embeddings=True)


def test_a_config_edited_by_hand_is_checked_by_the_model(make_config: ConfigMaker) -> None:
    config = make_config()
    config.norm = "mixln"
    with pytest.raises(ValueError, match="did you mean mix_ln"):
        LlmNormForCausalLM(config)
    config = make_config(norm=["pre_ln"] * 3)
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="norm lists 3 layers"):
        LlmNormForCausalLM(config)


CHANGED: dict[str, Any] = {
    "norm": "mix_ln",
    "norm_options": {"post_fraction": 0.7, "norm_type": "layernorm"},
    "init": "scaled",
    "residual_dtype": "bf16",
    "true_vocab_size": 60,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "head_dim": 12,
    "eos_token_id": [2, 3],
    "dtype": "bfloat16",
}


def test_round_trips(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(**CHANGED)
    for copy in (LlmNormConfig(**config.to_dict()), LlmNormConfig.from_dict(config.to_dict())):
        assert copy.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    for load in (LlmNormConfig.from_pretrained, AutoConfig.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is LlmNormConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.dtype == torch.bfloat16
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["norm_options"] == {"norm_type": "layernorm", "num_post_layers": 2}


def test_loading_with_changes(make_config: ConfigMaker, tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    loaded, unused = LlmNormConfig.from_pretrained(
        tmp_path,
        attn_implementation="eager",
        dtype="float32",
        use_cache=False,
        foo=1,
        return_unused_kwargs=True,
    )
    assert (loaded._attn_implementation, loaded.use_cache, unused) == ("eager", False, {"foo": 1})


def test_llama_config_is_accepted_without_its_type(make_config: ConfigMaker) -> None:
    llama = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=500.0).to_dict()
    del llama["model_type"]
    config = LlmNormConfig(**llama)
    assert (config.hidden_size, config.rope_parameters["rope_theta"], config.is_llama) == (64, 500.0, True)


def test_is_llama(make_config: ConfigMaker) -> None:
    assert make_config(norm="pre_rmsnorm").is_llama
    assert make_config(norm=["pre_rmsnorm"] * 3).is_llama
    assert make_config(norm="mix_ln", norm_options={"num_post_layers": 0}).is_llama
    for norm in ("pre_ln", "post_rmsnorm", "layernorm_scaling"):
        assert not make_config(norm=norm).is_llama


def test_o16_every_name_means_one_plan_and_other_spellings_raise(make_config: ConfigMaker) -> None:
    """No name falls through to another's block: equal plans are the known aliases alone."""
    plans: dict[Any, list[str]] = {}
    for norm in PRESETS:
        config = make_config(norm=norm, num_hidden_layers=4)
        plan = residual_plan(config.norm, config.norm_options, 4)
        plans.setdefault(plan, []).append(norm)
        assert type(LlmNormForCausalLM(config).model.layers[3]).__name__ == "LlmNormBlock"
        for spelling in (norm.upper(), norm.title(), f" {norm}"):
            with pytest.raises(ValueError, match=f"is not a norm; did you mean {norm}"):
                make_config(norm=spelling)
    assert [names for names in plans.values() if len(names) > 1] == [["sandwich", "peri_ln"]]


def test_o18_gains_move_in_bf16_compute_and_are_frozen_in_bf16_weights(make_config: ConfigMaker) -> None:
    """100 steps of Adam at 5e-4: its steps stay below 3.2 * 5e-4, less than half of bf16's spacing at 1."""
    moved = {}
    for weights in (torch.float32, torch.bfloat16):
        model = LlmNormForCausalLM(make_config(num_hidden_layers=1))
        initialize_weights(model, seed=0)
        model.to(weights)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(100):
            tokens = torch.randint(0, 61, (2, 8), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
                model(tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        gains = torch.cat([p.detach().float() for name, p in model.named_parameters() if "norm" in name])
        moved[weights] = (gains - 1).abs()
    assert moved[torch.float32].min() > 0
    assert moved[torch.float32].mean() > 2e-3
    assert moved[torch.bfloat16].max() == 0
