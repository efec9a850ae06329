"""How many sequences the next update reads.

Staged sizes are a function of the updates made and the sequences read, which every checkpoint holds. The norm
test ("AdAdaGrad", arXiv 2402.11215) is a function of the gradients so far,
through integers that a checkpoint holds as well:

    Var(g) <= eta^2 ||g||^2       passes      g: the update's gradient, before clipping
    b <- ceil(b Var(g) / (eta^2 ||g||^2))     after `patience` failures in a row

rounded up to a multiple of the first size, so that every number of processes that could start can go on, and
at most `max_global_batch_size`. Of the failures' sizes the smallest is taken; the batch never shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from llmnorm.config import (
    SHARDED_GRADIENTS,
    NormTestSection,
    RunConfig,
    StagedSection,
    norm_test_needs_whole_gradients,
    planned_stages,
)

LR_FACTORS: dict[str, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "sqrt": math.sqrt,
    "linear": lambda ratio: ratio,
}


class BatchSize(Protocol):
    """What the loop asks of a batch schedule."""

    def at(self, step: int, sequences: int) -> int:
        """Sequences of the update after `step` updates that read `sequences`."""

    def lr_factor(self, size: int) -> float:
        """Factor of the learning rate of an update of that size."""

    def due(self, step: int) -> bool:
        """Whether 0-based update `step` must measure its gradient's variance."""

    def observe(self, variance: float, grad_norm: float) -> None:
        """Take note of an update that measured it."""

    def state(self) -> dict[str, int]:
        """What a resumed run needs beside its position."""

    def restore(self, state: dict[str, int]) -> None: ...


class FixedSize:
    """One size throughout."""

    def __init__(self, size: int) -> None:
        self.size = size

    def at(self, step: int, sequences: int) -> int:
        return self.size

    def lr_factor(self, size: int) -> float:
        return 1.0

    def due(self, step: int) -> bool:
        return False

    def observe(self, variance: float, grad_norm: float) -> None:
        raise AssertionError("only the norm test observes")

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None:
        assert not state, "a run keeps its batch schedule"


class StagedSize(FixedSize):
    """Given stages by the updates made or by the positions read, then the last size."""

    def __init__(self, config: RunConfig, schedule: StagedSection) -> None:
        super().__init__(config.train.global_batch_size)
        self.stages = schedule.stages
        self.sequence_length = config.data.sequence_length
        self._factor = LR_FACTORS[schedule.lr_scaling]

    def at(self, step: int, sequences: int) -> int:
        tokens = sequences * self.sequence_length
        for stage in self.stages:
            by_step = stage.until_step is not None and step < stage.until_step
            if by_step or (stage.until_tokens is not None and tokens < stage.until_tokens):
                return stage.global_batch_size
        return self.size

    def lr_factor(self, size: int) -> float:
        return self._factor(size / self.size)


@dataclass
class _NormTestState:
    """size: of the next update. failures: tests in a row that failed; wanted: the smallest size they ask."""

    size: int
    failures: int = 0
    wanted: int = 0


class NormTestSize(FixedSize):
    """Grows when the gradient is too noisy; the equations are the module's."""

    def __init__(self, config: RunConfig, schedule: NormTestSection) -> None:
        super().__init__(config.train.global_batch_size)
        self.schedule = schedule
        self._factor = LR_FACTORS[schedule.lr_scaling]
        self._state = _NormTestState(self.size)

    def at(self, step: int, sequences: int) -> int:
        return self._state.size

    def lr_factor(self, size: int) -> float:
        return self._factor(size / self.size)

    def due(self, step: int) -> bool:
        return (
            self._state.size < self.schedule.max_global_batch_size and (step + 1) % self.schedule.every == 0
        )

    def observe(self, variance: float, grad_norm: float) -> None:
        state, allowed = self._state, (self.schedule.eta * grad_norm) ** 2
        if variance <= allowed:
            state.failures = state.wanted = 0
            return
        largest = self.schedule.max_global_batch_size
        needed = state.size * variance
        wanted = largest if needed >= largest * allowed else math.ceil(needed / allowed)
        state.wanted = min(state.wanted, wanted) if state.failures else wanted
        state.failures += 1
        if state.failures >= self.schedule.patience:
            state.size = min(largest, -(-state.wanted // self.size) * self.size)
            state.failures = state.wanted = 0

    def state(self) -> dict[str, int]:
        return asdict(self._state)

    def restore(self, state: dict[str, int]) -> None:
        self._state = _NormTestState(**state)


def create_batch_size(config: RunConfig, strategy: str) -> BatchSize:
    """The batch schedule of a run under that parallel strategy.

    Raises `UserError` for a norm test under FSDP2 or DeepSpeed.
    """
    schedule: Any = config.train.batch_schedule
    if isinstance(schedule, StagedSection):
        return StagedSize(config, schedule)
    if isinstance(schedule, NormTestSection):
        if strategy in SHARDED_GRADIENTS:
            raise norm_test_needs_whole_gradients(strategy)
        return NormTestSize(config, schedule)
    return FixedSize(config.train.global_batch_size)


def format_stages(config: RunConfig) -> list[str]:
    """One line for each stage that is known before the run."""
    schedule = config.train.batch_schedule
    if schedule is None:
        return []
    if isinstance(schedule, NormTestSection):
        return [
            f"batch schedule: norm test from {config.train.global_batch_size} to at most "
            f"{schedule.max_global_batch_size} sequences, every {schedule.every} updates, "
            f"eta {schedule.eta:g}"
        ]
    lines, tokens = ["batch schedule:"], 0
    factor = LR_FACTORS[schedule.lr_scaling]
    for stage in planned_stages(config):
        tokens += stage.global_batch_size * stage.num_steps * config.data.sequence_length
        scale = factor(stage.global_batch_size / config.train.global_batch_size)
        lines.append(
            f"  updates {stage.first_step + 1:,} to {stage.first_step + stage.num_steps:,}: "
            f"{stage.global_batch_size} sequences, {tokens:,} positions by its end"
            + (f", learning rate x {scale:.4g}" if scale != 1.0 else "")
        )
    return lines
