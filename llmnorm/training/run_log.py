"""Where the numbers of a run go: metrics.jsonl and the trackers, both written by the main process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmnorm.config import RunConfig
from llmnorm.training.metrics import MetricsLog
from llmnorm.training.processes import Processes
from llmnorm.training.run_directory import RunDirectory
from llmnorm.training.run_state import Position
from llmnorm.training.tracking import Trackers


class RunLog:
    """The rows of a run. Every process calls it alike; where it is not the main one, nothing is written.

    A run that goes on (`resumed`) keeps the rows up to its step and drops those after it.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        processes: Processes,
        position: Position,
        resumed: bool,
        note: Callable[[str], None],
    ) -> None:
        self.processes = processes
        self.metrics: MetricsLog | None = None
        self.trackers: Trackers | None = None
        if processes.is_main:
            step = position.step
            self.metrics = MetricsLog(directory.metrics_file, step if resumed else None)
            self.trackers = Trackers(
                config.tracking, directory.path, position.run_id, step, config.to_dict(), note
            )

    def write(self, row: dict[str, Any], tracked: dict[str, Any] | None = None) -> None:
        """Add a row to metrics.jsonl and send it, or `tracked` in its stead, to the trackers."""
        if self.metrics is not None:
            self.metrics.write(row)
        if self.trackers is not None:
            self.trackers.log(row if tracked is None else tracked)

    def has(self, step: int, kind: str) -> bool:
        """Whether metrics.jsonl has a row with the key `kind` for this step, from before a restart.

        Collective: all processes get the main one's answer.
        """
        written = self.metrics is not None and self.metrics.has(step, kind)
        return bool(self.processes.sum(torch.tensor(float(written), device=self.processes.device)) > 0)

    def sync(self) -> None:
        """Force the rows onto the disk."""
        if self.metrics is not None:
            self.metrics.sync()

    def cut_after(self, step: int) -> None:
        """Drop the rows of later steps from metrics.jsonl."""
        if self.metrics is not None:
            self.metrics.cut_after(step)

    def close(self) -> None:
        """Close the trackers; metrics.jsonl is whole after every row."""
        if self.trackers is not None:
            self.trackers.close()
