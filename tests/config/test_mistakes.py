"""Every mistake in a run's configuration: the key, the value, the rule, the remedy, in one paragraph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmnorm.config import load_run_config
from llmnorm.config.checks import warnings_for
from llmnorm.errors import UserError

Write = Callable[..., Path]


def message_of(path: Path | None, words: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_run_config(path, words or [])
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message.lower()
    return message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # unknown keys
        (["--train.max_step", "3"],
        "unknown key train.max_step (on the command line): section train has no such "
         "key; did you mean train.max_steps?"),
        (["--train.grad-clip", "3"], "did you mean train.grad_clip?"),
        (["--sequence_length", "3"], "did you mean data.sequence_length?"),
        (["--train.sequence_length", "3"], "did you mean data.sequence_length?"),
        (["--modle.norm", "mix_ln"],
        "unknown key modle (on the command line): a run's configuration has no such "
         "key; did you mean model?"),
        (["--guards.spike.windw", "3"], "did you mean guards.spike.window?"),
        (["--model.norm_option", "{}"], "did you mean model.norm_options?"),
        (["--optimizer.name", "spam", "--optimizer.treshold", "4"],
         "did you mean optimizer.threshold?; optimizer.name=spam takes "),
        (["--optimizer.name", "spam", "--optimizer.rank", "4"], "optimizer.name: apollo_mini; optimizer.name="
         "spam takes "),
        (["--optimizer.name", "galore", "--optimizer.zzzz", "4"],
         "section optimizer has no such key; optimizer.name=galore takes lr, "),
        (["--schedule.decay_steps", "4"], "schedule.decay_steps (on the command line) is not a key of "
         "schedule.name=cosine; it belongs to wsd: remove it, or set schedule.name: wsd"),
        (["--export.zzzz", "4"], "the keys of section export are at_end, push_to_hub, private"),
        # unknown choices
        (["--model.norm", "mixln"], "model.norm=mixln (on the command line) is not one of pre_ln, "),
        (["--model.norm", "mixln"], "did you mean mix_ln?"),
        (["--model.norm", "[pre_ln, mixln]"], "model.norm[1]=mixln"),
        (["--model.preset", "130M"], "did you mean 130m?"),
        (["--model.init", "scaledembed"], "did you mean scaled_embed?"),
        (["--schedule.name", "cosin"], "schedule.name=cosin (on the command line) is not one of "
         "cosine, linear, wsd, constant, inverse_sqrt, refined; did you mean cosine?"),
        (["--optimizer.name", "adam"], "did you mean adamw?"),
        (["--train.precision", "bf61"], "did you mean bf16?"),
        (["--tracking", "[{name: wanbd}]"], "tracking[0].name=wanbd (on the command line) is not one of "
         "tensorboard, wandb, trackio; did you mean wandb?"),
        (["--tracking", "[{nam: wandb}]"], "tracking[0].name is required"),
        (["--data.tokenizer", "{train: bpf, vocab_size: 300}"], "data.tokenizer.train=bpf (on the command "
         "line) is not one of bpe, unigram; did you mean bpe?"),
        # wrong types and values out of range
        (["--train.max_steps", "1.5"], "train.max_steps=1.5 (on the command line) must be an integer >= 1 "
         "(optimizer updates); change it"),
        (["--train.max_steps", "0"], "train.max_steps=0 (on the command line) must be an integer >= 1"),
        (["--train.max_steps", "'5'"], "it is text: remove the quotes"),
        (["--train.max_steps", "null"], "train.max_steps=null"),
        (["--train.compile", "yes"], "must be true or false"),
        (["--train.compile", "1"], "must be true or false"),
        (["--optimizer.lr", "0"], "optimizer.lr=0 (on the command line) must be a number > 0"),
        (["--optimizer.lr", "-1e-3"], "optimizer.lr=-0.001"),
        (["--optimizer.lr", ".nan"], "optimizer.lr=.nan"),
        (["--optimizer.lr", "high"], "optimizer.lr=high"),
        (["--optimizer.betas", "[0.9]"], "optimizer.betas=[0.9] (on the command line) must be a "
         "list of 2 numbers"),
        (["--optimizer.betas", "[0.9, 1.0]"], "each number >= 0 and < 1"),
        # what the chosen method says of a key that others have too
        (["--optimizer.name", "galore", "--optimizer.scale", "-1"], "must be a number > 0 (factor of the "
         "update)"),
        (["--optimizer.name", "dct_adamw", "--optimizer.moments", "reset"], "is not one of keep, transport; "
         "choose one of them"),
        (["--optimizer.name", "apollo", "--optimizer.scale", "-1"], "must be a number > 0 (enters under a "
         "root"),
        (["--data.sequence_length", "1"], "data.sequence_length=1 (on the command line) must be an "
         "integer >= 2"),
        (["--schedule.warmup_steps", "-1"], "schedule.warmup_steps=-1 (on the command line) must be an "
         "integer >= 0"),
        (["--schedule.min_lr_ratio", "2"], "must be a number >= 0 and <= 1"),
        (["--data.train_files", ""], "must be text or list of text and not empty"),
        (["--data.train_files", "[]"], "must be text or list of text and not empty"),
        (["--data.validation_files", "{a: 3}"], "data.validation_files.a=3"),
        (["--train", "3"], "train=3 (on the command line) must be a mapping"),
        (["--seed", "-1"], "seed=-1 (on the command line) must be an integer >= 0"),
        (["--paper.perplexity", "20"], "paper.source is required (Paper and table)"),
        # malformed overrides
        (["train.max_steps", "3"], "'train.max_steps' is not an override; write --section.key VALUE"),
        (["--train.max_steps"], "--train.max_steps has no value; write --train.max_steps VALUE "
         "(integer >= 1)"),
        (["--train.compile", "--seed", "1"], "--train.compile has no value"),
        (["--train.maxsteps"], "did you mean train.max_steps?"),
        (["--tracking.0.name", "wandb"], "tracking is a list; give it whole"),
        (["--train.max_steps", "[1"], "--train.max_steps, line 1, column 3: not valid YAML"),
        # keys that disagree
        (["--model.num_attention_heads", "3"], "model.num_attention_heads=3 does not divide "
         "model.hidden_size=128; use one of 1, 2, 4, 8, 16, 32, 64, 128 heads"),
        (["--model.num_key_value_heads", "3"], "model.num_key_value_heads=3 does not divide "
         "model.num_attention_heads=4; use one of 1, 2, 4"),
        (["--model.head_dim", "7"], "a head of width 7 is odd"),
        (["--model.preset", "null"], "model.hidden_size, model.intermediate_size, model.num_hidden_layers, "
         "model.num_attention_heads are required when model.preset is null"),
        (["--model.norm", "[pre_ln, post_ln]"], "model.norm lists 2 norms for model.num_hidden_layers=6"),
        (["--model.rope_theta", "5e5", "--model.rope_parameters", "{rope_theta: 1e4}"], "disagree"),
        (["--model.max_position_embeddings", "32"], "data.sequence_length=64 exceeds "
         "model.max_position_embeddings=32"),
        (["--train.micro_batch_size", "3"], "train.global_batch_size=8 is not a multiple of "
         "train.micro_batch_size=3; set train.global_batch_size to 6 or 9"),
        (["--data.validation_files", "v.txt", "--data.validation_fraction", "0.1"], "remove one of them"),
        (["--evaluation.every", "5"], "evaluation.every=5 has nothing to evaluate; give "
         "data.validation_files"),
        (["--evaluation.stride", "65"], "evaluation.stride=65 exceeds the evaluation context of 64 tokens"),
        (["--data.recipe", "galore", "--data.document_masking", "true"], "does nothing with "
         "data.recipe=galore"),
        (["--data.streaming", "true"], "data.streaming=true reads Hub datasets only"),
        (["--data.streaming", "true", "--data.train_files", "hf:a/b"], "cannot train a tokenizer"),
        (["--data.streaming", "true", "--data.train_files", "hf:a/b", "--data.tokenizer", "t5-base",
          "--data.validation_fraction", "0.1"], "needs a prepared dataset"),
        (["--schedule.name", "wsd", "--schedule.decay_steps", "11"], "schedule.decay_steps=11 exceeds "
         "train.max_steps=10"),
        (["--schedule.name", "wsd", "--schedule.decay_steps", "5", "--schedule.decay_fraction", "0.5"],
         "both give the length of the decay"),
        (["--checkpoint.keep_every", "1500"], "checkpoint.keep_every=1500 is not a multiple of "
         "checkpoint.every=1000, so there would be no checkpoint to keep; set it to 1000 or 2000"),
        (["--parallel.strategy", "ddp", "--parallel.cpu_offload", "true"], "parallel.cpu_offload=true does "
         "nothing with parallel.strategy=ddp"),
        (["--parallel.strategy", "none", "--parallel.reshard_after_forward", "false"], "does nothing with "
         "parallel.strategy=none"),
        (["--export.push_to_hub", "me/x", "--export.at_end", "false"], "uploads nothing with "
         "export.at_end=false"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(minimal: Path, words: list[str], expected: str) -> None:
    assert expected in message_of(minimal, words)


def test_mistakes_in_the_file_name_its_line(write_config: Write) -> None:
    path = write_config(("  max_steps: 10", "  max_steps: ten"))
    assert message_of(path).startswith(f"train.max_steps=ten ({path}, line 13) must be an integer >= 1")
    path = write_config(("  max_steps: 10", "  max_stepz: 10"))
    message = message_of(path)
    assert message.startswith(f"unknown key train.max_stepz ({path}, line 13): section train has no such key")
    assert message.endswith("(1 more to mend: train.max_steps)")


def test_the_line_of_an_overridden_key_is_not_blamed(minimal: Path) -> None:
    message = message_of(minimal, ["--data.tokenizer", "{train: bpf, vocab_size: 300}"])
    assert "on the command line" in message
    assert "line 5" not in message


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("output_dir: runs/x\n", "output_dir"),
        ("  train_files: a.txt\n", "data.train_files"),
        ("  sequence_length: 64\n", "data.sequence_length"),
        ("optimizer: {lr: 1e-3}\n", "optimizer.lr"),
        ("  max_steps: 10\n", "train.max_steps"),
        ("  global_batch_size: 8\n", "train.global_batch_size"),
    ],
)
def test_missing_keys_are_named_with_their_meaning_and_remedy(
    write_config: Write, line: str, key: str
) -> None:
    path = write_config((line, ""))
    message = message_of(path)
    assert message.startswith(f"{key} is required (")
    assert f"add it to {path} or pass --{key} VALUE" in message


def test_nothing_given_names_everything_that_is_required() -> None:
    message = message_of(None)
    assert message.startswith("output_dir is required")
    assert "optimizer.lr" in message
    assert "train.max_steps" in message


def test_missing_files_suggest_the_nearest(minimal: Path) -> None:
    message = message_of(minimal.with_name("rum.yaml"))
    assert (
        message == f"--config {minimal.with_name('rum.yaml')}: there is no such file; did you mean {minimal}?"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"- a\n- b\n", "holds a list, not a mapping of keys"),
        (b"just words\n", "holds a str, not a mapping of keys"),
        (b"a: [1\n", "not valid YAML"),
        (b"seed: 1\nseed: 2\n", "line 2, column 1: not valid YAML: key 'seed' is given twice"),
        (b"", "output_dir is required"),
    ],
)
def test_files_that_are_no_run(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert expected in message_of(path)


def test_a_folder_is_no_run(tmp_path: Path) -> None:
    assert "is a folder" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["[{name: gor, strength: 0.1, power: 2}]"], "power does nothing with name=gor; remove it"),
        (["[{name: srip, strength: 0.1}, {name: srip, strength: 0.2}]"], "names srip twice"),
        (["[{name: srip}]"], "train.weight_penalties[0].strength is required"),
        (["[{name: srip, strength: 0}]"], "train.weight_penalties[0].strength=0"),
        (["[{name: spectral, strength: 1, power: 1}]"], "train.weight_penalties[0].power=1"),
        (["[{name: srp, strength: 1}]"], "did you mean srip?"),
        (
            ["[{name: srip, strength: 1}]", "--optimizer.fused_backward", "true"],
            "optimizer.fused_backward=true, which moves a matrix",
        ),
        (["[{name: srip, strength: 1}]", "--model.norm", "ngpt"], "model.norm=ngpt, which puts every matrix"),
        (
            ["[{name: srip, strength: 1}]", "--model.weight_constraint", "{name: stiefel}"],
            "model.weight_constraint.name=stiefel, which sets every singular value",
        ),
        (
            ["[{name: srip, strength: 1}]", "--model.weight_parametrization", "{name: weight_norm}"],
            "model.weight_parametrization, as it sees the stored matrices",
        ),
        (["[{name: srip, strength: 1, foo: 1}]"], "are name, strength, groups, threshold, sharpness, power"),
    ],
)
def test_penalties_that_would_do_nothing(minimal: Path, words: list[str], expected: str) -> None:
    assert expected in message_of(minimal, ["--train.weight_penalties", *words])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{name: nope}"], "is not one of spectral_norm, sigma_reparam, weight_norm"),
        (["{name: weigth_norm}"], "did you mean weight_norm?"),
        (["{name: spectral_norm, scael: 2.0}"], "did you mean model.weight_parametrization.scale?"),
        (["[{name: spectral_norm, foo: 1}]"], "are name, modules, method, iterations, scale"),
        (["{name: spectral_norm, scale: 0.0}"], "must be a number > 0 or null"),
        (
            ["{name: spectral_norm}", "--optimizer.name", "muon", "--optimizer.qk_clip", "100.0"],
            "it scales stored rows, which logits then do not follow",
        ),
        (
            ["{name: spectral_norm}", "--optimizer.name", "galore", "--optimizer.weights", "int8"],
            "optimizer.weights=int8 does not work with model.weight_parametrization",
        ),
    ],
)
def test_weight_parametrizations_that_cannot_be(minimal: Path, words: list[str], expected: str) -> None:
    assert expected in message_of(minimal, ["--model.weight_parametrization", *words])


def test_qk_clip_goes_with_a_parametrization_of_other_projections(minimal: Path) -> None:
    words = ["--model.weight_parametrization", "{name: spectral_norm, modules: [v_proj, o_proj]}"]
    config = load_run_config(minimal, [*words, "--optimizer.name", "muon", "--optimizer.qk_clip", "100.0"])
    assert any("orthogonalizes" in warning for warning in warnings_for(config))
