"""Writes are whole or absent, and a lock passes on when its holder dies."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from llmnorm.data import durable
from llmnorm.data.durable import exclusive, give_way, write_durably
from llmnorm.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from llmnorm.data.durable import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    write_durably(tmp_path / "a", b"old")

    def full(stream):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OSError, match="No space"):
        write_durably(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_lock_is_exclusive_until_its_holder_is_killed(tmp_path, holder):
    # In a process that waits for the lock, what comes after it comes after the kill.
    waiting = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    time.sleep(0.3)
    killed = time.monotonic()
    holder.kill()
    assert waiting.stdout is not None and waiting.stdout.readline() == b"held\n"
    assert time.monotonic() - killed < 5
    waiting.kill()
    waiting.wait()
    with exclusive(tmp_path / "lock"):
        pass


def test_others_wait_for_the_first_process_but_not_for_ever(tmp_path, holder, monkeypatch):
    start = time.monotonic()
    give_way(tmp_path / "lock", lambda: False)  # held: its holder is at work
    give_way(tmp_path / "none", lambda: True)  # done
    assert time.monotonic() - start < 2
    monkeypatch.setattr(durable, "GRACE_SECONDS", 0.3)
    start = time.monotonic()
    give_way(tmp_path / "none", lambda: False)  # nobody came
    assert 0.3 <= time.monotonic() - start < 3


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(stream, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(durable.fcntl, "flock", flock)
    with (
        pytest.raises(UserError, match=r"without file locks; set data.prepared_dir to a local disk"),
        exclusive(tmp_path / "lock"),
    ):
        pass
