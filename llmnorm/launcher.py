"""What processes of one launch say to each other, and to the person who launched them, when they fail.

`torchrun` (and `accelerate launch`, which calls it) keeps a key-value store alive for as long as any process
lives. It needs no process group, so a process whose config is wrong and one whose collective hangs can use
it.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store


def launcher_store(
    purpose: str, seconds: float, environment: Mapping[str, str] = os.environ, *, or_rank_0s: bool = False
) -> Store | None:
    """A connection of this process's own to the launcher's store, or None where there is none.

    seconds: how long to wait for the connection, and for each answer. Keys are those of this `purpose` and of
    this attempt: the store survives the restarts of `torchrun --max-restarts`. or_rank_0s: where the launcher
    lends none (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), take that of the process group, which rank 0 keeps from
    its start to its own end.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not or_rank_0s:
        return None
    from torch.distributed import DistError, PrefixStore, TCPStore

    try:
        store = TCPStore(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
    except (KeyError, DistError):
        return None
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"llmnorm/{purpose}/{attempt}", store)


def _file_store(count: int, environment: Mapping[str, str]) -> Store:
    """A store in a file that the `count` processes of this node, all children of one launcher, find alike."""
    from torch.distributed import FileStore

    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"llmnorm-{os.getuid()}-{os.getppid()}-{environment.get('MASTER_PORT', '0')}-{attempt}"
    return FileStore(str(Path(tempfile.gettempdir()) / name), count)


# Seconds that processes of one node may differ in reaching the same mistake; torchrun kills after 30.
_SKEW = 20.0


def tell_once_and_wait(text: str, environment: Mapping[str, str] = os.environ) -> None:
    """Print a mistake that every process of this node meets, once, before any of them ends.

    A launcher ends all processes as soon as one has ended, so the first of the node, which prints, might
    otherwise be ended before it can. One that waits in vain for the first prints itself: then the mistake is
    not everybody's.
    """
    rank, count = (int(environment.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    store = None
    if count > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # each ends with its own exit code
        store = launcher_store(f"mistake/{environment.get('GROUP_RANK', '0')}", _SKEW, environment)
        store = store or _file_store(count, environment)
    if rank == 0:
        print(text, file=sys.stderr, flush=True)
    if store is None:
        return
    try:
        store.set_timeout(timedelta(seconds=_SKEW))
        store.set(str(rank), "")
        store.wait([str(other) for other in range(count)] if rank == 0 else ["0"])
    except RuntimeError:
        if rank != 0:
            print(f"rank {environment.get('RANK', '?')}: {text}", file=sys.stderr, flush=True)
