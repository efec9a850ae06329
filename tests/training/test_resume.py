"""Killed and started again equals never killed: real command and signals, data workers, background saves."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmnorm.checkpoint import newest_checkpoint, published_steps, read_state

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "tinyshakespeare" / "train.txt"
MAX_STEPS, EVERY = 100, 3
SAME = ("step", "tokens", "loss", "lr", "grad_norm")
SHARD = "shard-00000-of-00001.safetensors"


def start(config: Path, log: Path, *overrides: str, **options: Any) -> subprocess.Popen[bytes]:
    """`python train.py --config ...` in a process group of its own, as a shell starts it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "train.py", "--config", str(config), *overrides],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
            **options,
        )


def finish(config: Path, log: Path, *overrides: str, **options: Any) -> tuple[int, str]:
    """(exit code, output) of a command that nobody disturbs."""
    process = start(config, log, *overrides, **options)
    return process.wait(timeout=300), log.read_text(encoding="utf-8")


def lines(run: Path) -> list[str]:
    """Whole lines of metrics.jsonl; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def last_step(rows: list[str]) -> int:
    return json.loads(rows[-1])["step"] if rows else 0


def trajectory(run: Path) -> list[tuple[Any, ...]]:
    """The five fields that a restart must not change, of every row, in the file's order."""
    return [tuple(json.loads(line)[key] for key in SAME) for line in lines(run)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which names the process that claimed the run last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass
class Straight:
    """A run that nobody killed, and how to write the config of another one like it."""

    run: Path
    write_config: Callable[[Path], Path]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    (folder / "train.txt").write_text(SAMPLE.read_text(encoding="utf-8")[:20_000], encoding="utf-8")

    def write_config(run: Path) -> Path:
        path = run.with_suffix(".yaml")
        config = {
            "output_dir": str(run),
            "model": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "norm": "mix_ln",
            },
            "data": {
                "train_files": str(folder / "train.txt"),
                "tokenizer": {"train": "bpe", "vocab_size": 320},
                "sequence_length": 32,
                "prepared_dir": str(folder / "prepared"),
                "prepare_workers": 1,
                "num_workers": 1,
            },
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
            "schedule": {"name": "cosine", "warmup_steps": 4},
            "train": {
                "max_steps": MAX_STEPS,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "precision": "fp32",
            },
            "checkpoint": {"every": EVERY, "keep": 2, "asynchronous": True},
            "export": {"at_end": False},
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    run = folder / "run"
    code, output = finish(write_config(run), folder / "log")
    assert code == 0, output
    assert [row[0] for row in trajectory(run)] == list(range(1, MAX_STEPS + 1))
    return Straight(run, write_config)


class Life:
    """One start of the command, from the newest checkpoint to the signal that ends it."""

    def __init__(self, config: Path, run: Path, name: str) -> None:
        self.run, self.log = run, run.with_name(f"{name}.log")
        self.resumed_from = read_state(newest)["step"] if (newest := self.newest()) else 0
        self.found = lines(run)
        self.covered = [line for line in self.found if json.loads(line)["step"] <= self.resumed_from]
        self.process = start(config, self.log)
        self.started = time.monotonic()

    def newest(self) -> Path | None:
        return newest_checkpoint(self.run / "checkpoints")

    def made(self) -> list[str]:
        """The rows of this life: the killed one before may have left rows of the same steps."""
        known = set(self.found)
        return [line for line in lines(self.run) if line not in known]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while last_step(self.made()) < step and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)

    def end(self, number: signal.Signals, whole_group: bool = False) -> tuple[int, str]:
        (os.killpg if whole_group else os.kill)(self.process.pid, number)
        code = self.process.wait(timeout=120)
        return code, self.log.read_text(encoding="utf-8")

    def check_what_is_left(self) -> None:
        """The rows that the checkpoint covered stand as they were written: no step was made twice.

        A row holds its step's duration, so a row made again would differ.
        """
        assert lines(self.run)[: len(self.covered)] == self.covered
        # Each save waits for the one before, so at most the last one may be unfinished.
        if made := self.made():
            called = (last_step(made) - 1) // EVERY * EVERY
            newest = self.newest()
            assert (read_state(newest)["step"] if newest else 0) >= called - EVERY
        output = self.log.read_text(encoding="utf-8")
        assert "Traceback" not in output and "damaged" not in output, output


def kill_at_random(
    draw: random.Random, config: Path, run: Path, name: str, start_up: float | None = None
) -> float:
    """One life that ends by kill -9, some milliseconds after some step; or within its `start_up` seconds.

    Returns the seconds from the start to the kill.
    """
    life = Life(config, run, name)
    if start_up is None:
        life.wait_for_step(life.resumed_from + draw.randint(2, 9))
        time.sleep(draw.uniform(0.0, 0.02))
    else:
        time.sleep(draw.uniform(0.05, 1.0) * start_up)
    assert life.process.poll() is None, "the run was over before its kill"
    code, _ = life.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    life.check_what_is_left()
    return time.monotonic() - life.started


def test_killed_stopped_and_damaged_equals_never_killed(straight: Straight, tmp_path: Path) -> None:
    """Two kills, SIGTERM, a truncated newest checkpoint, Ctrl-C, and on to the end: the same rows exactly."""
    run = tmp_path / "run"
    config = straight.write_config(run)
    draw = random.Random(0)
    for kill in range(2):
        kill_at_random(draw, config, run, f"kill{kill}")

    life = Life(config, run, "sigterm")
    life.wait_for_step(life.resumed_from + 4)
    code, output = life.end(signal.SIGTERM)
    assert code == 0, output
    assert f"going on after step {life.resumed_from} from" in output
    stopped_at = last_step(lines(run))
    assert f"stopped by SIGTERM after step {stopped_at}" in output
    assert life.newest() == run / "checkpoints" / f"step_{stopped_at}"
    life.check_what_is_left()

    shard = run / "checkpoints" / f"step_{stopped_at}" / SHARD
    shard.write_bytes(shard.read_bytes()[:-100])
    life = Life(config, run, "ctrl-c")
    assert life.resumed_from < stopped_at
    life.wait_for_step(stopped_at + 4)
    code, output = life.end(signal.SIGINT, whole_group=True)
    assert code == 0, output
    assert f"step_{stopped_at}: {SHARD} is truncated" in output
    assert f"going on after step {life.resumed_from} from" in output
    stopped_at = last_step(lines(run))
    assert f"stopped by SIGINT after step {stopped_at}" in output

    code, output = finish(config, tmp_path / "log")
    assert code == 0, output
    assert f"going on after step {stopped_at} from" in output
    assert trajectory(run) == trajectory(straight.run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_moments_equal_never_killed(straight: Straight, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = straight.write_config(run)
    draw = random.Random(1)
    while_starting = set(draw.sample(range(1, 10), 3))
    start_up = kill_at_random(draw, config, run, "kill0")
    for kill in range(1, 10):
        kill_at_random(draw, config, run, f"kill{kill}", start_up if kill in while_starting else None)
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    resumed_from = read_state(newest)["step"]
    code, output = finish(config, tmp_path / "log")
    assert code == 0, output
    assert f"going on after step {resumed_from} from" in output
    assert trajectory(run) == trajectory(straight.run)
    assert published_steps(run / "checkpoints") == [99, 100]


def copy_of(straight: Straight, tmp_path: Path) -> tuple[Path, Path]:
    """(config, run directory) of a copy of the finished run, two steps short of its end."""
    run = tmp_path / "run"
    shutil.copytree(straight.run, run)
    shutil.rmtree(run / "checkpoints" / f"step_{MAX_STEPS}")
    config = straight.write_config(run)
    recorded = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(recorded.replace(str(straight.run), str(run)), encoding="utf-8")
    return config, run


def test_a_full_disk_ends_the_run_and_spares_the_old_checkpoint(straight: Straight, tmp_path: Path) -> None:
    """No file may grow beyond half a checkpoint: exit code 2, one paragraph, the old one as it was."""
    config, run = copy_of(straight, tmp_path)
    before = contents(run / "checkpoints")
    limit = len(before[f"step_99/{SHARD}"]) // 2
    code, output = finish(
        config,
        tmp_path / "log",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert code == 2, output
    assert "Traceback" not in output
    paragraph = next(line for line in output.splitlines() if line.startswith("error: "))
    for part in ("checkpoint of step 100", "File too large", "step_99", "untouched", "output_dir"):
        assert part in paragraph
    assert contents(run / "checkpoints") == before


def refused(config: Path, run: Path, tmp_path: Path, *overrides: str) -> str:
    """The paragraph of a command that must end with exit code 2 and leave the run as it was."""
    before = contents(run)
    code, output = finish(config, tmp_path / "log", *overrides)
    assert code == 2, output
    assert "Traceback" not in output
    assert contents(run) == before
    return next(line for line in output.splitlines() if line.startswith("error: "))


def test_a_changed_model_shape_is_refused(straight: Straight, tmp_path: Path) -> None:
    """The checkpoints of another model under this run's config: named by tensor and both shapes."""
    config, run = copy_of(straight, tmp_path)
    changed = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    changed["model"]["intermediate_size"] = 96
    (run / "config.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    before = contents(run / "checkpoints")
    code, output = finish(config, tmp_path / "log", "--model.intermediate_size", "96")
    assert code == 2, output
    paragraph = next(line for line in output.splitlines() if line.startswith("error: "))
    for part in ("mlp", "[64, 32]", "[96, 32]", "step_99", "output_dir"):
        assert part in paragraph
    assert contents(run / "checkpoints") == before
    assert trajectory(run) == trajectory(straight.run)


@pytest.mark.slow
def test_another_runs_directory_is_refused(straight: Straight, tmp_path: Path) -> None:
    config, run = copy_of(straight, tmp_path)
    paragraph = refused(config, run, tmp_path, "--model.intermediate_size", "96", "--seed", "1")
    for part in (str(run), "another run", "model.intermediate_size was 64 and is now 96", "seed"):
        assert part in paragraph


@pytest.mark.slow
def test_only_damaged_checkpoints_are_an_error_that_names_them(straight: Straight, tmp_path: Path) -> None:
    config, run = copy_of(straight, tmp_path)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
    paragraph = refused(config, run, tmp_path)
    assert "no intact checkpoint is left" in paragraph and "step_99: state.json is missing" in paragraph
