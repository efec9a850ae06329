"""Loading a run: defaults, overrides, presets, and the way back to YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmnorm.config import PRESETS, RunConfig, check_batch, load_run_config
from llmnorm.errors import UserError

Write = Callable[..., Path]


def test_the_file_and_the_defaults(minimal: Path) -> None:
    config = load_run_config(minimal)
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.name == "adamw"
    assert config.optimizer.options(seed=7) == {
        "weight_decay": 0.0,
        "lr_multipliers": {},
        "fused_backward": False,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "state_dtype": "param",
        "stochastic_rounding": False,
        "seed": 7,
    }
    assert config.schedule.name == "cosine"
    assert config.train.precision == "bf16"
    assert config.train.grad_clip == 1.0
    assert config.checkpoint.every == 1000
    assert config.parallel.strategy == "auto"
    assert config.paper is None


def test_a_config_needs_no_file() -> None:
    config = load_run_config(
        None,
        {
            "output_dir": "runs/x",
            "model.preset": "9m",
            "data": {"train_files": ["a.txt"], "tokenizer": "t5-base", "sequence_length": 32},
            "optimizer.lr": 0.1,
            "train": {"max_steps": 2, "global_batch_size": 4},
        },
    )
    assert config.model.hidden_size == 256
    assert config.data.train_files == ["a.txt"]


def test_blank_sections_are_defaults(write_config: Write) -> None:
    path = write_config(("optimizer:", "export:\nguards:\nevaluation: null\noptimizer:"))
    assert load_run_config(path).export.at_end is True


def test_the_resolved_config_is_read_back_unchanged(minimal: Path, tmp_path: Path) -> None:
    config = load_run_config(
        minimal,
        {
            "train.sample_prompt": "1e-3",
            "tracking": [{"name": "wandb", "project": "no"}, {"name": "tensorboard"}],
            "guards.spike": {"window": 20},
            "data.validation_files": {"web": "w.txt", "books": ["b.txt", "c.txt"]},
            "paper": {"perplexity": 20.35, "source": "arXiv 2502.05795, Table 1"},
        },
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml(), encoding="utf-8")
    assert load_run_config(saved) == config
    assert load_run_config(None, config.to_dict()) == config


def test_overrides_in_both_spellings_and_the_last_wins(minimal: Path) -> None:
    words = ["--train.max_steps", "20", "--optimizer.lr=2e-4", "--train.max_steps=30", "--seed", "7"]
    config = load_run_config(minimal, words)
    assert (config.train.max_steps, config.optimizer.lr, config.seed) == (30, 2e-4, 7)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--data.train_files", "my/**/*.txt"], "data.train_files", "my/**/*.txt"),
        (["--data.train_files", "*.txt"], "data.train_files", "*.txt"),
        (["--data.train_files", "[ab]*.txt"], "data.train_files", "[ab]*.txt"),
        (["--data.train_files", "[a.txt, b.txt]"], "data.train_files", ["a.txt", "b.txt"]),
        (["--data.validation_files={web: w.txt}"], "data.validation_files", {"web": "w.txt"}),
        (["--data.validation_files", "null"], "data.validation_files", None),
        (["--data.tokenizer", "hub/name"], "data.tokenizer", "hub/name"),
        (["--train.sample_prompt", "ROMEO: what?"], "train.sample_prompt", "ROMEO: what?"),
        (["--train.sample_prompt="], "train.sample_prompt", ""),
        (["--train.sample_prompt", "[x"], "train.sample_prompt", "[x"),
        (["--output_dir", "010"], "output_dir", "010"),
        (["--train.grad_clip", "null"], "train.grad_clip", None),
        (["--train.compile", "true"], "train.compile", True),
        (["--model.norm_options", "{post_fraction: 0.5}"], "model.norm_options", {"post_fraction": 0.5}),
        (["--model.norm_options.post_fraction", "5e-1"], "model.norm_options", {"post_fraction": 0.5}),
        (["--optimizer.betas", "[0.8, 0.95]"], "optimizer.betas", (0.8, 0.95)),
        (["--tracking", "[{name: tensorboard}]"], "tracking.0.name", "tensorboard"),
        (["--guards.spike.window", "9"], "guards.spike.window", 9),
        (["--train", "{max_steps: 4}"], "train.global_batch_size", 8),
    ],
)
def test_override_values(minimal: Path, words: list[str], key: str, value: object) -> None:
    found: object = load_run_config(minimal, words)
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)  # type: ignore[index]
    assert found == value


def test_tokenizer_section_replaces_a_name(write_config: Write) -> None:
    path = write_config(("{train: bpe, vocab_size: 512}", "t5-base"))
    words = ["--data.tokenizer.train", "unigram", "--data.tokenizer.vocab_size", "400"]
    tokenizer = load_run_config(path, words).data.tokenizer
    assert not isinstance(tokenizer, str)
    assert (tokenizer.train, tokenizer.vocab_size) == ("unigram", 400)


def test_another_schedule_drops_the_former_ones_keys(minimal: Path, capsys: pytest.CaptureFixture) -> None:
    config = load_run_config(minimal, ["--schedule.name", "constant"])
    assert config.schedule.model_dump() == {"name": "constant", "warmup_steps": 2}
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        "note: schedule.name=constant drops schedule.min_lr_ratio, which belonged to the former choice"
    ]


def test_another_schedule_keeps_shared_keys_and_takes_its_own(
    minimal: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--schedule.decay_steps", "3", "--schedule.name", "wsd"]
    config = load_run_config(minimal, words)
    assert config.schedule.name == "wsd"
    assert (config.schedule.decay_steps, config.schedule.min_lr_ratio) == (3, 0.2)
    assert capsys.readouterr().err == ""


def test_a_key_given_by_the_user_is_never_dropped(minimal: Path) -> None:
    with pytest.raises(UserError, match=r"schedule.min_lr_ratio .*not a key of schedule.name=constant"):
        load_run_config(minimal, ["--schedule.name", "constant", "--schedule.min_lr_ratio", "0.3"])


def test_another_preset_replaces_the_sizes_of_a_resolved_config(minimal: Path, tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(load_run_config(minimal, {"model.num_hidden_layers": 3}).to_yaml(), encoding="utf-8")
    model = load_run_config(saved, ["--model.preset", "9m"]).model
    assert (model.hidden_size, model.intermediate_size, model.num_key_value_heads) == (256, 688, None)
    assert model.num_hidden_layers == 3  # chosen by the user, not by the former preset


def test_another_norm_drops_the_former_ones_options(
    write_config: Write, capsys: pytest.CaptureFixture
) -> None:
    path = write_config(("norm: mix_ln", "norm: mix_ln, norm_options: {post_fraction: 0.5}"))
    assert load_run_config(path, ["--model.norm", "mix_ln"]).model.norm_options == {"post_fraction": 0.5}
    assert capsys.readouterr().err == ""
    assert load_run_config(path, ["--model.norm", "pre_rmsnorm"]).model.norm_options == {}
    assert "model.norm=pre_rmsnorm drops model.norm_options" in capsys.readouterr().err
    words = ["--model.norm_options.norm_type", "layernorm", "--model.norm", "layernorm_scaling"]
    assert load_run_config(path, words).model.norm_options == {"norm_type": "layernorm"}


def test_only_the_first_process_speaks(
    minimal: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    load_run_config(minimal, ["--schedule.name", "constant"])
    assert capsys.readouterr().err == ""


def test_a_warmup_longer_than_the_run_is_allowed_with_a_warning(
    minimal: Path, capsys: pytest.CaptureFixture
) -> None:
    assert load_run_config(minimal, ["--schedule.warmup_steps", "10"]).schedule.warmup_steps == 10
    assert capsys.readouterr().err == ""
    assert load_run_config(minimal, ["--schedule.warmup_steps", "11"]).schedule.warmup_steps == 11
    warning = capsys.readouterr().err
    assert warning.startswith("warning: schedule.warmup_steps=11 is longer than train.max_steps=10")


@pytest.mark.parametrize(
    ("model", "warmup"),
    [
        ("{preset: 2m, norm: mix_ln}", 1),
        ("{preset: 2m, norm: deepnorm}", 1),
        ("{preset: 2m, norm: gpas, norm_options: {base: post}}", 1),
        ("{preset: 2m, norm: gpas}", 0),
        ("{preset: 2m, norm: ngpt}", 0),
        ("{preset: 2m}", 0),
    ],
)
def test_a_norm_that_needs_a_warmup_gets_one_that_is_printed(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture, model: str, warmup: int
) -> None:
    """A tenth of 10 steps, only where none is given, and a saved config loads without saying it again."""
    path = write_config(("{preset: 2m, norm: mix_ln}", model), ("  warmup_steps: 2\n", ""))
    config = load_run_config(path)
    assert config.schedule.warmup_steps == warmup
    note = capsys.readouterr().err
    assert note.startswith("note: schedule.warmup_steps=1, a tenth of the run") == bool(warmup)
    assert load_run_config(path, {"schedule.warmup_steps": 0}).schedule.warmup_steps == 0
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_run_config(path) == config
    assert capsys.readouterr().err == ""


def test_presets_fill_in_and_given_sizes_win(minimal: Path) -> None:
    model = load_run_config(minimal, {"model.num_hidden_layers": 2, "model.head_dim": 16}).model
    assert (model.hidden_size, model.intermediate_size, model.num_key_value_heads) == (128, 352, 2)
    assert (model.num_hidden_layers, model.head_dim) == (2, 16)


@pytest.mark.parametrize("name", PRESETS)
def test_default_intermediate_sizes_are_tensor_core_tiles(name: str) -> None:
    preset = PRESETS[name]
    rounded, published = preset.intermediate_size, preset.published_intermediate_size
    if name in ("2m", "9m", "20m", "60m"):
        assert rounded == published
        assert rounded % 16 == 0
    else:
        assert rounded == -(-published // 64) * 64
    assert preset.sizes(paper_exact=True)["intermediate_size"] == published


def test_paper_exact_rounds_neither_the_mlp_nor_the_vocabulary(minimal: Path) -> None:
    exact = load_run_config(minimal, {"model.preset": "1b", "model.paper_exact": True}).model
    assert exact.arguments(32_100, 256)["intermediate_size"] == 5461
    assert exact.arguments(32_100, 256)["vocab_size"] == 32_100
    rounded = load_run_config(minimal, {"model.preset": "1b"}).model
    assert rounded.arguments(32_100, 256)["intermediate_size"] == 5504
    assert rounded.arguments(32_100, 256)["vocab_size"] == 32_128
    assert rounded.arguments(32_100, 256)["true_vocab_size"] == 32_100


def test_model_arguments(minimal: Path) -> None:
    model = load_run_config(minimal, {"model.vocab_size": 500, "model.rope_theta": 5e5}).model
    arguments = model.arguments(None, 4096)
    assert (arguments["vocab_size"], arguments["true_vocab_size"]) == (500, None)
    assert arguments["max_position_embeddings"] == 4096
    assert arguments["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert model.arguments(None, 64)["max_position_embeddings"] == 2048
    assert not {"preset", "paper_exact", "init_from", "rope_theta"} & set(arguments)
    with pytest.raises(
        UserError, match=r"model.vocab_size is null and the tokenizer .* give model.vocab_size"
    ):
        load_run_config(minimal).model.arguments(None, 64)


@pytest.mark.parametrize(
    ("total", "micro", "processes", "expected"),
    [(8, None, 1, (8, 1)), (8, None, 4, (2, 1)), (8, 2, 1, (2, 4)), (8, 2, 2, (2, 2)), (8, 8, 1, (8, 1))],
)
def test_batch_plans(
    minimal: Path, total: int, micro: int | None, processes: int, expected: tuple[int, int]
) -> None:
    config = load_run_config(minimal, {"train.global_batch_size": total, "train.micro_batch_size": micro})
    assert check_batch(config, processes) == expected


@pytest.mark.parametrize(
    ("micro", "processes", "words"),
    [
        (None, 3, ["train.global_batch_size=8", "the 3 processes", "set it to 6 or 9"]),
        (8, 2, ["train.micro_batch_size=8 x 2 processes", "divisor of 4"]),
        (
            2,
            3,
            [
                "train.micro_batch_size=2 x 3 processes",
                "train.global_batch_size to 6 or 12",
                "that divides 4",
            ],
        ),
    ],
)
def test_batches_that_do_not_split(
    minimal: Path, micro: int | None, processes: int, words: list[str]
) -> None:
    config = load_run_config(minimal, {"train.micro_batch_size": micro})
    with pytest.raises(UserError) as caught:
        check_batch(config, processes)
    assert all(word in str(caught.value) for word in words)


def test_initial_weights_bring_their_own_sizes(minimal: Path) -> None:
    model = load_run_config(minimal, {"model.preset": None, "model.init_from": "some/folder"}).model
    assert (model.hidden_size, model.num_hidden_layers) == (None, None)
    assert not {"hidden_size", "num_hidden_layers"} & model.model_fields_set


def test_a_loaded_config_cannot_be_changed(minimal: Path) -> None:
    config = load_run_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.train.max_steps = 3
    assert isinstance(config, RunConfig)
