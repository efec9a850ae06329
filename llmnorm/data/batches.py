"""Batches of an optimizer step.

A step starts at position first = the number of samples read in the steps before it, and

    rank r, micro-batch m, row j   reads position   first + (m * world_size + r) * micro_batch_size + j

so that the samples of a step, and all of the data's state, do not depend on how many processes share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmnorm.data.samples import Rows
from llmnorm.errors import UserError


@dataclass
class StepBatch:
    """What one rank reads in one optimizer step.

    first: position of the step's first sample over all ranks. tensors: int64 [micro_batches, B, T] by name.
    """

    first: int
    tensors: dict[str, torch.Tensor]

    @property
    def micro_batches(self) -> list[dict[str, torch.Tensor]]:
        """The micro-batches in order: {"input_ids", "labels"[, "position_ids"]}, int64 [B, T]."""
        names = list(self.tensors)
        return [
            dict(zip(names, tensors, strict=True)) for tensors in zip(*self.tensors.values(), strict=True)
        ]

    def pin_memory(self) -> StepBatch:
        """Move to page-locked memory; the DataLoader calls this in its pinning thread."""
        return StepBatch(self.first, {name: tensor.pin_memory() for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class BatchShape:
    """How a step's samples are shared out. Batch sizes count sequences."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.world_size):
            raise UserError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of "
                f"train.micro_batch_size={self.micro_batch_size} x {self.world_size} processes; change one "
                "of them"
            )

    @property
    def micro_batches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def positions(self, first: int) -> np.ndarray:
        """What this rank reads of the step that starts at `first`: int64 [micro_batches * B]."""
        micro = np.arange(self.micro_batches)[:, None] * self.world_size + self.rank
        return (first + micro * self.micro_batch_size + np.arange(self.micro_batch_size)).ravel()

    def step(self, first: int, rows: Rows) -> StepBatch:
        """Shape rows [micro_batches * B, T] into a step."""
        shape = (self.micro_batches, self.micro_batch_size, -1)
        return StepBatch(first, {name: torch.from_numpy(row).view(shape) for name, row in rows.items()})
