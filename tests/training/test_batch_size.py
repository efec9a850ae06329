"""Batch-size schedules: the stages against a plain loop, the norm test against its definition, whole runs."""

from __future__ import annotations

import pytest
import torch
from parallel_cases import Case, build, micro_batches

from llmnorm.checkpoint import newest_checkpoint, read_state
from llmnorm.config import planned_sequences, planned_stages
from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer, create_schedule
from llmnorm.training import train
from llmnorm.training.batch_size import create_batch_size
from llmnorm.training.gradient_noise import gradient_variance
from llmnorm.training.plan import format_plan, make_plan
from llmnorm.training.processes import Processes
from llmnorm.training.update import Update

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
EXACT = ("step", "tokens", "loss", "lr", "grad_norm", "global_batch_size")
STAGES = [{"until_step": 2, "global_batch_size": 2}, {"until_step": 4, "global_batch_size": 6}]


def staged(*stages, **more):
    return {"train.batch_schedule": {"name": "staged", "stages": list(stages), **more}}


def norm_test(**more):
    options = {"max_global_batch_size": 12, "eta": 0.3, "every": 1, "patience": 2, **more}
    return {"train.batch_schedule": {"name": "norm_test", **options}, "train.micro_batch_size": 2}


def exact(rows):
    return [tuple(row[key] for key in EXACT) for row in rows]


@pytest.mark.parametrize(
    "stages",
    [
        STAGES,
        # 32 tokens in a sequence: 100 tokens take two updates of 2 sequences, and 101 more one of 6.
        [{"until_tokens": 100, "global_batch_size": 2}, {"until_tokens": 201, "global_batch_size": 6}],
    ],
)
def test_o1_the_planned_stages_are_those_that_a_plain_loop_goes_through(run_config, stages):
    config = run_config(**staged(*stages))
    batch_size = create_batch_size(config, "none")
    sizes, read = [], 0
    for step in range(6):
        sizes.append(batch_size.at(step, read))
        read += sizes[-1]
    planned = planned_stages(config)
    assert [s.global_batch_size for s in planned for _ in range(s.num_steps)] == sizes
    assert sizes[:3] == [2, 2, 6]
    assert sizes[-1] == 4
    assert [stage.first_step for stage in planned] == [
        0,
        *(i for i in range(1, 6) if sizes[i] != sizes[i - 1]),
    ]
    assert planned_sequences(config) == read


def test_a_staged_run_reads_each_sample_once_and_counts_its_tokens(run_config, rows):
    config = run_config(**staged(*STAGES, lr_scaling="sqrt"))
    result = train(config)
    steps = rows(result.output_dir)
    assert [row["global_batch_size"] for row in steps] == [2, 2, 6, 6, 4, 4]
    assert [row["tokens"] for row in steps] == [32 * n for n in (2, 4, 10, 16, 20, 24)]
    assert read_state(newest_checkpoint(result.output_dir / "checkpoints"))["data_position"] == 24
    schedule = create_schedule(max_steps=6, **config.schedule.model_dump())
    factors = [(size / 4) ** 0.5 for size in (2, 2, 6, 6, 4, 4)]
    rates = [3e-3 * (schedule.multiplier(t) * factors[t]) for t in range(6)]
    assert [row["lr"] for row in steps] == pytest.approx(rates, rel=1e-15)


def test_the_batches_of_every_stage_follow_one_another(run_config):
    """Positions of the loader over stages and ranks: 0, 1, 2, ... without a gap and without a repeat."""
    from llmnorm.data.batches import BatchShape

    config = run_config(**staged(*STAGES), **{"train.micro_batch_size": 1})
    batch_size = create_batch_size(config, "none")
    for world_size in (1, 2):
        first, seen = 0, []
        for step in range(6):
            size = batch_size.at(step, first)
            shapes = [BatchShape(size, 1, rank, world_size) for rank in range(world_size)]
            seen.append(sorted(p for shape in shapes for p in shape.positions(first).tolist()))
            first += size
        assert [len(step) for step in seen] == [2, 2, 6, 6, 4, 4]
        assert [p for step in seen for p in step] == list(range(24))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("schedule", ["staged", "norm_test"])
def test_resumed_inside_a_stage_equals_never_stopped(run_config, rows, tmp_path, schedule, workers):
    """Checkpoints at 3 and 5: inside the second stage and the last, and after the norm test has grown."""
    change = staged(*STAGES) if schedule == "staged" else norm_test()
    common = {**change, "data.num_workers": workers, "schedule.name": "constant", "checkpoint.every": 1}
    straight = train(run_config(**common, **{"output_dir": str(tmp_path / "straight")}))
    for stop in (3, 5):
        config = run_config(**common, **{"output_dir": str(tmp_path / "stopped"), "train.max_steps": 5})
        if stop == 3:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("llmnorm.training.guards.Guards.judge", failing_at(4))
                with pytest.raises(RuntimeError, match="power"):
                    train(config)
        else:
            train(config)
    train(run_config(**common, **{"output_dir": str(tmp_path / "stopped")}))
    there = exact(rows(straight.output_dir))
    assert exact(rows(tmp_path / "stopped")) == there
    assert len({row[-1] for row in there}) > 1


def failing_at(failing_step):
    from llmnorm.training.guards import Guards

    original = Guards.judge

    def judge(self, step, *rest):
        if step == failing_step:
            raise RuntimeError("power failure")
        return original(self, step, *rest)

    return judge


@pytest.mark.parametrize("tied", [False, True])
def test_o2_squares_of_micro_batches_are_those_of_their_gradients_alone(tied):
    """Each c_j by itself from autograd on the plain definition; tied weights are used twice in a pass."""
    model = build(Case(tied=tied), ALONE)
    batches = micro_batches(0, 1, 0, 1)
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    gradients = []
    for batch in batches:
        logits = model.module(input_ids=batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="sum") / tokens
        found = torch.autograd.grad(loss, list(model.module.parameters()))
        gradients.append(torch.cat([gradient.flatten().double() for gradient in found]))
    c = torch.stack(gradients)
    # Unbiased sample variance of the c_j, times their number: the variance of their sum.
    expected = len(c) * (c - c.mean(0)).square().sum().item() / (len(c) - 1)
    update = Update(model, create_optimizer("adamw", model.module, lr=1e-2), None)
    plain = update.measure(batches)
    before = [p.grad.clone() for p in model.module.parameters()]
    update.drop()
    measured = update.measure(batches, variance=True)
    # fp32 gradients, and a difference of sums about ten times as large as itself.
    assert measured.gradient_variance == pytest.approx(expected, rel=1e-5)
    assert (measured.loss, measured.grad_norm) == (plain.loss, plain.grad_norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.module.parameters(), before, strict=True))
    assert plain.gradient_variance is None


def test_the_variance_estimate_is_right_on_average():
    """Sums of 4 vectors of known variance: the mean of 4000 estimates is 32, to 3 sigma."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(4000, 4, 8, dtype=torch.float64, generator=generator) + 0.5
    estimates = [
        gradient_variance(part.square().sum().item(), part.sum(0).norm().item(), 4) for part in c.unbind()
    ]
    # One estimate is 32/24 of a chi-square of 24 degrees: its deviation is 32 sqrt(2/24).
    assert sum(estimates) / 4000 == pytest.approx(32.0, abs=3 * 32 * (2 / 24 / 4000) ** 0.5)


def test_o3_the_norm_test_grows_by_its_formula_after_its_patience(run_config):
    batch_size = create_batch_size(run_config(**norm_test(patience=2, max_global_batch_size=24)), "none")
    assert batch_size.at(0, 0) == 4
    batch_size.observe(variance=0.09 * 3.9, grad_norm=1.0)  # asks for ceil(4 * 3.9) = 16
    assert batch_size.at(0, 0) == 4
    batch_size.observe(variance=0.09 * 0.99, grad_norm=1.0)  # passes: the count begins anew
    batch_size.observe(variance=0.09 * 5.0, grad_norm=1.0)
    assert batch_size.at(0, 0) == 4
    batch_size.observe(variance=0.09 * 2.1, grad_norm=1.0)  # the smaller asks for ceil(8.4) = 9
    assert batch_size.at(0, 0) == 12
    assert all(type(value) is int for value in batch_size.state().values())
    for _ in range(2):
        batch_size.observe(variance=1.0, grad_norm=0.0)
    assert batch_size.at(0, 0) == 24
    assert not batch_size.due(0)


def test_a_run_with_the_norm_test_grows_where_its_rows_say_it_must(run_config, rows):
    result = train(run_config(**norm_test(lr_scaling="sqrt"), **{"schedule.name": "constant"}))
    steps = rows(result.output_dir)
    assert steps[0]["global_batch_size"] == 4
    assert steps[0]["gradient_variance"] > (0.3 * steps[0]["grad_norm"]) ** 2
    sizes = [row["global_batch_size"] for row in steps]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 12
    grown = next(row for row in steps if row["global_batch_size"] == 12)
    assert grown["lr"] == pytest.approx(3e-3 * 3**0.5, rel=1e-12)
    assert "gradient_variance" not in steps[-1]  # at the largest size there is nothing to test


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (staged({"until_step": 6, "global_batch_size": 2}), r"take 6 updates \(384 tokens\) and train.max"
         r"_steps=6 leaves none for train.global_batch_size=4; raise train.max_steps above 6, or lower "
         r"train.batch_schedule.stages\[0\].until_step"),
        (staged({"until_tokens": 100_000, "global_batch_size": 2}), "lower .*until_tokens"),
        (staged(*reversed(STAGES)), r"stages\[1\].until_step=2 is reached before .* must increase"),
        (staged({"global_batch_size": 2}), r"stages\[0\] has neither until_step nor until_tokens"),
        (staged({"until_step": 1, "until_tokens": 9, "global_batch_size": 2}), "has both"),
        ({**staged({"until_step": 1, "global_batch_size": 3}), "train.micro_batch_size": 2},
         r"stages\[0\].global_batch_size=3 is not a multiple of train.micro_batch_size=2; set .* to 2 or 4"),
        (norm_test(max_global_batch_size=10), "max_global_batch_size=10 is not a larger .* to 8"),
        ({**norm_test(), "train.micro_batch_size": 4}, "train.micro_batch_size to at most half"),
        ({**norm_test(), "parallel.strategy": "fsdp2"}, "use parallel.strategy: ddp"),
        ({**norm_test(), "train.loss_reweighting": {"warmup_steps": 0}}, "their gradients as independent"),
        (staged({"until_stp": 1, "global_batch_size": 2}), "until_stp"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_held_is_refused(run_config, change, message):
    with pytest.raises(UserError, match=message):
        run_config(**change)


def test_a_stage_that_processes_cannot_share_is_refused_before_anything_is_written(run_config, tmp_path):
    config = run_config(**staged({"until_step": 1, "global_batch_size": 3}))
    with pytest.raises(UserError, match=r"stages\[0\].global_batch_size=3 is not .* the 2 processes"):
        make_plan(config, 2, {})
    assert not (tmp_path / "run").exists()


def test_the_plan_prints_the_stages_and_their_tokens(run_config):
    changes = {**staged(*STAGES, lr_scaling="linear"), "model.vocab_size": 320}
    text = format_plan(make_plan(run_config(**changes), 1, {}))
    assert "  updates 1 to 2: 2 sequences, 128 positions by its end, learning rate x 0.5\n" in text
    assert "  updates 3 to 4: 6 sequences, 512 positions by its end, learning rate x 1.5\n" in text
    assert "  updates 5 to 6: 4 sequences, 768 positions by its end\n" in text
    assert "\ntokens: 768 (" in text
    assert "sequences per step: 6 =" in text
    text = format_plan(make_plan(run_config(**norm_test(), **{"model.vocab_size": 320}), 1, {}))
    assert "norm test from 4 to at most 12 sequences, every 1 updates, eta 0.3" in text
    assert "\ntokens: at least 768 (" in text
