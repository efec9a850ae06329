"""model.init_from: a stock model, an export, a run: the same logits, or an error that names the keys."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import distributed
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from llmnorm.errors import UserError
from llmnorm.export import export_checkpoint, hub, initial_weights, load_model
from llmnorm.modeling import LlmNormForCausalLM, initialize_weights

# The fork server imports these once; both processes are forked from it.
multiprocessing.set_forkserver_preload(["llmnorm.export", "torch.distributed.fsdp"])

IDS = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def train_on_meta(config: Any) -> LlmNormForCausalLM:
    """A model as the loop builds it: shapes first, values from a seed, to be overwritten."""
    with torch.device("meta"):
        model = LlmNormForCausalLM(config)
    model.to_empty(device="cpu")
    initialize_weights(model, 5)
    return model


def continued(folder: Path) -> LlmNormForCausalLM:
    weights = initial_weights(str(folder))
    model = train_on_meta(weights.config)
    weights.copy_into(model)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_a_stock_llama_goes_on_as_ours(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    keys = {"rms_norm_eps": 1e-5, "attention_bias": True, "head_dim": 16, "rope_parameters": rope}
    stock = LlamaForCausalLM(LlamaConfig(**SIZES, **keys, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(4)
    stock.save_pretrained(tmp_path / "llama", max_shard_size="50KB")
    weights = initial_weights(str(tmp_path / "llama"))
    assert weights.config.norm == "pre_rmsnorm" and weights.config.rope_parameters["factor"] == 8.0
    model = continued(tmp_path / "llama")
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    stock = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))
    stock.save_pretrained(tmp_path / "mistral")
    torch.testing.assert_close(logits(continued(tmp_path / "mistral")), logits(stock), rtol=1e-5, atol=1e-5)
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UserError, match="has a sliding window of 8, which a model of ours cannot"):
        initial_weights(str(tmp_path / "narrow"))


@pytest.mark.parametrize("norm", ["mix_ln", "layernorm_scaling", "pre_ln"])
def test_ours_goes_on_as_ours(norm: str, make_model: Callable, make_run: Callable, tmp_path: Path) -> None:
    model = make_model(norm)
    run = make_run(model)
    export_checkpoint(model, tmp_path / "export")
    for source in (tmp_path / "export", run, run / "checkpoints" / "step_7"):
        taken = continued(source)
        assert taken.config.norm_options == model.config.norm_options
        torch.testing.assert_close(logits(taken), logits(model), rtol=0, atol=0)
        torch.testing.assert_close(logits(load_model(source)), logits(model), rtol=0, atol=0)


def test_a_folded_model_comes_back(make_model: Callable, tmp_path: Path) -> None:
    model = make_model("pre_ln")
    export_checkpoint(model, tmp_path / "stablelm", format="stock")
    weights = initial_weights(str(tmp_path / "stablelm"))
    assert weights.config.norm == "pre_ln"
    torch.testing.assert_close(logits(continued(tmp_path / "stablelm")), logits(model), rtol=1e-5, atol=1e-5)


def test_bf16_weights_become_the_models_own_dtype(make_model: Callable, tmp_path: Path) -> None:
    model = make_model("mix_ln")
    export_checkpoint(model, tmp_path / "export", dtype=torch.bfloat16)
    taken = continued(tmp_path / "export")
    assert {parameter.dtype for parameter in taken.parameters()} == {torch.float32}
    torch.testing.assert_close(taken.lm_head.weight, model.lm_head.weight.bfloat16().float(), rtol=0, atol=0)
    assert load_model(tmp_path / "export").dtype == torch.bfloat16


def test_keys_that_only_say_how_to_go_on_replace_the_checkpoints(
    make_run: Callable, make_model: Callable
) -> None:
    run = make_run(make_model("mix_ln"))
    given = {"preset": None, "max_position_embeddings": 128, "attn_implementation": "eager", "init": "scaled"}
    given |= {"norm": "mix_ln", "hidden_size": 32, "bos_token_id": None, "eos_token_id": 7}
    config = initial_weights(str(run), given).config
    assert (config.bos_token_id, config.eos_token_id) == (None, 7)
    assert (config.max_position_embeddings, config._attn_implementation) == (128, "eager")
    assert config.norm_options["num_post_layers"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 64}, "model.hidden_size=64 contradicts the hidden_size=32"),
        (
            {"norm": "pre_rmsnorm"},
            "model section does not fit the checkpoint|model.norm=pre_rmsnorm contradicts",
        ),
        ({"norm": "mix_ln", "norm_options": {"num_post_layers": 2}}, "model.norm_options="),
        ({"rope_theta": 5e5}, "model.rope_parameters="),
        ({"num_attention_heads": 5}, "model section does not fit the checkpoint: num_attention_heads=5"),
    ],
)
def test_keys_that_contradict_the_checkpoint_are_named(
    make_run: Callable, make_model: Callable, given: dict, message: str
) -> None:
    run = make_run(make_model("mix_ln"))
    with pytest.raises(UserError, match=message):
        initial_weights(str(run), given)


def test_weights_that_do_not_fit_are_named_and_nothing_is_changed(
    make_model: Callable, tmp_path: Path
) -> None:
    export_checkpoint(make_model("pre_rmsnorm"), tmp_path / "export")
    for other, message in (
        (make_model("post_rmsnorm"), "it lacks model.layers.0.attention_residual_norm.weight"),
        (make_model("pre_rmsnorm", num_hidden_layers=3), "it has model.layers.3"),
        (
            make_model("pre_rmsnorm", intermediate_size=48),
            r"gate_proj.weight has shape \[64, 32\] there and \[48, 32\]",
        ),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(UserError, match=message):
            initial_weights(str(tmp_path / "export")).copy_into(other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_what_cannot_be_read_is_named(tmp_path: Path, make_run: Callable, make_model: Callable) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        initial_weights(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither config\.json"):
        initial_weights(str(tmp_path / "empty"))
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(UserError, match="is a 'gpt2' model; weights can be taken over from llama, mistral"):
        initial_weights(str(tmp_path / "gpt2"))
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="are pickles, which are never opened"):
        initial_weights(str(tmp_path / "pickled"))
    run = make_run(make_model("pre_ln"), "early")
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.rename(checkpoint.with_name(checkpoint.name + ".tmp-0"))
    with pytest.raises(UserError, match="without a finished checkpoint"):
        initial_weights(str(run))


def test_the_hub_is_a_download(make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_checkpoint(make_model("mix_ln"), tmp_path / "export")
    asked = {}

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "export")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert initial_weights("hub:someone/model@step-100").config.norm == "mix_ln"
    assert (asked["repo_id"], asked["revision"]) == ("someone/model", "step-100")
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["patterns"])
    assert asked["patterns"] == hub.DOWNLOADED


def test_another_tokenizer_is_warned_about(
    make_run: Callable,
    make_model: Callable,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = export_checkpoint(make_run(make_model("pre_ln")), tmp_path / "export")
    weights = initial_weights(str(folder))
    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    with caplog.at_level(logging.WARNING):
        weights.check_tokenizer(tokenizer)
    assert not caplog.records
    vocabulary = serialized["model"]["vocab"]
    a, b = sorted(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "other.json").write_text(json.dumps(serialized))
    other = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "other.json"))
    with caplog.at_level(logging.WARNING):
        weights.check_tokenizer(other)
    assert "trained with another tokenizer" in caplog.text


def _into_shards(rank: int, meeting: str, sources: list[str], expected: torch.Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for source in sources:
            weights = initial_weights(source)
            with torch.device("meta"):
                model = LlmNormForCausalLM(weights.config)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            model.to_empty(device="cpu")
            initialize_weights(model, 9)
            weights.copy_into(model)
            torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    finally:
        distributed.destroy_process_group()


@pytest.mark.distributed
def test_each_process_fills_its_own_shard(make_model: Callable, make_run: Callable, tmp_path: Path) -> None:
    model = make_model(
        "mix_ln", hidden_size=36, head_dim=8, intermediate_size=50
    )  # rows that 2 does not divide evenly
    run = make_run(model)
    sources = [str(export_checkpoint(model, tmp_path / "export")), str(run)]
    torch.multiprocessing.start_processes(
        _into_shards,
        (str(tmp_path / "meeting"), sources, logits(model)),
        nprocs=2,
        start_method="forkserver",
    )
