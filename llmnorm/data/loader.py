"""Batches read ahead by worker processes, from any position on."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llmnorm.data.batches import BatchShape, StepBatch
from llmnorm.data.samples import TrainingSamples
from llmnorm.data.stream import StreamedSteps, StreamingSamples
from llmnorm.errors import UserError


class Steps(Dataset[StepBatch]):
    """The steps of a `TrainingSamples`, keyed by the position of their first sample."""

    def __init__(self, samples: TrainingSamples, shape: BatchShape) -> None:
        self._samples, self._shape = samples, shape

    def __getitem__(self, first: int) -> StepBatch:
        return self._shape.step(first, self._samples.batch(self._shape.positions(first)))


class TrainingLoader(Iterator[StepBatch]):
    """The steps from position `start` on, without end. `close` ends its worker processes."""

    def __init__(self, loader: DataLoader[StepBatch]) -> None:
        others = set(multiprocessing.active_children())
        self._steps: list[Iterator[StepBatch]] = [iter(loader)]
        self.workers = [child for child in multiprocessing.active_children() if child not in others]
        self._finalizer = weakref.finalize(self, _end, self._steps, self.workers)

    def __next__(self) -> StepBatch:
        if not self._steps:
            raise StopIteration
        step = next(self._steps[0])
        if isinstance(step, UserError):
            raise step
        return step

    def close(self) -> None:
        self._finalizer()


def _end(steps: list[Iterator[StepBatch]], workers: list[multiprocessing.process.BaseProcess]) -> None:
    """End a loader's workers: by torch's own way if nothing else holds its iterator, as a traceback may."""
    steps.clear()
    for worker in workers:
        # At exit Python would end them by SIGTERM, which they have blocked, and wait for ever. Torch's
        # handler of SIGCHLD raises for a worker that was killed.
        with suppress(RuntimeError):
            if worker.is_alive():
                worker.kill()
            worker.join()


def _end_without(parent: int, worker: int) -> None:
    """End a worker whose parent died before torch began to watch for that: it would wait for ever."""
    if os.getppid() != parent:
        os._exit(1)
    sys.excepthook = partial(_report_unless_alone, sys.excepthook, parent)


def _report_unless_alone(
    report: Callable[..., Any], parent: int, kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    """A parent that is killed while it fetches a batch resets the connection: no news, so the worker ends."""
    if isinstance(error, ConnectionError | EOFError):
        for _ in range(100):  # its sockets close a moment before it is gone
            if os.getppid() != parent:
                os._exit(1)
            time.sleep(0.01)
    report(kind, error, trace)


def training_loader(
    samples: TrainingSamples | StreamingSamples,
    *,
    start: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 1,
    pin_memory: bool = False,
) -> TrainingLoader:
    """The steps of `samples` from position `start` on, for one rank; the same for every `num_workers`.

    start: the number of samples the run has read, in updates of any size; a run that resumes needs no more.
    num_workers: processes that read ahead, two steps each; 0 reads in line.
    Raises `UserError` if the batch sizes do not divide, or a stream should have several workers.
    """
    shape = BatchShape(global_batch_size, micro_batch_size, rank, world_size)
    dataset: Dataset[StepBatch]
    keys: Iterable[int] | None
    if isinstance(samples, StreamingSamples):
        if num_workers > 1:
            raise UserError(
                f"data.num_workers={num_workers}: with data.streaming=true each process reads one stream; "
                "set data.num_workers to 0 or 1"
            )
        dataset, keys = StreamedSteps(samples, shape, start), None
    else:
        dataset, keys = Steps(samples, shape), range(start, sys.maxsize, global_batch_size)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=partial(_end_without, os.getpid()),
        # Without one of its own the loader draws from torch's global generator, and so changes a resumed run.
        generator=torch.Generator(),
    )
    # Ctrl-C and a scheduler's SIGTERM reach the whole group. A worker that died of one would make torch
    # raise in this process, in the middle of saving its checkpoint; so workers are born with them blocked.
    # When this process is gone they notice and end.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return TrainingLoader(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
