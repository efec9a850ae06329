"""What each process of the runs under ZeRO does, with losses that are made to spike or to be nothing."""

from __future__ import annotations

import os
from typing import Any

import torch

from llmnorm.data.loader import TrainingLoader
from llmnorm.training.update import Update


class Poison:
    """Replaces the loss of the updates whose first training sample is a key of `losses`, while it is used."""

    def __init__(self, losses: dict[int, float]) -> None:
        self.losses = losses
        self.first = 0

    def __enter__(self) -> None:
        self.plain: Any = Update.measure, TrainingLoader.__next__
        poison, (measure, following) = self, self.plain

        def measured(update: Any, *arguments: Any, **options: Any) -> Any:
            found = measure(update, *arguments, **options)
            return found._replace(loss=poison.losses.get(poison.first, found.loss))

        def batch(loader: Any) -> Any:
            found = following(loader)
            poison.first = found.first
            return found

        Update.measure, TrainingLoader.__next__ = measured, batch  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        Update.measure, TrainingLoader.__next__ = self.plain  # type: ignore[method-assign]


def work(rank: int, world_size: int, port: int, runs: list[tuple[str, dict[int, float]]]) -> None:
    """Entry of a spawned process: the runs of config files, each with its poison, in one process group."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    from llmnorm.config import load_run_config
    from llmnorm.training import train

    for file, losses in runs:
        with Poison(losses):
            train(load_run_config(file))
