"""The commands as a person types them: exit codes, one-paragraph errors, and what each one prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmnorm import cli
from llmnorm.config import load_run_config, yaml_dialect
from llmnorm.config.help import json_schema_text

ROOT = Path(__file__).parents[1]
QUICKSTART = "configs/quickstart.yaml"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--config is required"),
        (["--config", "configs/quikstart.yaml"], "did you mean configs/quickstart.yaml?"),
        (["--config", QUICKSTART, "--train.max_step", "3"], "did you mean train.max_steps?"),
        (["--config", QUICKSTART, "--train.max_steps", "three"], "train.max_steps=three"),
        (["--config", QUICKSTART, "--model.num_attention_heads", "3"], "does not divide model.hidden_size"),
        (["--config", QUICKSTART, "--model.norm_options.post_fraction", "1.5"], "must be a number in [0, 1]"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(words: list[str], expected: str, tmp_path: Path) -> None:
    output = ["--output_dir", str(tmp_path / "run")] if "--config" in words else []
    result = run("train.py", *words, *output)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_of_a_node_reports_a_mistake() -> None:
    result = run("train.py", LOCAL_RANK="1")
    assert (result.returncode, result.stderr) == (2, "")


def test_help_lists_flags_and_keys_without_loading_torch() -> None:
    script = "import runpy, sys; sys.argv = ['train.py', '--help']; runpy.run_path('train.py', run_name="
    result = run("-c", script + "'__main__'); assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr
    for expected in ("--dry-run", "--print-config", "--train.max_steps\n", "--model.norm\n", "required"):
        assert expected in result.stdout


def test_print_config_is_yaml_that_gives_the_same_run(tmp_path: Path) -> None:
    words = [
        "--config",
        QUICKSTART,
        "--optimizer.lr=1e-4",
        "--train.max_steps",
        "7",
        "--schedule.warmup_steps",
        "1",
    ]
    result = run("train.py", *words, "--print-config")
    assert result.returncode == 0, result.stderr
    saved = tmp_path / "config.yaml"
    saved.write_text(result.stdout, encoding="utf-8")
    expected = load_run_config(ROOT / QUICKSTART, words[2:])
    assert load_run_config(saved) == expected
    assert (expected.optimizer.lr, expected.train.max_steps) == (1e-4, 7)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    words = [
        "--config",
        QUICKSTART,
        "--output_dir",
        str(tmp_path / "run"),
        "--data.train_files",
        "absent.txt",
    ]
    result = run("train.py", *words, "--dry-run")
    assert result.returncode == 0, result.stderr
    for expected in ("# resolved config", "parameters: ", "memory per process", "FLOPs per token", "steps: "):
        assert expected in result.stdout
    assert list(tmp_path.iterdir()) == []


def call(*words: str) -> int:
    """Exit code of `llmnorm` in this process."""
    try:
        cli.main(list(words))
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.parametrize("command", ["prepare", "plan", "export", "certify", "sample", "report", "schema"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture) -> None:
    assert call(command, "--help") == 0
    assert f"usage: llmnorm {command}" in capsys.readouterr().out
    assert cli.COMMANDS[command].run.__doc__


def test_plan_takes_overrides_and_a_number_of_processes(capsys: pytest.CaptureFixture) -> None:
    words = ["--processes", "4", "--train.global_batch_size", "16", "--parallel.strategy", "fsdp2"]
    assert call("plan", "--config", str(ROOT / QUICKSTART), *words) == 0
    text = capsys.readouterr().out
    assert "memory per process (fsdp2, 4 processes, fp32, 4 x 128 tokens at a time)" in text
    assert "sequences per step: 16 = 4 x 1 x 4" in text


def test_schema_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("schema") == 0
    assert capsys.readouterr().out == json_schema_text()
    assert call("schema", "--output", str(tmp_path / "s.json")) == 0
    assert json.loads((tmp_path / "s.json").read_text())["title"] == "llmnorm run"
    assert call("schema", "--output", str(tmp_path / "absent" / "s.json")) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_prepare_tokenizes_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 200, encoding="utf-8")
    words = ["--data.train_files", str(text), "--data.validation_files", str(text)]
    words += ["--data.prepared_dir", str(tmp_path / "prepared"), "--data.prepare_workers", "1"]
    words += ["--data.tokenizer.vocab_size", "280"]
    assert call("prepare", "--config", str(ROOT / QUICKSTART), *words) == 0
    first = capsys.readouterr().out
    assert "tokenizer: 280 ids" in first
    assert "training: " in first
    assert "validation: " in first
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "prepared").rglob("shard*")}
    assert written
    assert call("prepare", "--config", str(ROOT / QUICKSTART), *words) == 0
    assert capsys.readouterr().out == first
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_prepare_has_nothing_to_do_for_a_stream(capsys: pytest.CaptureFixture) -> None:
    assert call("prepare", "--config", str(ROOT / "configs/mixln_1b.yaml")) == 2
    assert "data.streaming=true reads text as it trains" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "--config", "absent.yaml"], "there is no such file"),
        (["plan", "--config", QUICKSTART, "--train.max_step", "1"], "did you mean train.max_steps?"),
        (["schema", "--indent", "2"], "llmnorm schema does not know --indent 2"),
        (["sample", "--model", "absent"], "there is no such folder"),
        (["report", "absent"], "absent"),
        (["export", "absent"], "absent"),
        (["export", "absent", "--public"], "--public does nothing without --push-to-hub"),
        (["export", "absent", "--push-to-hub", "not a repo"], "is not a Hub repository"),
    ],
)
def test_mistakes_in_commands(
    words: list[str], expected: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["sample", "--model", "x", "--temperature", "-1"], ["plan", "--config", "x", "--processes", "0"]],
)
def test_arguments_out_of_range(words: list[str]) -> None:
    assert call(*words) == 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model with a tokenizer, exported."""
    from llmnorm.data import load_or_train_tokenizer
    from llmnorm.export import export_checkpoint
    from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM

    folder = tmp_path_factory.mktemp("exported")
    text = folder / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 50, encoding="utf-8")
    tokenizer = load_or_train_tokenizer({"train": "bpe", "vocab_size": 280}, str(text), folder / "cache")
    torch.manual_seed(0)
    config = LlmNormConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=320,
        true_vocab_size=len(tokenizer),
        norm="mix_ln",
        norm_options={"num_post_layers": 1},
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return export_checkpoint(LlmNormForCausalLM(config), folder / "export", tokenizer=tokenizer)


def test_sample_continues_the_prompt_and_depends_on_the_seed_only(
    exported: Path, capsys: pytest.CaptureFixture
) -> None:
    def sample(*words: str) -> str:
        model = ["--model", str(exported.parent), "--prompt", "To be", "--max-new-tokens", "20"]
        assert call("sample", *model, *words) == 0
        return capsys.readouterr().out

    first = sample("--seed", "1")
    assert first.startswith("To be")
    assert sample("--seed", "1") == first
    assert sample("--seed", "2") != first
    assert sample("--temperature", "0") == sample("--temperature", "0", "--seed", "5")


def test_sample_without_a_prompt_starts_a_document(exported: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("sample", "--model", str(exported), "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out.strip()


def test_an_export_is_copied_but_not_exported_onto_itself(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert call("export", str(exported)) == 2
    assert "is an export already" in capsys.readouterr().err
    assert call("export", str(exported), str(tmp_path / "copy")) == 0
    assert "wrote" in capsys.readouterr().out
    config = json.loads((tmp_path / "copy" / "config.json").read_text(encoding="utf-8"))
    assert config["norm_options"]["num_post_layers"] == 1


def test_a_failed_upload_is_an_error_that_says_how_to_repeat_it(
    exported: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmnorm.export import PushStatus

    calls = []

    def push(folder: Path, repo: str, private: bool) -> PushStatus:
        calls.append((folder, repo, private))
        return PushStatus(repo == "me/good", f"about {repo}")

    monkeypatch.setattr("llmnorm.export.push_to_hub", push)
    assert call("export", str(exported), "--push-to-hub", "me/bad") == 2
    assert "error: about me/bad" in capsys.readouterr().err
    assert call("export", str(exported), "--push-to-hub", "me/good", "--public") == 0
    assert calls == [(exported, "me/bad", True), (exported, "me/good", False)]


def test_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"step": i, "tokens": i, "loss": 5.0 - i, "lr": 1.0, "grad_norm": 1.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(yaml_dialect.write({"seed": 0}))
    assert call("report", str(tmp_path)) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()
