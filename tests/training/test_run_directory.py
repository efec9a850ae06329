"""A run directory is never taken over by another run; what may change when a run goes on, changes."""

import errno
import gc
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import yaml

from llmnorm.config import load_run_config
from llmnorm.errors import UserError
from llmnorm.optim import create_schedule
from llmnorm.training import run_directory, train
from llmnorm.training.run_directory import RunDirectory

BASE = {
    "model.preset": "2m",
    "data.train_files": "text.txt",
    "data.tokenizer": "folder",
    "data.sequence_length": 32,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-3,
    "schedule.name": "wsd",
    "train.max_steps": 100,
    "train.global_batch_size": 8,
}


@pytest.fixture
def config(tmp_path):
    def build(**changes):
        return load_run_config(None, {**BASE, "output_dir": str(tmp_path / "run"), **changes})

    return build


def begin(config, step=1):
    """Leave what a run leaves that has published a checkpoint."""
    directory = RunDirectory(config)
    directory.create()
    (directory.checkpoints / f"step_{step}").mkdir(parents=True)
    return directory


def schedule_of(config):
    return create_schedule(max_steps=config.train.max_steps, **config.schedule.model_dump())


def test_the_same_config_is_accepted_and_recorded(config, tmp_path):
    RunDirectory(config())
    assert not (tmp_path / "run").exists(), "checking a directory must not create it"
    directory = begin(config())
    assert load_run_config(directory.config_file) == config()
    again = RunDirectory(config())
    assert again.changed == [] and list(again.notes()) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"optimizer.lr": 2e-3}, "optimizer.lr was 0.001 and is now 0.002"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"model.norm": "post_ln"}, "model.norm"),
        ({"data.train_files": "other.txt"}, "data.train_files"),
        ({"data.sequence_length": 64}, "data.sequence_length"),
        ({"train.global_batch_size": 16}, "train.global_batch_size"),
        ({"train.precision": "fp32"}, "train.precision"),
        ({"train.grad_clip": None}, "train.grad_clip"),
        ({"data.validation_fraction": 0.1}, "data.validation_fraction"),
    ],
)
def test_another_run_s_directory_is_refused_and_left_alone(config, change, word):
    begin(config())
    before = RunDirectory(config()).config_file.read_bytes()
    with pytest.raises(UserError, match="holds another run") as error:
        RunDirectory(config(**change))
    assert word in str(error.value) and "Set output_dir to a new folder" in str(error.value)
    assert RunDirectory(config()).config_file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"train.log_every": 10}, "changed since the run was started: train.log_every"),
        ({"checkpoint.every": 7}, "checkpoint.every"),
        ({"evaluation.at_start": False}, "evaluation.at_start"),
        ({"tracking": [{"name": "tensorboard"}]}, "tracking"),
        ({"guards.non_finite_limit": 9}, "guards.non_finite_limit"),
        ({"train.micro_batch_size": 2}, "equal up to rounding: train.micro_batch_size"),
        ({"train.compile": True}, "equal up to rounding: train.compile"),
        ({"parallel.strategy": "fsdp2"}, "equal up to rounding: parallel.strategy"),
    ],
)
def test_keys_off_the_trajectory_may_change_and_are_named(config, change, note):
    begin(config())
    directory = RunDirectory(config(**change))
    assert any(note in line for line in directory.notes())
    directory.create()
    assert RunDirectory(config(**change)).changed == []


def test_a_config_written_before_a_key_existed_is_the_same_run(config):
    directory = begin(config())
    recorded = yaml.safe_load(directory.config_file.read_text())
    del recorded["train"]["activation_checkpointing"], recorded["guards"], recorded["train"]["grad_clip"]
    directory.config_file.write_text(yaml.safe_dump(recorded))
    assert RunDirectory(config()).changed == []


def test_a_moved_directory_is_the_same_run(config, tmp_path):
    begin(config())
    (tmp_path / "run").rename(tmp_path / "moved")
    assert RunDirectory(config(output_dir=str(tmp_path / "moved"))).changed == ["output_dir"]


@pytest.mark.parametrize("done", [1, 80, 81])
def test_a_wsd_run_can_be_extended_before_its_decay(config, done):
    begin(config(), done)
    longer = config(**{"train.max_steps": 200})
    RunDirectory(longer).check_schedule(schedule_of(longer))


def test_a_run_cannot_be_extended_once_its_rate_would_have_been_another(config):
    begin(config(), 90)
    longer = config(**{"train.max_steps": 200})
    with pytest.raises(UserError, match=r"train\.max_steps changed.*update 82.*model\.init_from"):
        RunDirectory(longer).check_schedule(schedule_of(longer))


@pytest.mark.parametrize(("done", "refused"), [(6, False), (7, True)])
def test_a_cosine_run_can_be_extended_in_its_warm_up_only(config, done, refused):
    cosine = {"schedule.name": "cosine", "schedule.warmup_steps": 5}
    begin(config(**cosine), done)
    longer = config(**cosine, **{"train.max_steps": 200})
    with pytest.raises(UserError, match="update 7") if refused else nullcontext():
        RunDirectory(longer).check_schedule(schedule_of(longer))


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step_3/index.json"])
def test_a_run_without_its_config_is_refused(config, tmp_path, name):
    leftover = tmp_path / "run" / name
    leftover.parent.mkdir(parents=True)
    leftover.write_text("{}")
    with pytest.raises(UserError, match=r"holds metrics or checkpoints but no config\.yaml"):
        RunDirectory(config())


def test_an_attempt_that_never_made_a_step_is_no_run(config, tmp_path):
    RunDirectory(config()).create()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    other = RunDirectory(config(**{"optimizer.lr": 5e-3}))
    assert other.changed == []
    begin(config(**{"optimizer.lr": 5e-3}))
    with pytest.raises(UserError, match=r"optimizer\.lr was 0\.005"):
        RunDirectory(config())


def test_a_file_in_the_way_is_named(config, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(config())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_named(config, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="no permission to write"):
            RunDirectory(config())
    finally:
        tmp_path.chmod(0o700)


# Takes the lock as a run does, leaves a child behind as a killed run leaves its data workers, and waits.
HOLDS_THE_LOCK = """
import os, sys, time
from llmnorm.training.run_directory import RunDirectory
from llmnorm.config import load_run_config

directory = RunDirectory(load_run_config(sys.argv[1]))
assert directory.claim() is None
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


TRIES_THE_LOCK = """
import fcntl, sys

fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def test_a_second_run_is_refused_and_the_orphans_of_a_killed_one_are_not_in_its_way(
    config, tmp_path, monkeypatch
):
    """Real processes: while the holder lives its directory is taken, whatever its children do afterwards."""
    monkeypatch.setattr(run_directory, "_HANDOVER", 0.3)
    file = tmp_path / "config.yaml"
    file.write_text(config().to_yaml(), encoding="utf-8")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS_THE_LOCK, str(file)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    orphan = int(holder.stdout.readline())
    try:
        problem = RunDirectory(config()).claim()
        for part in (
            f"output_dir={tmp_path / 'run'} is in use",
            f"process {holder.pid} on",
            "set output_dir",
        ):
            assert part in problem
        holder.kill()
        holder.wait()
        os.kill(orphan, 0)  # still there
        second = RunDirectory(config())
        assert second.claim() is None
        assert second.files() == [] and f"process {os.getpid()} on" in second.lock_file.read_text()
    finally:
        holder.kill()
        os.kill(orphan, signal.SIGKILL)


def test_a_run_that_has_ended_does_not_end_the_claim_of_the_next_in_its_process(run_config, monkeypatch):
    """Record locks end when their process closes any file of that path, as a collector may at any time."""
    claimed = []
    claim = RunDirectory.claim
    monkeypatch.setattr(RunDirectory, "claim", lambda self: claimed.append(self) or claim(self))
    settings = run_config(**{"train.max_steps": 1, "evaluation.at_start": False})
    train(settings)
    directory = RunDirectory(settings)
    assert directory.claim() is None
    claimed.clear()  # the last that holds the first run's directory
    gc.collect()
    others = subprocess.run([sys.executable, "-c", TRIES_THE_LOCK, str(directory.lock_file)], timeout=60)
    assert others.returncode == 1, "another process took the directory"


def test_a_run_that_came_and_went_while_this_one_prepared_its_data_is_not_continued(config):
    """Whose directory it is, is asked again once nobody else can write there."""
    late, same = RunDirectory(config()), RunDirectory(config(**{"train.log_every": 7}))
    other = begin(config())
    assert same.claim() is None
    longer = RunDirectory(config(**{"train.max_steps": 200}))
    assert longer.claim() is None, "what the constructor has judged is not refused"
    for change, words in (
        ({"optimizer.lr": 2e-3}, "optimizer.lr was 0.002 and is now 0.001"),
        ({"train.max_steps": 50}, "train.max_steps was 50 and is now 100"),
    ):
        other.config_file.write_text(config(**change).to_yaml(), encoding="utf-8")
        assert f"holds another run: {words}" in late.claim()


def test_a_file_system_without_locks_is_said_and_not_refused(config, monkeypatch):
    def lockf(stream, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_directory.fcntl, "lockf", lockf)
    directory = RunDirectory(config())
    assert directory.claim() is None
    assert "file system without locks" in next(directory.notes())
