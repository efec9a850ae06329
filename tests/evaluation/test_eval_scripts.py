"""The commands in eval/, as a user runs them."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmnorm.evaluation import perplexity
from llmnorm.evaluation.legacy import galore_legacy

ROOT = Path(__file__).resolve().parents[2]
TEXT = "Où est le café? It is\nround the corner.\n" * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Llama with a byte tokenizer, as someone else would have saved it."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {letter: 3 + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    lines = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())
    (folder / "lines.jsonl").write_text(lines)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / "eval" / script), run_name="__main__")


def byte_ids() -> list[int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(TEXT)
    return [3 + alphabet.index(letter) for piece, _ in pieces for letter in piece]


def test_perplexity_of_a_stock_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.json"
    run(
        monkeypatch, "perplexity.py", "--model", folder, "--data", folder / "text.txt",
        "--context-length", 32, "--stride", 8, "--batch-size", 5, "--json", out,
    )  # fmt: skip
    written = json.loads(out.read_text())
    ids = byte_ids()
    expected = perplexity(LlamaForCausalLM.from_pretrained(folder), ids, 32, 8)
    assert len(ids) == len(TEXT.encode())
    assert written["nll_sum"] == pytest.approx(expected.nll_sum, rel=1e-6)
    assert written["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert written["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (written["tokens"], written["context_length"], written["stride"]) == (len(ids) - 1, 32, 8)
    assert (written["bytes"], written["words"]) == (len(ids), len(TEXT.split()))
    bits = expected.nll_sum / (math.log(2) * len(ids))
    assert written["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    shown = capsys.readouterr().out
    for fact in (
        f"{expected.perplexity:.4f}",
        f"{len(ids) - 1:,} scored",
        "context 32, stride 8",
        "tokenizer",
    ):
        assert fact in shown


def test_several_sets_and_the_legacy_count(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.json"
    sets = ["--data", f"whole={folder / 'text.txt'}", "--data", folder / "lines.jsonl"]
    run(monkeypatch, "perplexity.py", "--model", folder, *sets, "--json", out)
    written = json.loads(out.read_text())
    whole, lines = written["sets"]["whole"], written["sets"]["lines.jsonl"]
    assert lines["bytes"] == whole["bytes"] - 24, "the lines without their ends"
    assert written["tokens"] == whole["tokens"] + lines["tokens"]
    assert written["loss"] == pytest.approx((whole["nll_sum"] + lines["nll_sum"]) / written["tokens"])

    legacy = ["--convention", "galore_legacy", "--batch-size", 4, "--context-length", 16, "--processes", 2]
    data = ["--data", folder / "lines.jsonl"]
    run(monkeypatch, "perplexity.py", "--model", folder, *data, *legacy, "--json", out)
    written = json.loads(out.read_text())
    model, tokenizer = (
        LlamaForCausalLM.from_pretrained(folder),
        PreTrainedTokenizerFast.from_pretrained(folder),
    )
    rows = [tokenizer(line)["input_ids"] for line in TEXT.splitlines()]
    expected = galore_legacy(model, rows, pad_token_id=0, batch_size=4, context_length=16, processes=2)
    assert written["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert written["convention"] == "galore_legacy" and "exact loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "absent", "--data", "text.txt"], "--model absent: there is no such folder"),
        (["--model", ".", "--data", "absent.txt"], "match nothing"),
        (["--model", "run", "--data", "text.txt"], "is a run directory; give its exported model, run/export"),
        (["--model", "early", "--data", "text.txt"], "holds training checkpoints; export it first"),
        (["--model", "untrained", "--data", "text.txt"], "cannot be loaded as a causal language model"),
        (
            ["--model", "partial", "--data", "text.txt"],
            "lacks weights of LlamaForCausalLM: model.norm.weight",
        ),
        (["--model", ".", "--data", "a=text.txt", "--data", "a=lines.jsonl"], "have the same name"),
        (["--model", ".", "--data", "text.txt", "--stride", "300"], "stride=300 must be between 1 and"),
        (
            ["--model", ".", "--data", "text.txt", "--stride", "9", "--convention", "galore_legacy"],
            "--stride has no meaning",
        ),
        (
            ["--model", ".", "--data", "text.txt", "--json", "absent/out.json"],
            "absent/out.json cannot be written",
        ),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_code_2(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("run/export", "run/checkpoints", "early/checkpoints", "untrained", "partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for copy in ("run/export", "untrained", "partial"):
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / copy / file).write_bytes((folder / file).read_bytes())
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if name != "model.norm.weight"},
        folder / "partial" / "model.safetensors",
        metadata={"format": "pt"},
    )
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "perplexity.py", *arguments)
    assert stopped.value.code == 2
    (paragraph,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in paragraph


@pytest.mark.slow
@pytest.mark.distributed
def test_under_torchrun_the_number_is_the_same(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    out = tmp_path / "out.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        str(ROOT / "eval" / "perplexity.py"), "--model", str(folder), "--data", str(folder / "text.txt"),
        "--context-length", "32", "--json", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("perplexity  ") == 1, "one process prints"
    expected = perplexity(model, byte_ids(), 32)
    assert json.loads(out.read_text())["nll_sum"] == pytest.approx(expected.nll_sum, rel=1e-6)


TASK = """
task: corner
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task over one local file; nothing is fetched or left in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    questions = [{"question": f"Is it {i}?", "choices": [" yes", " no"], "answer": i % 2} for i in range(4)]
    (tasks / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tasks / "corner.yaml").write_text(TASK.format(data=tasks / "data.jsonl"))
    return tasks


def test_lm_harness_on_a_local_task(
    folder: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    pytest.importorskip("lm_eval")
    out = tmp_path / "out.json"
    run(
        monkeypatch, "lm_harness.py", "--model", folder, "--tasks", "corner", "--include-path", tasks,
        "--json", out,
    )  # fmt: skip
    written = json.loads(out.read_text())
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    right = 0
    for number in range(4):
        scores = []
        for choice in (" yes", " no"):
            question, answer = (tokenizer(text)["input_ids"] for text in (f"Is it {number}?", choice))
            with torch.no_grad():
                log_p = model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
            positions = range(len(question) - 1, len(question) + len(answer) - 1)
            scores.append(sum(float(log_p[p, t]) for p, t in zip(positions, answer, strict=True)))
        right += (scores[1] > scores[0]) == number % 2
    assert written["results"]["corner"]["acc,none"] == right / 4
    assert "corner" in capsys.readouterr().out


def test_lm_harness_mistakes(
    folder: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "lm_harness.py", "--model", folder)
    assert stopped.value.code == 2
    assert "pip install 'llmnorm[eval]'" in capsys.readouterr().err
