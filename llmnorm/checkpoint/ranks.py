"""How the processes of a run agree about a checkpoint."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger("llmnorm.checkpoint")


class SaveFailed(Exception):
    """Some rank could not do its part; `failures` holds one `{"rank", "text", "errno", ...}` for each."""

    def __init__(self, failures: list[dict[str, Any]]) -> None:
        self.failures = failures
        super().__init__("; ".join(failure["text"] for failure in failures))


def _describe(error: Exception, rank: int) -> dict[str, Any]:
    if isinstance(error, OSError):
        text = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    else:
        text = f"{type(error).__name__}: {error}"
    return {
        "rank": rank,
        "text": text,
        "system": isinstance(error, OSError),
        "errno": getattr(error, "errno", None),
    }


class Ranks:
    """Exchanges small JSON messages between all processes, on a process group of its own.

    The writer thread talks while the training thread communicates, and collectives of one group must not run
    from two threads. A second gloo group is used rather than marker files in the checkpoint directory because
    network file systems may show a new file to other machines seconds late, and because a died peer is an
    error at once instead of a file that never comes. Messages are JSON bytes, so that nothing is pickled here
    either.

    Collective: with several processes, all of them must construct it, and in the same order as other groups.
    """

    def __init__(self) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.world_size = dist.get_world_size() if started else 1
        self._group = None
        if self.world_size > 1:
            # Longer than the slowest disk: ranks wait here while others write hundreds of gigabytes.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=4))

    def exchange(self, message: Any) -> list[Any]:
        """Every rank's message, in rank order."""
        if self._group is None:
            return [message]
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([data.numel()], device="cpu"), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
        padded[: data.numel()] = data
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self._group)
        return [
            json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)
        ]

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every rank and return every rank's (JSON) result; a failure of one rank is raised on
        all.

        Raises SaveFailed for failures of the file system, and the original exception (RuntimeError on the
        other ranks) for anything else.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        answers = self.exchange([result, _describe(failure, self.rank) if failure else None])
        failures = [problem for _, problem in answers if problem]
        if failure is not None and not isinstance(failure, OSError):
            raise failure
        if not all(problem["system"] for problem in failures):
            raise RuntimeError("; ".join(f"rank {p['rank']}: {p['text']}" for p in failures))
        if failures:
            raise SaveFailed(failures) from failure
        return [result for result, _ in answers]


REMEDIES = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "free space there, lower checkpoint.keep, or set output_dir to another disk",
) | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
    "make that path a folder this user may write to, or set output_dir to one",
)
