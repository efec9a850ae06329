"""eval/diagnose.py as a user runs it, its pictures, and the layers in report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_eval_scripts import byte_ids, run
from test_eval_scripts import folder as folder
from test_report import Page
from transformers import LlamaForCausalLM

from llmnorm.evaluation import diagnose, write_report
from llmnorm.evaluation.diagnostics_plots import SUBJECTS, subjects_of, write_plots
from llmnorm.evaluation.diagnostics_table import layer_table

SETTINGS = ("--context-length", 32, "--batch-size", 4, "--max-tokens", 400, "--removal-tokens", 200)


def test_every_number_goes_into_the_json_and_onto_the_screen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, record = tmp_path / "out.json", tmp_path / "run"
    record.mkdir()
    rows = [
        {"step": 50, "diagnostics/update_ratio": [0.25]},
        {"step": 60, "diagnostics/update_ratio": [0.125]},
    ]
    (record / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 61}]))
    data = ("--data", folder / "text.txt")
    run(monkeypatch, "diagnose.py", "--model", folder, *data, *SETTINGS, "--json", out, "--run", record)
    written = json.loads(out.read_text())
    sizes: dict[str, Any] = {"batch_size": 4, "max_tokens": 400, "removal_tokens": 200}
    expected = diagnose(LlamaForCausalLM.from_pretrained(folder), byte_ids(), 32, **sizes)
    for key in ("stream_variance", "gradient_norm", "removal_delta_loss", "attention_entropy", "perplexity"):
        assert written[key] == pytest.approx(expected[key], rel=1e-5), key
    assert (written["tokens"], written["scored_tokens"], written["num_layers"]) == (12 * 32, 200, 1)
    assert (written["update_ratio"], written["update_ratio_step"]) == ([0.125], 60)
    shown = capsys.readouterr().out
    assert "384 tokens in windows of 32" in shown and "0.125" in shown and "removal" not in shown
    assert shown.splitlines()[0].split()[0] == "layer" and shown.splitlines()[2].split()[0] == "1"

    run(monkeypatch, "diagnose.py", "--model", folder, *data, *SETTINGS, "--no-removal", "--json", out)
    written = json.loads(out.read_text())
    assert written["update_ratio"] is None and "has no optimizer" in written["update_ratio_unavailable"]
    assert "removal_loss" not in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "absent"], "--model absent: there is no such folder"),
        (["--context-length", "600"], "holds 504 tokens, fewer than one window of context_length=600"),
        (["--context-length", "3000", "--data", "long.txt"], "max_position_embeddings=2048"),
        (["--gradient-batches", "0"], "gradient_batches=0 must be at least 1"),
        (["--run", "absent"], "--run absent has no metrics.jsonl"),
        (["--data", "absent.txt"], "match nothing"),
        (["--json", "nowhere/out.json"], "nowhere/out.json cannot be written"),
        (["--plots", "text.txt"], "--plots text.txt is a file"),
    ],
)
def test_mistakes_exit_with_code_2_and_write_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    (folder / "long.txt").write_text("a" * 3100)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("llmnorm.evaluation.diagnostics_plots.require_matplotlib", lambda: None)
    given = [
        "--model",
        ".",
        "--data",
        "text.txt",
        "--json",
        tmp_path / "out.json",
        "--plots",
        tmp_path / "plots",
    ]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "diagnose.py", *given, *arguments)
    assert stopped.value.code == 2
    (paragraph,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in paragraph
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    """The result of a five-layer model, of which one layer has no softmax map."""
    layers, points = [0.1, 0.2, 0.3, 0.2, 0.9], [0.01, 0.1, 0.5, 2.0, 3.0, 400.0]
    gone = [1.0, 2.0, None, 1.5, 0.5]
    keys = ("angular_distance", "block_influence", "relative_update", "gradient_norm", "update_ratio")
    keys += ("removal_delta_perplexity", "removal_delta_loss", "gain_drift")
    between = ("stream_rms", "stream_variance", "stream_second_moment", "stream_gradient_norm")
    between += ("massive_ratio", "max_activation")
    gain = {"initial": 1.0, "mean": 1.1, "min": 0.5, "max": 1.5, "drift": 0.2, "unchanged": 0.0}
    norms = ("input_layernorm", "post_attention_layernorm")
    names = {f"model.layers.{layer - 1}.{norm}.weight": layer for norm in norms for layer in range(1, 6)}
    gains = [{"name": name, "layer": layer, **gain} for name, layer in names.items()]
    return {
        "norm": "mix_ln", "num_layers": 5, "tokens": 1000, "context_length": 10, "perplexity": 30.0,
        "scored_tokens": 999, "massive_count": [0, 0, 0, 0, 0, 3],
        **dict.fromkeys(keys, layers), **dict.fromkeys(between, points),
        "angular_distance_matrix": [[abs(a - b) / 9 for a in range(6)] for b in range(6)],
        "attention_entropy": gone, "max_attention_logit": gone,
        "attention_entropy_heads": [None if v is None else [v, v / 2] for v in gone],
        "attention_unavailable": {"layer 3": "SLA computes no softmax map"},
        "gains": gains,
        "variance_growth": {"exponential": {"slope": 0.5, "r2": 0.9}, "power": {"slope": 2.0, "r2": 0.99}},
    }  # fmt: skip


def test_the_table_has_a_line_per_layer_and_says_what_is_absent(numbers) -> None:
    lines = layer_table(numbers).splitlines()
    assert [line.split()[0] for line in lines[:7]] == ["layer", "0", "1", "2", "3", "4", "5"]
    assert lines[1].split()[1:4] == ["0.01", "0.01", "-"], "the embedding has a size and no angle"
    assert lines[4].split()[-3:] == ["-", "-", "0.3"]
    notes = "\n".join(lines[7:])
    assert "like l^2 (r2 0.990)" in notes and "3 massive activations" in notes
    assert "no attention entropy for layer 3: SLA computes no softmax map" in notes


def test_plots_one_per_subject_and_an_overview(numbers, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="`make install` brings it")
    from matplotlib import image

    written = write_plots(numbers, tmp_path / "plots", dpi=40)
    assert [path.stem for path in written] == ["overview", *SUBJECTS]
    for path in written:
        pixels = image.imread(path)
        assert pixels[..., :3].std() > 0.02, f"{path.name} is blank"
    absent = {**numbers, "update_ratio": None, "attention_entropy": [None] * 5}
    assert subjects_of(absent).keys() == SUBJECTS.keys() - {"update_ratio", "attention"}


def test_the_report_shows_the_layers_at_a_few_steps(numbers, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "loss": 5.0 - step / 100} for step in range(1, 101)]
    for step in range(0, 101, 10):
        profile = {"stream_rms": numbers["stream_rms"], "block_influence": numbers["block_influence"]}
        profile |= {"attention_entropy": numbers["attention_entropy"], "update_ratio": None}
        rows.append({"step": step, **{f"diagnostics/{key}": value for key, value in profile.items()}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    shown = " ".join(page.text)
    assert "Residual stream by layer" in shown and "Attention entropy by layer" in shown
    assert "Update / weight by layer" not in shown, "no update was recorded"
    assert all(f"step {step}" in shown for step in (0, 30, 70, 100)) and "step 50" not in shown
