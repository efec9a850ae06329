"""train.py under torchrun: the numbers of one process, and checkpoints for any number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmnorm.training import train

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


def launch(config, tmp_path, processes=2):
    """Run train.py on this config with gloo processes on one machine; returns what it printed."""
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), "--config", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_then_one_equal_one_process_all_along(run_config, rows, tmp_path, strategy):
    """fp32 sums in another order, and Adam divides by sqrt(v): rounding grows a little each step."""
    common = {
        "schedule.name": "wsd",
        "schedule.decay_steps": 2,
        "evaluation.every": 4,
        "train.sample_every": 4,
        "train.sample_tokens": 4,
        "train.sample_prompt": "First",
        "checkpoint.every": 4,
    }
    alone = train(run_config(**common, **{"output_dir": str(tmp_path / "alone"), "train.max_steps": 8}))
    two = {"parallel.strategy": strategy, "train.micro_batch_size": 1}
    printed = launch(run_config(**common, **two, **{"train.max_steps": 6}), tmp_path)
    assert f"2 x cpu ({strategy}, fp32), 4 sequences per update = 1 x 2 x 2" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("step") and "loss" in line][
        -1
    ]
    first = rows(tmp_path / "run")
    assert [row["step"] for row in first] == [1, 2, 3, 4, 5, 6]
    # The checkpoint of step 4 precedes the decay, so a longer run goes on from there as if planned so.
    newest = tmp_path / "run" / "checkpoints" / "step_6"
    newest.rename(tmp_path / "step_6")
    train(run_config(**common, **{"train.max_steps": 8}))
    for here, there in zip(rows(tmp_path / "run"), rows(alone.output_dir), strict=True):
        assert (here["step"], here["tokens"], here["lr"]) == (there["step"], there["tokens"], there["lr"])
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
    for key in ("eval/loss", "sample"):
        ours, its = rows(tmp_path / "run", key), rows(alone.output_dir, key)
        assert [row["step"] for row in ours] == [row["step"] for row in its]
    assert rows(tmp_path / "run", "eval/loss")[1]["eval/loss"] == pytest.approx(
        rows(alone.output_dir, "eval/loss")[1]["eval/loss"], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_then_two_then_one_then_eight_processes_equal_one_all_along(run_config, rows, tmp_path):
    """FSDP2, DDP, none and FSDP2 in turn, each from the checkpoint of the one before."""
    common = {"schedule.name": "constant", "train.global_batch_size": 8, "checkpoint.every": 2}
    alone = train(run_config(**common, **{"output_dir": str(tmp_path / "alone"), "train.max_steps": 8}))
    for index, (processes, strategy) in enumerate([(4, "fsdp2"), (2, "ddp"), (1, "none"), (8, "fsdp2")]):
        changes = {"parallel.strategy": strategy, "train.max_steps": 2 * (index + 1)}
        printed = launch(run_config(**common, **changes), tmp_path, processes)
        assert f"{processes} x cpu ({strategy}, fp32)" in printed
        assert index == 0 or f"going on after step {2 * index} from" in printed
    for here, there in zip(rows(tmp_path / "run"), rows(alone.output_dir), strict=True):
        assert (here["step"], here["tokens"], here["lr"]) == (there["step"], there["tokens"], there["lr"])
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
