"""Checkpoints appear whole or not at all; the old ones outlive every failure."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmnorm.checkpoint import CheckpointStore, load_full, newest_checkpoint, read_state
from llmnorm.checkpoint import format as format_module
from llmnorm.checkpoint import store as store_module
from llmnorm.errors import UserError

WEIGHT = {"model/w": torch.arange(6.0).reshape(2, 3)}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def steps(directory: Path) -> list[int]:
    assert all(name.removeprefix("step_").isdigit() for name in names(directory)), names(directory)
    return sorted(int(name.removeprefix("step_")) for name in names(directory))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (1, None, [120]),
        (3, None, [100, 110, 120]),
        (2, 50, [50, 100, 110, 120]),
        (2, 40, [40, 80, 110, 120]),
        (20, None, [*range(10, 121, 10)]),
    ],
)
def test_keep_rule(
    tmp_path: Path, asynchronous: bool, keep: int, keep_every: int | None, left: list[int]
) -> None:
    store = CheckpointStore(tmp_path, keep=keep, keep_every=keep_every, asynchronous=asynchronous)
    for step in range(10, 121, 10):
        store.save(step, WEIGHT, {"step": step})
    store.wait()
    assert steps(tmp_path) == left
    assert read_state(tmp_path / "step_120") == {"step": 120}


def test_the_old_one_is_deleted_only_after_the_new_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1, asynchronous=False)
    store.save(1, WEIGHT, {})
    events: list[tuple[str, list[str]]] = []
    for module, function in [(shutil, "rmtree"), (store_module, "sync_directory")]:
        original = getattr(module, function)

        def watched(path, *args, original=original, function=function, **kwargs):
            events.append((f"{function} {Path(path).name.split('-')[0]}", names(tmp_path)))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(module, function, watched)
    store.save(2, WEIGHT, {})
    order = [event for event, _ in events]
    parent = f"sync_directory {tmp_path.name.split('-')[0]}"
    assert order == ["sync_directory step_2.tmp", parent, "rmtree step_1.del"]
    # The parent is flushed, with both standing, before anything is removed.
    assert events[1][1] == ["step_1", "step_2"]
    assert names(tmp_path) == ["step_2"]


def test_every_file_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".tmp")[0])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    CheckpointStore(tmp_path, asynchronous=False).save(5, WEIGHT, {}, {"config.yaml": ""})
    shard = "shard-00000-of-00001.safetensors"
    assert flushed == [shard, "config.yaml", "state.json", "index.json", "step_5", tmp_path.name]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, asynchronous=False)
    store.save(1, WEIGHT, {"attempt": 1})
    store.save(1, {"model/w": torch.zeros(2, 3)}, {"attempt": 2})
    assert names(tmp_path) == ["step_1"]
    assert read_state(tmp_path / "step_1") == {"attempt": 2}
    assert store.newest() == tmp_path / "step_1"


def test_start_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    """Temporaries and half-deleted ones go; one set aside for a replacement that never came returns."""
    store = CheckpointStore(tmp_path, asynchronous=False)
    for step in (1, 2, 3):
        store.save(step, WEIGHT, {"step": step})
    (tmp_path / "step_2").rename(tmp_path / "step_2.old-0a1b2c3d")
    shutil.copytree(tmp_path / "step_3", tmp_path / "step_3.old-0a1b2c3d")
    (tmp_path / "step_1").rename(tmp_path / "step_1.del-0a1b2c3d")
    (tmp_path / "step_4.tmp-0a1b2c3d").mkdir()
    (tmp_path / "step_4.tmp-0a1b2c3d" / "shard-00000-of-00001.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    reopened = CheckpointStore(tmp_path)
    assert names(tmp_path) == ["notes", "step_2", "step_3"]
    assert reopened.newest() == tmp_path / "step_3"
    assert read_state(tmp_path / "step_2") == {"step": 2}


def test_discard_newer_after_a_roll_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9, asynchronous=True)
    for step in (10, 20, 30, 40):
        store.save(step, WEIGHT, {})
    store.discard_newer(20)
    assert steps(tmp_path) == [10, 20]
    assert store.newest() == tmp_path / "step_20"


def fill_disk(monkeypatch: pytest.MonkeyPatch, file_name: str) -> None:
    """Let the disk be full in the middle of the new file called `file_name`."""
    original = Path.open

    def opened(path: Path, *args, **kwargs):
        file = original(path, *args, **kwargs)
        return FullFile(file) if path.name == file_name and "x" in args[0] else file

    monkeypatch.setattr(format_module.Path, "open", opened)


class FullFile:
    def __init__(self, file) -> None:
        self.file = file

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, data) -> int:
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("file_name", ["shard-00000-of-00001.safetensors", "state.json", "index.json"])
def test_disk_full_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, file_name: str
) -> None:
    store = CheckpointStore(tmp_path, keep=1, asynchronous=asynchronous)
    store.save(10, WEIGHT, {"step": 10})
    store.wait()
    with monkeypatch.context() as patch:
        fill_disk(patch, file_name)
        with pytest.raises(UserError) as caught:
            store.save(20, WEIGHT, {"step": 20})
            store.wait()
    message = str(caught.value)
    for part in (
        "step 20",
        str(tmp_path),
        "No space left on device",
        file_name,
        "step_10",
        "checkpoint.keep",
    ):
        assert part in message, message
    assert names(tmp_path) == ["step_10"]
    assert store.newest() == tmp_path / "step_10"
    # The error is raised once; with space again, saving works.
    store.save(30, WEIGHT, {"step": 30})
    store.wait()
    assert names(tmp_path) == ["step_30"]


def test_a_background_failure_surfaces_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, asynchronous=True)
    with monkeypatch.context() as patch:
        fill_disk(patch, "state.json")
        store.save(1, WEIGHT, {})
        store._writer.join()
    with pytest.raises(UserError, match=r"checkpoint of step 1 could not be written.*No space left"):
        store.save(2, WEIGHT, {})
    assert names(tmp_path) == []


def test_a_defect_in_the_writer_is_not_called_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args):
        raise ZeroDivisionError("a bug")

    store = CheckpointStore(tmp_path, asynchronous=True)
    monkeypatch.setattr(store_module, "write_shard", broken)
    store.save(1, WEIGHT, {})
    with pytest.raises(ZeroDivisionError, match="a bug"):
        store.wait()
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """1 MiB of disk: a checkpoint of 0.4 MB fits, a second beside it fits, one of 4 MB does not."""
    store = CheckpointStore(small_disk / "run" / "checkpoints", keep=1, asynchronous=True)
    small = {"model/w": torch.full((100_000,), 1.5)}
    store.save(1, small, {})
    store.save(2, small, {})
    store.save(3, {"model/w": torch.zeros(1_000_000)}, {})
    with pytest.raises(UserError, match=r"step 3 .*No space left on device.*step_2.*free space"):
        store.wait()
    assert names(store.directory) == ["step_2"]
    assert torch.equal(load_full(store.newest())["w"], small["model/w"])


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, asynchronous=True)
    store.save(1, WEIGHT, {})
    store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        store.save(2, {"model/w": torch.zeros(1_000_000)}, {})
        with pytest.raises(UserError, match=r"step 2 .*File too large.*step_1.*set output_dir"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_1"]


def test_a_place_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    """A file where a folder should be, and /proc, refuse writing even to root."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*/file/checkpoints: Not a directory"):
        CheckpointStore(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match=r"cannot be written to .*/file: File exists.*set output_dir"):
        CheckpointStore(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written to /proc/llmnorm"):
        CheckpointStore("/proc/llmnorm")


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")
def test_no_permission_is_said_at_the_start() -> None:
    """As an ordinary user, in a folder of root's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.seteuid(65534)
                CheckpointStore(folder / "checkpoints")
            except UserError as error:
                told = "Permission denied" in str(error) and "set output_dir" in str(error)
                status = 0 if told else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert names(folder) == []


def test_the_interpreter_finishes_a_save_before_it_ends(tmp_path: Path) -> None:
    """Ending without `wait` (an exception elsewhere) must not lose the checkpoint in flight."""
    code = f"""
        import torch
        from llmnorm.checkpoint import CheckpointStore
        store = CheckpointStore({str(tmp_path)!r}, asynchronous=True)
        store.save(1, {{"model/w": torch.ones(3_000_000)}}, {{}})
        raise SystemExit(3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == 3
    assert newest_checkpoint(tmp_path) == tmp_path / "step_1"


def test_saves_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second `save` waits: the host copies of the first are still being written."""
    running, most = 0, 0
    write_shard, lock = store_module.write_shard, threading.Lock()

    def counted(*args):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        record = write_shard(*args)
        with lock:
            running -= 1
        return record

    monkeypatch.setattr(store_module, "write_shard", counted)
    store = CheckpointStore(tmp_path, keep=9, asynchronous=True)
    for step in range(1, 6):
        store.save(step, {"model/w": torch.full((200_000,), float(step))}, {})
    store.wait()
    assert most == 1
    for step in range(1, 6):
        assert load_full(tmp_path / f"step_{step}")["w"].eq(step).all()


KILLED = """
    import json, os, random, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from llmnorm.checkpoint import CheckpointStore, load_full, read_state

    directory, asynchronous, kills = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
    draw = random.Random(0)
    report = []
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            store = CheckpointStore(directory, keep=2, asynchronous=asynchronous)
            newest = store.newest()
            step = read_state(newest)["step"] if newest else 0
            while True:
                step += 1
                tensors = {f"model/{i}": torch.full((50_000,), float(step)) for i in range(8)}
                store.save(step, tensors, {"step": step}, {"config.yaml": "seed: 0"})
                published = step - 1 if asynchronous else step
                os.write(writing, published.to_bytes(8, "little"))
        os.close(writing)
        told = b""
        for _ in range(draw.randint(2, 5)):
            told += os.read(reading, 8)
        time.sleep(draw.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(reading, 1 << 16):
            told += part
        left = sorted(os.listdir(directory))
        store = CheckpointStore(directory, keep=2)
        newest = store.newest()
        report.append({
            "promised": int.from_bytes(told[-8:], "little"),
            "found": read_state(newest)["step"] if newest else 0,
            "values": sorted({v for t in load_full(newest).values() for v in t.tolist()}) if newest else [],
            "left": left,
            "cleaned": sorted(os.listdir(directory)),
        })
    print(json.dumps(report))
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kill_9_at_random_moments_leaves_the_newest_intact(tmp_path: Path, asynchronous: bool) -> None:
    """A process that saves without pause is killed 12 times, and each time another goes on from there."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, str(asynchronous), "12"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr, done.stderr
    report = json.loads(done.stdout)
    assert len(report) == 12
    for row in report:
        assert row["found"] >= row["promised"], row
        assert row["values"] == [float(row["found"])] if row["found"] else row["values"] == []
        assert all(name.removeprefix("step_").isdigit() for name in row["cleaned"])
        assert len(row["cleaned"]) <= 3
    assert report[-1]["found"] >= 12
    # The kills did hit the middle of saves, or this test would prove nothing.
    assert sum(any(".tmp-" in name for name in row["left"]) for row in report) >= 3, report
