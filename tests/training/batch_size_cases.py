"""What each process of the two-process runs with a batch schedule does; a module that they can import."""

from __future__ import annotations

import os

import torch


def work(rank: int, world_size: int, port: int, files: list[str]) -> None:
    """Entry of a spawned process: the runs of `files`, one after the other in one process group."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from llmnorm.config import load_run_config
    from llmnorm.training import train

    for file in files:
        train(load_run_config(file))
