"""The loop, end to end in one process: what it writes, what it repeats to the last bit, and how it stops."""

import os
import signal

import pytest
import torch

from llmnorm.checkpoint import load_full
from llmnorm.data.loader import TrainingLoader
from llmnorm.errors import UserError
from llmnorm.optim import create_schedule
from llmnorm.training import train
from llmnorm.training.guards import TrainingStopped
from llmnorm.training.update import Update

EXACT = ("step", "tokens", "loss", "lr", "grad_norm")


def exact(rows):
    return [tuple(row[key] for key in EXACT) for row in rows]


def at_step(monkeypatch, step, action):
    """Call `action` while the run makes its `step`th update."""
    original = Update.measure
    calls = iter(range(1, 10_000))

    def measure(self, *args, **options):
        if next(calls) == step:
            action()
        return original(self, *args, **options)

    monkeypatch.setattr(Update, "measure", measure)


def test_every_step_has_a_row_and_evaluations_have_theirs(run_config, rows):
    config = run_config(**{"evaluation.every": 4})
    result = train(config)
    steps = rows(result.output_dir)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in steps] == [4 * 32 * n for n in range(1, 7)]
    schedule = create_schedule(max_steps=6, **config.schedule.model_dump())
    assert [row["lr"] for row in steps] == [3e-3 * schedule.multiplier(t) for t in range(6)]
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in steps)
    assert all(0 < row["optimizer_seconds"] < row["seconds"] for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    evaluations = rows(result.output_dir, "eval/loss")
    assert [row["step"] for row in evaluations] == [0, 4, 6]
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] - 0.1
    assert all({"eval/perplexity", "eval/tokens", "tokens"} <= row.keys() for row in evaluations)
    assert {row["eval/dtype"] for row in evaluations} == {"float32"}
    assert (result.step, result.tokens, result.interrupted) == (6, 768, False)
    assert result.evaluation["eval/loss"] == evaluations[-1]["eval/loss"]
    names = {path.name for path in result.files}
    assert {"config.yaml", "metrics.jsonl", "report.html", "tokenizer.json", "index.json"} <= names


def test_sampling_and_evaluating_leave_the_trajectory_alone(run_config, rows, tmp_path, capsys):
    plain = train(run_config(**{"output_dir": str(tmp_path / "plain"), "evaluation.at_start": False}))
    busy = {
        "train.sample_every": 2,
        "train.sample_tokens": 4,
        "train.sample_prompt": "First",
        "evaluation.every": 1,
    }
    watched = train(run_config(**{"output_dir": str(tmp_path / "watched"), **busy}))
    assert exact(rows(plain.output_dir)) == exact(rows(watched.output_dir))
    samples = rows(watched.output_dir, "sample")
    assert [row["step"] for row in samples] == [2, 4, 6]
    assert all(row["sample"].startswith("First") and len(row["sample"]) > 5 for row in samples)
    assert "step 6, sampled: First" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_by_a_signal_and_started_again_equals_never_stopped(
    run_config, rows, tmp_path, monkeypatch, capsys, workers
):
    common = {"data.num_workers": workers, "evaluation.every": 2}
    straight = train(run_config(**{"output_dir": str(tmp_path / "straight"), **common}))
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = train(run_config(**common))
    assert stopped.interrupted and stopped.step == 3
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    resumed = train(run_config(**common))
    assert not resumed.interrupted and resumed.step == 6
    assert "going on after step 3" in capsys.readouterr().out
    assert exact(rows(resumed.output_dir)) == exact(rows(straight.output_dir))
    evaluations = [
        [(row["step"], row["eval/loss"]) for row in rows(run.output_dir, "eval/loss")]
        for run in (resumed, straight)
    ]
    assert evaluations[0] == evaluations[1]
    ours, its = (load_full(run.output_dir / "checkpoints/step_6", "") for run in (resumed, straight))
    assert ours.keys() == its.keys()
    assert all(torch.allclose(ours[name], its[name], rtol=0, atol=0, equal_nan=True) for name in ours)


def test_constrained_weights_resume_to_the_last_bit_and_obey_in_every_checkpoint(run_config, rows, tmp_path):
    """nGPT stopped after 3 of 6 steps: restored weights obey already and must not be touched."""
    common = {"model.norm": "ngpt", "schedule.name": "constant", "schedule.warmup_steps": 0}
    straight = train(run_config(**{"output_dir": str(tmp_path / "straight"), **common}))
    train(run_config(**{**common, "train.max_steps": 3}))
    resumed = train(run_config(**common))
    assert exact(rows(resumed.output_dir)) == exact(rows(straight.output_dir))
    ours, its = (load_full(run.output_dir / "checkpoints/step_6") for run in (resumed, straight))
    assert all(torch.equal(ours[name], its[name]) for name in its)
    units = {"lm_head": 1, "model.layers.1.mlp.down_proj": 0, "model.layers.0.self_attn.v_proj": 1}
    for name, dim in units.items():
        lengths = ours[f"{name}.weight"].norm(dim=dim)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6, msg=name)


def test_a_finished_run_started_again_changes_nothing(run_config, rows):
    first = train(run_config())
    before = (first.output_dir / "metrics.jsonl").read_bytes()
    again = train(run_config())
    assert (again.output_dir / "metrics.jsonl").read_bytes() == before
    assert again.step == 6 and not again.interrupted


def test_a_constant_run_goes_on_longer_as_if_it_had_been_long_from_the_start(run_config, rows, tmp_path):
    constant = {"schedule.name": "constant", "evaluation.at_start": False}
    train(run_config(**constant))
    longer = train(run_config(**constant, **{"train.max_steps": 8}))
    whole = train(run_config(**constant, **{"train.max_steps": 8, "output_dir": str(tmp_path / "whole")}))
    assert exact(rows(longer.output_dir)) == exact(rows(whole.output_dir))


def test_another_run_is_refused_before_anything_is_written(run_config):
    directory = train(run_config(**{"train.max_steps": 2})).output_dir
    before = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match=r"holds another run: model\.norm was 'mix_ln' and is now 'pre_ln'"):
        train(run_config(**{"train.max_steps": 2, "model.norm": "pre_ln"}))
    assert {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()} == before


def test_accumulation_is_equal_up_to_rounding(run_config, rows, tmp_path):
    """fp32 sums in another order; Adam divides by sqrt(v), which blows rounding up a little each step."""
    whole = train(run_config(**{"output_dir": str(tmp_path / "whole")}))
    split = train(run_config(**{"output_dir": str(tmp_path / "split"), "train.micro_batch_size": 1}))
    for one, four in zip(rows(whole.output_dir), rows(split.output_dir), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert (four["tokens"], four["lr"]) == (one["tokens"], one["lr"])


def poison(monkeypatch, positions, value):
    """Make the loss of steps that read from these sample positions `value`; return all that is read."""
    read = []
    original_measure, original_next = Update.measure, TrainingLoader.__next__

    def measure(self, *args, **options):
        measured = original_measure(self, *args, **options)
        return measured._replace(loss=value) if read[-1] in positions else measured

    def next_batch(self):
        batch = original_next(self)
        read.append(batch.first)
        return batch

    monkeypatch.setattr(Update, "measure", measure)
    monkeypatch.setattr(TrainingLoader, "__next__", next_batch)
    return read


def test_a_non_finite_update_is_skipped_and_named(run_config, rows, tmp_path, monkeypatch, capsys):
    options = {"checkpoint.every": 1, "checkpoint.keep": 9, "evaluation.at_start": False}
    poison(monkeypatch, {8}, float("nan"))
    result = train(run_config(**options))
    steps = rows(result.output_dir)
    assert [row.get("skipped", False) for row in steps] == [False, False, True, False, False, False]
    assert steps[2]["loss"] is None and steps[2]["tokens"] == 3 * 4 * 32
    before, after = (load_full(result.output_dir / f"checkpoints/step_{n}", "") for n in (2, 3))
    moved = [name for name in before if not torch.equal(before[name], after[name]) and "rng/" not in name]
    assert moved == [], "a skipped update must leave weights and optimizer state as they were"
    assert "step 3/6  loss not finite" in capsys.readouterr().out


def test_too_many_in_a_row_stop_the_run_and_keep_its_checkpoint(run_config, rows, monkeypatch):
    poison(monkeypatch, {8, 12}, float("inf"))
    with pytest.raises(TrainingStopped, match=r"stopped at step 4.*samples 12 to 15") as error:
        train(run_config(**{"guards.non_finite_limit": 2}))
    assert "guards.non_finite_limit=2" in str(error.value)


def test_a_spike_rolls_back_and_skips_the_data_since_the_checkpoint(
    run_config, rows, tmp_path, monkeypatch, capsys
):
    options = {
        "train.max_steps": 16,
        "checkpoint.every": 5,
        "evaluation.at_start": False,
        "guards.spike": {"window": 8, "threshold": 50.0},
    }
    read = poison(monkeypatch, {48}, 90.0)  # read by update 13
    result = train(run_config(**options))
    assert (
        "loss 90.0000 at step 13 is a spike: back to step 10, and training samples 40 to 51 are skipped"
        in (capsys.readouterr().out)
    )
    assert [row["step"] for row in rows(result.output_dir)] == list(range(1, 17))
    assert [row["loss"] for row in rows(result.output_dir) if row["loss"] > 10] == []
    (event,) = rows(result.output_dir, "event")
    assert event == {
        "step": 10,
        "event": "roll_back",
        "spike_step": 13,
        "spike_loss": 90.0,
        "skipped_samples": [40, 51],
    }
    assert rows(result.output_dir)[-1]["tokens"] == 16 * 4 * 32
    assert read == [*range(0, 52, 4), *range(52, 76, 4)]


@pytest.mark.parametrize(
    ("precision", "weights", "state"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.float32),
        ("bf16_pure", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precisions_keep_weights_and_state_in_their_dtypes(run_config, rows, precision, weights, state):
    result = train(run_config(**{"train.precision": precision, "train.max_steps": 2}))
    saved = load_full(result.output_dir / "checkpoints/step_2", "")
    of_model = {tensor.dtype for name, tensor in saved.items() if name.startswith("model/")}
    of_moments = {tensor.dtype for name, tensor in saved.items() if "/exp_avg" in name}
    assert (of_model, of_moments) == ({weights}, {state})
    assert rows(result.output_dir)[0]["loss"] == pytest.approx(5.83, abs=0.15)  # near ln 320 = 5.77


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_repeats_every_loss_to_the_last_bit(run_config, rows, tmp_path, mode):
    plain = train(run_config(**{"output_dir": str(tmp_path / "plain")}))
    saving = train(run_config(**{"train.activation_checkpointing": mode}))
    assert exact(rows(saving.output_dir)) == exact(rows(plain.output_dir))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_losses(run_config, rows, tmp_path):
    """The compiler fuses and reorders fp32 operations: the tolerance is that of another summation order."""
    plain = train(run_config(**{"output_dir": str(tmp_path / "plain")}))
    compiled = train(run_config(**{"train.compile": True}))
    for one, two in zip(rows(plain.output_dir), rows(compiled.output_dir), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_tied_embeddings_and_other_optimizer_options_train(run_config, rows):
    changes = {"model.tie_word_embeddings": True, "optimizer.weight_decay": 0.1, "train.grad_clip": None}
    losses = [row["loss"] for row in rows(train(run_config(**changes)).output_dir)]
    assert losses[-1] < losses[0] - 0.2


def test_a_run_exports_and_another_starts_from_its_weights(run_config, rows, tmp_path):
    first = train(run_config(**{"export.at_end": True}))
    exported = first.output_dir / "export"
    assert (exported / "model.safetensors") in first.files and (exported / "tokenizer.json") in first.files
    start = {"model.init_from": str(exported), "output_dir": str(tmp_path / "second")}
    second = train(run_config(**start, **{"train.max_steps": 2}))
    assert rows(second.output_dir, "eval/loss")[0]["eval/loss"] == pytest.approx(
        first.evaluation["eval/loss"], rel=1e-7
    )
    # A restart does not need the weights it started from any more.
    exported.rename(tmp_path / "gone")
    again = train(run_config(**start, **{"train.max_steps": 2}))
    assert again.step == 2


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(run_config, tmp_path):
    with pytest.raises(UserError, match=r"beyond the vocabulary of 300; set model\.vocab_size above it"):
        train(run_config(**{"model.vocab_size": 300}))
    assert not (tmp_path / "run").exists()


def test_a_contradiction_of_the_launcher_is_refused_before_anything_is_written(run_config, tmp_path):
    with pytest.raises(UserError, match=r"parallel\.strategy=ddp needs a process group"):
        train(run_config(**{"parallel.strategy": "ddp"}))
    assert not (tmp_path / "run").exists()
