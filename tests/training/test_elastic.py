"""Ranks killed under `torchrun --max-restarts`: the loss curve is that of a run nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchrun import ranks_of, torchrun

from llmnorm.checkpoint import published_steps

pytestmark = pytest.mark.distributed
SAME = ("step", "tokens", "loss", "lr", "grad_norm")


def lines(run: Path) -> list[str]:
    """Whole lines of metrics.jsonl; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def trajectory(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(row[key] for key in SAME) for row in map(json.loads, lines(run)) if "loss" in row]


def wait_until(done: Callable[[], bool], launcher: subprocess.Popen[bytes], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not done() and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def kill_a_rank(draw: random.Random, launcher: subprocess.Popen[bytes], run: Path, killed: set[int]) -> None:
    """kill -9 of a rank drawn at random, some steps after the launcher started or restarted its processes.

    A row holds its step's duration, so a step that is made again is a line that was not there before.
    """
    wait_until(lambda: len(ranks_of(launcher)) == 2 and not killed & {*ranks_of(launcher).values()}, launcher)
    found, steps = set(lines(run)), draw.randint(2, 9)
    wait_until(lambda: len([line for line in lines(run) if line not in found]) >= steps, launcher)
    time.sleep(draw.uniform(0.0, 0.02))
    ranks = ranks_of(launcher)
    assert len(ranks) == 2, "the launcher ended before the kill"
    killed.update(ranks.values())
    os.kill(ranks[draw.randrange(2)], signal.SIGKILL)


def check_kills(run_config: Any, tmp_path: Path, kills: int, max_steps: int) -> None:
    common = {
        "train.max_steps": max_steps,
        "checkpoint.every": 3,
        "evaluation.at_start": False,
        "data.num_workers": 1,
        "parallel.strategy": "fsdp2",
    }
    straight, run = tmp_path / "straight", tmp_path / "run"
    straight.mkdir()
    with torchrun(run_config(**common, output_dir=str(straight / "run")), straight) as launcher:
        assert launcher.wait(timeout=600) == 0, (straight / "log").read_text()
    draw, killed = random.Random(0), set[int]()
    with torchrun(run_config(**common), tmp_path, (f"--max-restarts={kills}",)) as launcher:
        for _ in range(kills):
            kill_a_rank(draw, launcher, run, killed)
        assert launcher.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert len(killed) == 2 * kills
    assert trajectory(run) == trajectory(straight / "run")
    assert [row[0] for row in trajectory(run)] == list(range(1, max_steps + 1))
    assert published_steps(run / "checkpoints")[-1] == max_steps
    assert "damaged" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_killed_ranks_under_torchrun_equal_never_killed(run_config, tmp_path):
    """Bit for bit: two processes before and after, and a sum of two terms has one order."""
    check_kills(run_config, tmp_path, kills=2, max_steps=30)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_killed_ranks_under_torchrun_equal_never_killed(run_config, tmp_path):
    check_kills(run_config, tmp_path, kills=20, max_steps=200)
