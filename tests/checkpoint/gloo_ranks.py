"""Runs a function on several gloo processes of one machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

# The fork server imports torch once; every rank is forked from it in milliseconds, without this process's
# threads.
multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "torch.distributed.fsdp"])


def _rank(rank: int, worker: Callable[..., None], world_size: int, meeting: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    try:
        worker(*args)
    finally:
        dist.destroy_process_group()


def run_ranks(worker: Callable[..., None], world_size: int, directory: Path, *args: object) -> None:
    """Call `worker(*args)` on every rank; a failure on any rank is raised here."""
    meeting = directory / f"meeting-{worker.__name__}-{world_size}"
    torch.multiprocessing.start_processes(
        _rank, (worker, world_size, str(meeting), args), nprocs=world_size, start_method="forkserver"
    )
