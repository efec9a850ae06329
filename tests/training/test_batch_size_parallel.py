"""Runs with a batch schedule on two processes: the sizes, samples and numbers of one process."""

from __future__ import annotations

import socket

import pytest
import torch.multiprocessing as mp
from batch_size_cases import work

from llmnorm.checkpoint import newest_checkpoint, read_state
from llmnorm.errors import UserError
from llmnorm.training import train
from llmnorm.training.batch_size import create_batch_size

pytestmark = pytest.mark.distributed

STAGED = {
    "name": "staged",
    "lr_scaling": "sqrt",
    "stages": [{"until_step": 1, "global_batch_size": 2}, {"until_tokens": 300, "global_batch_size": 6}],
}
NORM_TEST = {"name": "norm_test", "max_global_batch_size": 12, "eta": 0.3, "every": 1, "patience": 2}
# case -> schedule, strategy of the two processes, micro-batch size, sizes of the six updates
CASES = {
    "staged ddp": (STAGED, "ddp", 1, [2, 6, 6, 4, 4, 4]),
    "staged fsdp2": (STAGED, "fsdp2", 1, [2, 6, 6, 4, 4, 4]),
    "norm_test ddp": (NORM_TEST, "ddp", 2, [4, 4, 12, 12, 12, 12]),
}


def case_config(run_config, case, output_dir, strategy, steps):
    schedule, _, micro, _ = CASES[case]
    changes = {
        "train.batch_schedule": schedule,
        "train.micro_batch_size": micro,
        "train.max_steps": steps,
        "schedule.name": "constant",
        "parallel.strategy": strategy,
        "checkpoint.every": 2,
        "output_dir": str(output_dir),
    }
    return run_config(**changes)


@pytest.mark.parametrize(
    "cases", [("staged ddp", "norm_test ddp"), pytest.param(("staged fsdp2",), marks=pytest.mark.slow)]
)
def test_two_processes_then_one_equal_one_process_through_every_stage(run_config, rows, tmp_path, cases):
    """Four updates on two processes, then two more on one from their checkpoint, inside the last stage."""
    files = []
    for case in cases:
        file = tmp_path / f"{case}.yaml"
        config = case_config(run_config, case, tmp_path / case, CASES[case][1], steps=4)
        file.write_text(config.to_yaml(), encoding="utf-8")
        files.append(str(file))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(2, port, files), nprocs=2)

    for case in cases:
        schedule, _, _, sizes = CASES[case]
        whole = train(case_config(run_config, case, tmp_path / schedule["name"], "none", steps=6))
        train(case_config(run_config, case, tmp_path / case, "none", steps=6))
        ours, theirs = rows(tmp_path / case), rows(whole.output_dir)
        assert [row["global_batch_size"] for row in ours] == sizes, case
        for here, there in zip(ours, theirs, strict=True):
            for key in ("step", "tokens", "lr", "global_batch_size"):
                assert here[key] == there[key], (case, key)
            # fp32 sums in another order, and Adam divides by sqrt(v): rounding grows a little each step.
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-5), case
            assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4), case
            assert ("gradient_variance" in here) is ("gradient_variance" in there)
            if "gradient_variance" in there:
                variance = there["gradient_variance"]
                assert here["gradient_variance"] == pytest.approx(variance, rel=1e-3), case
                # No test here is so close that another order of sums decides it.
                assert abs(variance / (0.3 * there["grad_norm"]) ** 2 - 1) > 0.1
        states = [
            read_state(newest_checkpoint(tmp_path / run / "checkpoints")) for run in (case, whole.output_dir)
        ]
        assert states[0]["data_position"] == states[1]["data_position"] == sum(sizes), case


def test_a_norm_test_is_refused_where_only_the_launcher_asks_for_fsdp2(run_config):
    """`parallel.strategy: auto` passes the config's own check; the strategy is known when the run starts."""
    config = case_config(run_config, "norm_test ddp", "unused", "auto", steps=3)
    with pytest.raises(UserError, match=r"norm_test needs each micro-batch's own .* parallel\.strategy: ddp"):
        create_batch_size(config, "fsdp2")
