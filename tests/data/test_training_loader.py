"""Batches are the same for any number of workers and processes, from any position; workers end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from llmnorm.data import StepBatch, TrainingSamples, training_loader
from llmnorm.data.loader import _report_unless_alone
from llmnorm.errors import UserError


@pytest.fixture
def samples(dataset) -> TrainingSamples:
    return TrainingSamples(dataset, 16, document_masking=True, seed=4)


def steps(samples, count, start=0, **options) -> list[StepBatch]:
    options = {"global_batch_size": 12, "micro_batch_size": 3, "num_workers": 0, **options}
    loader = training_loader(samples, start=start, **options)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def rows_of(batches: list[StepBatch], name: str = "input_ids") -> torch.Tensor:
    return torch.cat([micro[name] for batch in batches for micro in batch.micro_batches])


def test_a_step_holds_the_samples_of_its_positions(samples):
    first, second = steps(samples, 2, start=24)
    assert (first.first, second.first) == (24, 36)
    assert len(second.micro_batches) == 4
    expected = samples.batch(np.arange(36, 48))
    for m, micro in enumerate(second.micro_batches):
        assert set(micro) == {"input_ids", "labels", "position_ids"}
        for name, tensor in micro.items():
            assert tensor.shape == (3, 16) and tensor.dtype == torch.int64
            assert np.array_equal(tensor, expected[name][3 * m : 3 * m + 3])


def test_each_rank_reads_the_rows_of_the_formula(samples):
    for rank in range(2):
        (batch,) = steps(samples, 1, start=12, rank=rank, world_size=2)
        assert len(batch.micro_batches) == 2
        for m, micro in enumerate(batch.micro_batches):
            positions = 12 + (m * 2 + rank) * 3 + np.arange(3)
            assert np.array_equal(micro["labels"], samples.batch(positions)["labels"])


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size"), [(1, 12), (1, 1), (2, 3), (3, 2), (4, 3), (12, 1)]
)
def test_a_step_is_the_same_samples_however_it_is_split(samples, world_size, micro_batch_size):
    whole = samples.batch(np.arange(24, 36))["input_ids"]
    parts = [
        steps(samples, 1, start=24, rank=r, world_size=world_size, micro_batch_size=micro_batch_size)[0]
        for r in range(world_size)
    ]
    # In the order of the formula: micro-batch by micro-batch over the ranks.
    rows = [
        micro["input_ids"]
        for micros in zip(*(p.micro_batches for p in parts), strict=True)
        for micro in micros
    ]
    assert np.array_equal(torch.cat(rows), whole)


def test_the_number_of_workers_changes_nothing(samples):
    expected = steps(samples, 7, start=12)
    for num_workers in (1, 2):
        found = steps(samples, 7, start=12, num_workers=num_workers)
        assert [batch.first for batch in found] == [batch.first for batch in expected]
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(rows_of(found, name), rows_of(expected, name))


def test_a_start_in_the_middle_goes_on_with_the_same_batches(samples):
    straight = steps(samples, 10)
    assert torch.equal(rows_of(steps(samples, 4, start=72)), rows_of(straight[6:]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_torchs_global_generator_is_left_alone(samples, num_workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    steps(samples, 2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_sizes_that_do_not_divide(samples):
    with pytest.raises(
        UserError, match=r"train.global_batch_size=12 is not a multiple of .*=5 x 1 processes"
    ):
        steps(samples, 1, micro_batch_size=5)


def test_after_close_there_are_no_batches_and_no_workers(samples):
    loader = training_loader(samples, start=0, global_batch_size=12, micro_batch_size=3, num_workers=2)
    next(loader)
    workers = [worker.pid for worker in loader.workers]
    assert len(workers) == 2
    loader.close()
    assert list(loader) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


SCRIPT = """
import os, sys, time
from llmnorm.data import TokenDataset, TrainingSamples, training_loader
samples = TrainingSamples(TokenDataset.open(sys.argv[1]), 16)
loader = training_loader(samples, start=0, global_batch_size=8, micro_batch_size=8, num_workers=2)
next(loader)
print(*(worker.pid for worker in loader.workers), flush=True)
if sys.argv[2] == "ends":
    sys.exit(3)
if sys.argv[2] == "goes on":
    sys.stdin.readline()
    for _ in range(50):
        next(loader)
    sys.exit(4)
time.sleep(60)
"""


def started(dataset, ending: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    command = [sys.executable, "-c", SCRIPT, str(dataset.folder), ending]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def wait_until_gone(pids: list[int], seconds: float) -> None:
    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + seconds
    while any(map(runs, pids)):
        assert time.monotonic() < deadline, f"worker processes are left: {pids}"
        time.sleep(0.02)


def test_workers_end_with_a_parent_that_exits_without_closing(dataset):
    process, workers = started(dataset, "ends")
    assert process.wait(timeout=20) == 3
    wait_until_gone(workers, 1)


def test_a_worker_that_dies_is_an_error_and_the_process_ends(dataset):
    process, workers = started(dataset, "goes on")
    os.kill(workers[0], signal.SIGKILL)
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 1
    wait_until_gone(workers, 1)


def test_workers_end_with_a_killed_parent(dataset):
    process, workers = started(dataset, "sleeps")
    process.kill()
    process.wait()
    wait_until_gone(workers, 15)  # torch looks every 5 seconds whether the parent is there


def test_signals_to_the_group_do_not_take_the_workers_from_the_parent(dataset):
    process, workers = started(dataset, "goes on")
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in workers:
            os.kill(pid, number)
    process.communicate(b"\n", timeout=30)
    assert process.returncode == 4
    wait_until_gone(workers, 1)


def test_a_worker_reports_errors_but_not_the_connection_of_a_parent_that_is_gone():
    said = []
    report = partial(_report_unless_alone, lambda kind, error, trace: said.append(kind))
    report(os.getppid(), KeyError, KeyError("x"), None)
    report(os.getppid(), ConnectionResetError, ConnectionResetError(), None)
    report(-1, KeyError, KeyError("x"), None)
    assert said == [KeyError, ConnectionResetError, KeyError]
    # No process has the id -1: the parent counts as gone.
    alone = multiprocessing.get_context("fork").Process(
        target=report, args=(-1, ConnectionResetError, ConnectionResetError(), None)
    )
    alone.start()
    alone.join(30)
    assert alone.exitcode == 1
