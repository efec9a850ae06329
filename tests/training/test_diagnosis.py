"""Diagnostics during a run: right numbers, one row each, and a run that does not notice."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmnorm.errors import UserError
from llmnorm.evaluation import diagnose
from llmnorm.training import train
from llmnorm.training.diagnosis import for_trackers
from llmnorm.training.loop import Training
from llmnorm.training.signals import StopRequest

KEYS = {"stream_rms", "stream_variance", "angular_distance", "block_influence", "relative_update"}
KEYS |= {"max_activation", "massive_ratio", "massive_count", "gain_drift", "gradient_norm", "update_ratio"}
KEYS |= {"attention_entropy", "attention_relative_entropy", "max_attention_logit"}


def trajectory(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "tokens", "loss", "lr", "grad_norm")
    return [tuple(row[key] for key in keys) for row in lines if "loss" in row]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.micro_batch_size": 1, "train.activation_checkpointing": "full", "train.precision": "bf16"},
        {"diagnostics.layer_removal": True, "model.norm": "gpas", "train.sample_every": 2},
    ],
)
def test_training_is_bit_identical_with_diagnostics(run_config, rows, tmp_path, changes) -> None:
    off = {key: value for key, value in changes.items() if not key.startswith("diagnostics")}
    train(run_config(**off, output_dir=str(tmp_path / "off")))
    train(run_config(**changes, output_dir=str(tmp_path / "on"), **{"diagnostics.every": 2}))
    assert trajectory(tmp_path / "on") == trajectory(tmp_path / "off")
    on, off = (tmp_path / run / "checkpoints" / "step_6" for run in ("on", "off"))
    shards = [path.name for path in on.glob("*.safetensors")]
    assert shards and all((on / name).read_bytes() == (off / name).read_bytes() for name in shards)
    found = rows(tmp_path / "on", "diagnostics/stream_rms")
    assert [row["step"] for row in found] == [0, 2, 4, 6]
    assert {key.removeprefix("diagnostics/") for key in found[-1]} >= KEYS
    assert ("diagnostics/removal_loss" in found[-1]) == ("diagnostics.layer_removal" in changes)


@pytest.fixture
def step(run_config, tmp_path):
    """The run after one diagnosed update, what it was before, the batch, and the row."""
    taken: list[Path] = []

    def take(**changes: Any) -> tuple[Training, torch.nn.Module, list[dict[str, Any]], dict[str, Any]]:
        taken.append(tmp_path / f"run{len(taken)}")
        run = Training(run_config(output_dir=str(taken[-1]), **{"diagnostics.every": 1, **changes}))
        run._read_on()
        before = copy.deepcopy(run.model.module)
        batches = next(run._batches).micro_batches
        run._batches.close()
        run._read_on()
        run._step(StopRequest())
        lines = (taken[-1] / "metrics.jsonl").read_text().splitlines()
        return run, before, batches, json.loads(lines[-1])

    return take


@pytest.mark.parametrize("changes", [{}, {"train.micro_batch_size": 1}, {"train.grad_clip": 0.01}])
def test_d2_gradient_norms_are_those_of_the_whole_unclipped_update(step, changes) -> None:
    _, model, batches, row = step(**changes)
    model.zero_grad()
    inputs = torch.cat([batch["input_ids"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    logits = model(input_ids=inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for number, block in enumerate(model.model.layers):
        expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in block.parameters()))
        assert row["diagnostics/gradient_norm"][number] == pytest.approx(expected, rel=1e-5)
    head = float(model.lm_head.weight.grad.double().norm())
    assert row["diagnostics/gradient_norm/lm_head"] == pytest.approx(head, rel=1e-5)


def test_update_to_weight_ratio_is_that_of_the_matrices(step) -> None:
    run, before, _, row = step()
    after = run.model.module
    for number in range(2):
        moved = held = 0.0
        for new, old in zip(
            after.model.layers[number].parameters(), before.model.layers[number].parameters(), strict=True
        ):
            if old.ndim == 2:
                moved += float((new.double() - old.double()).square().sum())
                held += float(old.double().square().sum())
        assert row["diagnostics/update_ratio"][number] == pytest.approx(math.sqrt(moved / held), rel=1e-5)
    moved_table = after.model.embed_tokens.weight.double() - before.model.embed_tokens.weight.double()
    expected = float(moved_table.norm() / before.model.embed_tokens.weight.double().norm())
    assert row["diagnostics/update_ratio/embed_tokens"] == pytest.approx(expected, rel=1e-5)
    assert "diagnostics/update_ratio/norm" not in row, "a norm has no matrix"


def test_the_probe_equals_diagnose_on_the_same_text(step) -> None:
    probed = {"diagnostics.sequences": 3, "diagnostics.layer_removal": True}
    run, _, _, row = step(**{**probed, "train.micro_batch_size": 2})
    text = next(iter(run.data.validation.values())).read(0, 3 * 32 + 1)
    found = diagnose(run.model.module, text, 32)
    for key in KEYS - {"gradient_norm", "update_ratio"} | {"removal_loss", "removal_delta_perplexity"}:
        assert row[f"diagnostics/{key}"] == pytest.approx(found[key], rel=1e-4, abs=1e-6), key


def test_a_skipped_update_has_no_update_ratio(run_config, rows, tmp_path, monkeypatch) -> None:
    run = Training(run_config(**{"diagnostics.every": 1}))
    run._read_on()
    with torch.no_grad():
        run.model.module.lm_head.weight[0, 0] = math.inf
    run._step(StopRequest())
    (row,) = rows(tmp_path / "run", "diagnostics/stream_rms")
    assert row["diagnostics/update_ratio"] is None and row["diagnostics/gradient_norm"][0] is None
    assert row["diagnostics/stream_rms"][0] > 0


def test_a_resumed_run_diagnoses_each_step_once(run_config, rows, tmp_path) -> None:
    train(run_config(**{"diagnostics.every": 3, "train.max_steps": 4, "schedule.name": "constant"}))
    train(run_config(**{"diagnostics.every": 2, "train.max_steps": 6, "schedule.name": "constant"}))
    assert [row["step"] for row in rows(tmp_path / "run", "diagnostics/stream_rms")] == [0, 3, 6]


def test_compiled_blocks_are_measured_uncompiled(step, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that hooks cannot see into, the numbers are those of the plain blocks."""
    calls = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append(1)
            return graph.forward(*arguments)

        return run

    plain = step()[3]
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend=compiler))
    run, _, _, row = step(**{"train.compile": True})
    assert calls, "the update itself ran compiled"
    compiled = len(calls)
    run.observer.diagnostics.probe()
    assert len(calls) == compiled, "the probe ran a compiled block"
    assert row["diagnostics/stream_rms"] == pytest.approx(plain["diagnostics/stream_rms"], rel=1e-5)


def test_trackers_get_one_number_per_layer() -> None:
    row = {"step": 5, "diagnostics/stream_rms": [1.0, 2.0, 3.0], "diagnostics/block_influence": [4.0, 5.0]}
    assert for_trackers(row, 2) == {
        "step": 5,
        "diagnostics/stream_rms/layer_00": 1.0,
        "diagnostics/stream_rms/layer_01": 2.0,
        "diagnostics/stream_rms/layer_02": 3.0,
        "diagnostics/block_influence/layer_01": 4.0,
        "diagnostics/block_influence/layer_02": 5.0,
    }


def test_settings_that_would_do_nothing_are_refused(run_config) -> None:
    with pytest.raises(UserError, match=r"diagnostics.layer_removal=true does nothing with diag"):
        run_config(**{"diagnostics.layer_removal": True})
    with pytest.raises(UserError, match=r"diagnostics.sequences=8 does nothing with diagnostics.every=null"):
        run_config(**{"diagnostics.sequences": 8})
