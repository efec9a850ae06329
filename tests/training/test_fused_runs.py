"""Runs without a gradient buffer: the plain run's numbers, what guards and clipping do, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from llmnorm.checkpoint import load_full
from llmnorm.config import GuardSection
from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer, fused_backward_of
from llmnorm.optim.clipping import ZClip
from llmnorm.training import train
from llmnorm.training.fused_update import FusedUpdate
from llmnorm.training.guards import Guards, TrainingStopped, Verdict
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.plan import format_plan, make_plan
from llmnorm.training.processes import Processes
from llmnorm.training.update import Update

QUIET = {"evaluation.at_start": False, "checkpoint.every": 4, "train.max_steps": 4}
FUSED = {"optimizer.fused_backward": True}
GLOBAL = {"train.grad_clip": 0.5}


def numbers(run_config, rows, folder, **changes):
    result = train(run_config(output_dir=str(folder), **{**QUIET, **changes}))
    return [(row["step"], row["loss"], row["lr"], row["grad_norm"]) for row in rows(result.output_dir)]


def final_weights(folder, step=4):
    return load_full(folder / "checkpoints" / f"step_{step}")


@pytest.mark.parametrize(
    "changes",
    [
        {"train.grad_clip": None},
        GLOBAL,
        {"train.grad_clip": 0.05, "train.grad_clip_mode": "per_parameter"},
        {"train.grad_clip": 0.01, "train.grad_clip_mode": "agc", "train.precision": "bf16"},
        {"train.grad_clip": 0.1, "train.grad_clip_mode": "zclip", "optimizer.name": "apollo_mini"},
        {
            **GLOBAL,
            "optimizer.name": "galore",
            "train.precision": "bf16_pure",
            "optimizer.stochastic_rounding": True,
            "train.activation_checkpointing": "full",
        },
        pytest.param({**GLOBAL, "optimizer.name": "muon", "optimizer.qk_clip": 0.01}, marks=pytest.mark.slow),
        {"train.grad_clip": None, "optimizer.name": "muon", "optimizer.qk_clip": 0.01},
        pytest.param({**GLOBAL, "model.norm": "ngpt"}, marks=pytest.mark.slow),
        pytest.param({**GLOBAL, "train.loss_reweighting": {"warmup_steps": 1}}, marks=pytest.mark.slow),
        {"train.grad_clip": None, "train.loss_reweighting": {"warmup_steps": 1}},
        pytest.param({**GLOBAL, "model.norm": "powernorm"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values())[:60],
)
def test_a_fused_run_is_the_plain_run_to_the_last_bit(run_config, rows, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(ZClip, "warmup", 2)
    plain = numbers(run_config, rows, tmp_path / "plain", **changes)
    fused = numbers(run_config, rows, tmp_path / "fused", **changes, **FUSED)
    assert fused == plain
    mine, its = final_weights(tmp_path / "fused"), final_weights(tmp_path / "plain")
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[key], its[key]) for key in its)


def test_both_passes_draw_the_same_random_numbers_and_leave_the_plain_run_s(
    run_config, rows, tmp_path, monkeypatch
):
    """With a draw in the forward pass, as dropout makes."""
    inner = Update._loss
    monkeypatch.setattr(Update, "_loss", lambda *given: inner(*given) * (0.5 + torch.rand(())))
    runs = {}
    for fused in (False, True):
        changes = {**GLOBAL, "train.max_steps": 2, "optimizer.fused_backward": fused}
        runs[fused] = numbers(run_config, rows, tmp_path / str(fused), **changes)
    assert runs[True] == runs[False]


def test_an_interrupted_fused_run_goes_on_as_if_nothing_had_happened(run_config, rows, tmp_path):
    changes = {**FUSED, **GLOBAL, "optimizer.name": "apollo", "optimizer.update_proj_gap": 2}
    changes |= {"schedule.name": "constant"}
    whole = numbers(run_config, rows, tmp_path / "whole", **changes)
    numbers(run_config, rows, tmp_path / "parts", **{**changes, "train.max_steps": 2})
    assert numbers(run_config, rows, tmp_path / "parts", **changes) == whole
    mine, its = final_weights(tmp_path / "parts"), final_weights(tmp_path / "whole")
    assert all(torch.equal(mine[key], its[key]) for key in its)


def test_a_diagnosed_fused_run_has_the_plain_run_s_numbers(run_config, rows, tmp_path):
    for clip in (None, 0.5):
        found = {}
        for fused in (False, True):
            folder = tmp_path / f"{clip}{fused}"
            changes = {"diagnostics.every": 2, "train.grad_clip": clip, "optimizer.fused_backward": fused}
            numbers(run_config, rows, folder, **changes)
            found[fused] = rows(folder, "diagnostics/gradient_norm")
        assert len(found[True]) == 2
        for mine, its in zip(found[True], found[False], strict=True):
            assert mine.keys() == its.keys()
            for key in its:
                if key.startswith("diagnostics/") and isinstance(its[key], list):
                    assert mine[key] == pytest.approx(its[key], rel=1e-6), key


def poisoned(monkeypatch, name: str, at: int) -> None:
    """From its pass number `at` on, the gradient that arrives for a parameter called so is not finite."""
    inner = FusedUpdate._note
    seen = []

    def note(self, parameter):
        if self.routed[parameter].name.endswith(name):
            seen.append(1)
            if len(seen) >= at:
                parameter.grad.fill_(math.nan)
        inner(self, parameter)

    monkeypatch.setattr(FusedUpdate, "_note", note)


def test_with_a_global_norm_a_gradient_that_is_not_finite_moves_nothing(
    run_config, rows, tmp_path, monkeypatch
):
    poisoned(monkeypatch, "layers.0.mlp.up_proj.weight", at=4)
    changes = {**FUSED, **GLOBAL, "checkpoint.every": 3}
    folder = tmp_path / "run"
    numbers(run_config, rows, folder, **changes)
    assert [row.get("skipped", False) for row in rows(folder)] == [False, False, False, True]
    before, after = final_weights(folder, 3), final_weights(folder, 4)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_in_one_pass_what_comes_after_a_gradient_that_is_not_finite_rests(
    run_config, rows, tmp_path, monkeypatch
):
    """The backward pass goes from the head to the embedding: the head moves, layer 0's q and the embedding,
    behind the poisoned gradient, do not; the update counts as skipped."""
    poisoned(monkeypatch, "layers.0.mlp.up_proj.weight", at=4)
    changes = {**FUSED, "train.grad_clip": None, "checkpoint.every": 3}
    folder = tmp_path / "run"
    numbers(run_config, rows, folder, **changes)
    assert [row.get("skipped", False) for row in rows(folder)] == [False, False, False, True]
    before, after = final_weights(folder, 3), final_weights(folder, 4)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert {"lm_head.weight", "model.layers.1.self_attn.q_proj.weight"} <= moved
    assert not moved & {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"}
    assert not moved & {"model.layers.0.mlp.up_proj.weight"}


def test_a_loss_that_is_not_finite_moves_nothing_in_one_pass(run_config, rows, tmp_path, monkeypatch):
    inner, calls = FusedUpdate._forward, []

    def forward(self, *arguments):
        calls.append(1)
        objective, loss, entropy = inner(self, *arguments)
        return (
            (objective * math.nan, loss * math.nan, entropy)
            if len(calls) == 4
            else (objective, loss, entropy)
        )

    monkeypatch.setattr(FusedUpdate, "_forward", forward)
    folder = tmp_path / "run"
    numbers(run_config, rows, folder, **FUSED, **{"train.grad_clip": None, "checkpoint.every": 3})
    assert [row.get("skipped", False) for row in rows(folder)] == [False, False, False, True]
    before, after = final_weights(folder, 3), final_weights(folder, 4)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_updates_that_break_off_in_a_row_stop_the_run():
    guards = Guards(GuardSection(non_finite_limit=2))
    assert guards.judge(1, 2.0, None, range(4)) is Verdict.APPLY
    assert guards.judge_gradient(1, 2.0, math.nan, range(4)) is Verdict.SKIP
    assert guards.judge(2, 2.0, None, range(4)) is Verdict.APPLY
    with pytest.raises(TrainingStopped, match="non-finite update number 2 in a row"):
        guards.judge_gradient(2, 2.0, math.inf, range(4))
    guards = Guards(GuardSection(non_finite_limit=2))
    guards.judge_gradient(1, 2.0, math.nan, range(4))
    assert guards.judge_gradient(2, 2.0, 1.0, range(4)) is Verdict.APPLY
    assert guards.in_a_row == 0


@pytest.mark.parametrize("clip", [None, 0.5])
def test_no_more_than_one_gradient_is_alive_and_the_plan_says_which(run_config, clip):
    """Bytes of `p.grad` over both passes of an update, against the plan's."""
    from llmnorm.modeling import LlmNormForCausalLM, initialize_weights
    from llmnorm.training.plan import planned_model_config

    config = run_config(
        **FUSED, **{"train.grad_clip": clip, "model.vocab_size": 320, "data.tokenizer": "absent"}
    )
    model = LlmNormForCausalLM(planned_model_config(config))
    initialize_weights(model, 0)
    processes = Processes(0, 0, 1, torch.device("cpu"))
    wrapped = ParallelModel(model, "none", processes, "fp32", config.parallel)
    optimizer = create_optimizer("adamw", model, 1e-3, fused_backward=True)
    update = FusedUpdate(wrapped, optimizer, clip)
    alive = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        )
    fused = fused_backward_of(optimizer)
    inner = fused._receive

    def receive(parameter):
        alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        inner(parameter)

    fused._receive = receive
    ids = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(0))
    update.measure([{"input_ids": ids, "labels": ids}])
    update.apply(1.0)
    plan = make_plan(config, environment={})
    assert max(alive) <= plan.memory.gradients == max(p.nbytes for p in model.parameters())
    unfused = make_plan(run_config(**{"model.vocab_size": 320, "data.tokenizer": "absent"}), environment={})
    assert unfused.memory.gradients == sum(p.nbytes for p in model.parameters())
    assert plan.memory.total("none") < unfused.memory.total("none")
    assert "fused_backward: true" in format_plan(plan)


GALORE = {"optimizer.name": "galore", "optimizer.rank": 8, "train.micro_batch_size": 2}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_o26_a_run_that_sums_projections_is_the_plain_run_but_for_the_norm(run_config, rows, tmp_path, clip):
    """With a random projection no basis needs a gradient. The norm is that of the projections, so that a
    clipped run has other weights from the second step on."""
    changes = {**GALORE, "optimizer.projection": "random", "train.grad_clip": clip}
    plain = numbers(run_config, rows, tmp_path / "plain", **changes)
    summed = numbers(run_config, rows, tmp_path / "summed", **changes, **FUSED)
    alike = 4 if clip is None else 1
    for mine, its in zip(summed[:alike], plain[:alike], strict=True):
        assert mine[:3] == pytest.approx(its[:3], rel=1e-5)
    for mine, its in zip(summed, plain, strict=True):
        assert mine[3] != its[3] and mine[3] == pytest.approx(its[3], rel=0.3), "|R|^2 is |G|^2 on average"
    assert summed[3][1] < summed[0][1], "it learns"


def test_a_run_that_sums_projections_goes_on_as_if_nothing_had_happened(run_config, rows, tmp_path):
    changes = {**FUSED, **GLOBAL, **GALORE, "optimizer.update_proj_gap": 3, "schedule.name": "constant"}
    whole = numbers(run_config, rows, tmp_path / "whole", **changes)
    numbers(run_config, rows, tmp_path / "parts", **{**changes, "train.max_steps": 2})
    assert numbers(run_config, rows, tmp_path / "parts", **changes) == whole
    mine, its = final_weights(tmp_path / "parts"), final_weights(tmp_path / "whole")
    assert all(torch.equal(mine[key], its[key]) for key in its)


def test_a_sum_that_is_not_finite_moves_nothing(run_config, rows, tmp_path, monkeypatch):
    inner, seen = FusedUpdate._add, []

    def add(self, parameter):
        seen.append(1)
        if len(seen) >= 3 * 2 * len(self.routed):  # the last of the third update
            parameter.grad.fill_(math.inf)
        inner(self, parameter)

    monkeypatch.setattr(FusedUpdate, "_add", add)
    changes = {**FUSED, **GALORE, "train.grad_clip": None, "checkpoint.every": 1}
    folder = tmp_path / "run"
    numbers(run_config, rows, folder, **{**changes, "train.max_steps": 3})
    assert [row.get("skipped", False) for row in rows(folder)] == [False, False, True]
    before, after = final_weights(folder, 2), final_weights(folder, 3)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_plan_counts_summed_projections(run_config):
    """Whole gradients of what is not projected, 4 r max(m, n) bytes of what is, and the largest gradient."""
    shape = {"model.vocab_size": 320, "data.tokenizer": "absent"}
    plan = make_plan(run_config(**FUSED, **GALORE, **shape), environment={})
    single = make_plan(
        run_config(**FUSED, **{**GALORE, "train.micro_batch_size": None}, **shape), environment={}
    )
    from llmnorm.optim import route_parameters
    from llmnorm.training.build import build_on_meta
    from llmnorm.training.plan import planned_model_config

    config = run_config(**GALORE, **shape)
    held = 0
    for routed in route_parameters(build_on_meta(planned_model_config(config), config)):
        parameter = routed.parameter
        hidden = routed.role == "hidden_matrix"
        held += 4 * (8 * max(parameter.shape) if hidden else parameter.numel())
    assert plan.memory.gradients == single.memory.gradients + held


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.micro_batch_size": 2}, "cannot accumulate the 2 micro-batches of train.micro_batch_size=2"),
        ({"optimizer.name": "lanton"}, "fused_backward=true does not work with lanton"),
        (
            {"train.micro_batch_size": 2, "optimizer.name": "apollo"},
            "apollo needs whole gradients, and only galore's projections can be summed",
        ),
        (
            {**GALORE, "train.grad_clip": 0.1, "train.grad_clip_mode": "agc"},
            "grad_clip_mode=agc reads whole gradients.* with 2 micro-batches",
        ),
        (
            {**GALORE, "train.batch_schedule": {"name": "norm_test", "max_global_batch_size": 8}},
            "norm_test compares whole gradients of micro-batches, which optimizer.fused_backward=true",
        ),
        (
            {
                "train.batch_schedule": {
                    "name": "staged",
                    "stages": [{"until_step": 2, "global_batch_size": 2}],
                },
                "train.micro_batch_size": 2,
            },
            "cannot accumulate",
        ),
    ],
)
def test_what_it_cannot_honor_is_refused_before_anything_is_written(run_config, tmp_path, changes, words):
    config = run_config(**FUSED, **changes)
    for attempt in (lambda: train(config), lambda: make_plan(config, environment={})):
        with pytest.raises(UserError, match=words):
            attempt()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_several_processes_are_refused_by_name(run_config, strategy):
    config = run_config(**FUSED, **{"parallel.strategy": strategy, "model.vocab_size": 320})
    with pytest.raises(UserError, match=f"does not work with parallel.strategy={strategy}"):
        make_plan(config, 2, {})
