"""A run that stands still names the process and the step, shows every stack, and ends.

Each process notes what it is about to do; the hot path pays for one assignment. A thread looks at the note a
few times per `train.hang_timeout` and shows it to the other processes through the launcher's store. When the
note has not changed for that long, every process writes where it stands and the stacks of its threads to
stderr and exits with code 3, so that the launcher ends (or restarts) the rest.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from llmnorm.launcher import launcher_store
from llmnorm.training.processes import PATIENCE

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT_CODE = 3
_STDERR = 2
_LOOKS = 8  # per timeout
_LONGEST_INTERVAL = 5.0  # seconds: what others know of a process is no older
_LATE = 10.0  # seconds that a busy machine may keep the thread waiting
_SLACK = 30.0  # seconds that the thread is late before faulthandler's own takes over


@dataclass(frozen=True)
class _Note:
    """What a process was about to do at `since` (seconds of the monotonic clock), its `count`-th act."""

    count: int
    step: int
    act: str
    limit: float
    since: float


class Watchdog:
    """Ends this process once it has been at one act of the loop for `timeout` seconds.

    timeout: seconds, None for no watching. launch: a name that this start of the run shares with no other, as
    the launcher's store outlives a start. Acts whose length depends on sizes and disks rather than on the
    step (compiling, evaluating, saving) get the longer of `timeout` and four hours.

    All processes do the same acts in the same order, so the one with the fewest behind it is the one that
    the others wait for, and is named.
    """

    def __init__(self, timeout: float | None, rank: int = 0, world_size: int = 1, launch: str = "") -> None:
        self.timeout = timeout
        self.rank = rank
        self.world_size = world_size
        self.launch = launch
        self._interval = min((timeout or 0.0) / _LOOKS, _LONGEST_INTERVAL)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._note = _Note(0, 0, "starting", PATIENCE.total_seconds(), time.monotonic())

    def at(self, step: int, act: str, *, patient: bool = False) -> None:
        """Note that this process is about to do `act` for `step`; `patient` for what may take long."""
        if self.timeout is None:
            return
        limit = max(PATIENCE.total_seconds(), self.timeout) if patient else self.timeout
        self._note = _Note(self._note.count + 1, step, act, limit, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self.timeout is not None:
            self.at(self._note.step, "starting", patient=True)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        if self.world_size > 1:
            self._store = launcher_store(f"watchdog/{self.launch}", seconds=10, or_rank_0s=True)
            self._tell_others(self._note, 0.0)  # or one that stops before the first look has never begun
        while not self._ended.wait(self._interval):
            note = self._note
            stood = time.monotonic() - note.since
            # A call that hangs while it holds the interpreter's lock stops this thread too.
            faulthandler.dump_traceback_later(max(note.limit - stood, 0) + _SLACK, exit=True, file=_STDERR)
            alarmed = self._tell_others(note, stood)
            if stood >= note.limit or alarmed:
                self._end(note, stood)

    def _tell_others(self, note: _Note, stood: float) -> bool:
        """Show the note to the others; whether one of them has found that the run stands still."""
        if self._store is None:
            return False
        try:
            shown = [note.count, note.step, note.act, round(stood), time.time()]
            self._store.set(str(self.rank), json.dumps(shown))
            return self._store.check(["alarm"])
        except RuntimeError:
            self._store = None  # the launcher is gone, or another machine is
            return False

    def _end(self, note: _Note, stood: float) -> None:
        first = f"rank {self.rank} of {self.world_size} (process {os.getpid()} on {socket.gethostname()})"
        self._raise_alarm()
        if self._ended.is_set():
            return
        limit = f"train.hang_timeout={self.timeout:g}"
        if note.limit != self.timeout:
            limit += f", and {note.limit:g} s for what may take long"
        text = (
            f"\nerror: {first} stands still: step {note.step}, {note.act} for {stood:.0f} s ({limit}).\n"
            f"{''.join(self._others())}"
            "This process ends. The same command started again goes on from the newest checkpoint; raise "
            "train.hang_timeout if nothing was wrong.\nIts threads:\n"
        )
        os.write(_STDERR, text.encode())
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        if self._store is not None:
            time.sleep(2 * self._interval)  # the launcher ends the others as soon as one process has ended
        os._exit(EXIT_CODE)

    def _raise_alarm(self) -> None:
        """Make the others write where they stand too, and wait until they have shown it."""
        if self._store is None:
            return
        try:
            self._store.set("alarm", str(self.rank))
        except RuntimeError:
            self._store = None
        time.sleep(2 * self._interval)

    def _others(self) -> list[str]:
        """A line for each process that the others wait for, or one that says that it cannot be told."""
        if self._store is None:
            return []
        keys = [str(rank) for rank in range(self.world_size)]
        try:
            if self._store.check(keys):
                shown = self._store.multi_get(keys)
            else:
                shown = [self._store.get(key) if self._store.check([key]) else b"" for key in keys]
        except RuntimeError:
            return []
        notes = [json.loads(text) if text else None for text in shown]
        furthest = max((note[0] for note in notes if note), default=0)
        lines = []
        for rank, note in enumerate(notes):
            if note is None:
                lines.append(f"Rank {rank} has not begun to train.\n")
                continue
            count, step, act, seconds, seen = note
            silent = time.time() - seen
            if silent > 4 * self._interval + _LATE:
                lines.append(f"Rank {rank} is silent for {silent:.0f} s, since step {step}, {act}.\n")
            elif count < furthest:
                lines.append(f"The others wait for rank {rank}: step {step}, {act} for {seconds} s.\n")
        return lines or ["All processes are at the same act; their stacks tell which waits for which.\n"]
