"""Learning-rate schedules: pure functions of the update counter, one integer of state.

For update t = 0 .. T-1, warm-up W and floor r = min_lr_ratio, the learning rate is lr * multiplier(t) with

    multiplier(t) = (t + 1) / W              t < W     the first update already moves
    multiplier(t) = r + (1 - r) shape(x)     t >= W    x = progress in [0, 1], shape(0) = 1, shape(1) = 0

so every shape keeps to the floor and nothing jumps. x = 1 is the moment after the last update: an update
with a learning rate of zero would be wasted.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from llmnorm.errors import UserError
from llmnorm.optim.refined_schedule import refined

_HALVINGS = 10  # the exponential shape halves ten times, then is shifted so that it ends at exactly 0

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "square": lambda x: 1.0 - x * x,
    "exponential": lambda x: (2.0 ** (-_HALVINGS * x) - 2.0**-_HALVINGS) / (1.0 - 2.0**-_HALVINGS),
}


class Schedule(Protocol):
    """What the loop asks of a schedule."""

    def multiplier(self, update: int) -> float:
        """Factor of the peak learning rate at 0-based `update`."""


@dataclass(frozen=True)
class PhasedSchedule:
    """Warm-up, a stable phase at the peak, then a decay; the phases may be empty.

    `decay_start` and `decay_end` are update counters; `decay_start == decay_end` means no decay.
    """

    warmup_steps: int
    decay_start: int
    decay_end: int
    shape: Callable[[float], float]
    min_lr_ratio: float

    def multiplier(self, update: int) -> float:
        """Factor of the peak learning rate at 0-based `update`."""
        if update < self.warmup_steps:
            return (update + 1) / self.warmup_steps
        if update < self.decay_start or self.decay_end <= self.decay_start:
            return 1.0
        progress = min(1.0, (update - self.decay_start) / (self.decay_end - self.decay_start))
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * self.shape(progress)


@dataclass(frozen=True)
class InverseSquareRoot:
    """sqrt(W / t) after the warm-up (Attention Is All You Need, arXiv 1706.03762); W counts as 1 without one.

    It does not know the length of the run, so that a run can be extended.
    """

    warmup_steps: int

    def multiplier(self, update: int) -> float:
        """Factor of the peak learning rate at 0-based `update`."""
        if update < self.warmup_steps:
            return (update + 1) / self.warmup_steps
        return math.sqrt(max(1, self.warmup_steps) / max(1, update))


def _whole_run(shape: str, default_ratio: float) -> Callable[..., Schedule]:
    def build(max_steps: int, *, warmup_steps: int = 0, min_lr_ratio: float = default_ratio) -> Schedule:
        return PhasedSchedule(warmup_steps, warmup_steps, max_steps, DECAY_SHAPES[shape], min_lr_ratio)

    return build


def _constant(max_steps: int, *, warmup_steps: int = 0) -> Schedule:
    return PhasedSchedule(warmup_steps, max_steps, max_steps, DECAY_SHAPES["linear"], 1.0)


def _inverse_sqrt(max_steps: int, *, warmup_steps: int = 0) -> Schedule:
    return InverseSquareRoot(warmup_steps)


def _wsd(
    max_steps: int,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay_fraction: float = 0.2,
    decay_shape: str = "linear",
    min_lr_ratio: float = 0.0,
) -> Schedule:
    length = round(decay_fraction * max_steps) if decay_steps is None else decay_steps
    start = max(warmup_steps, max_steps - length)
    return PhasedSchedule(warmup_steps, start, max_steps, DECAY_SHAPES[decay_shape], min_lr_ratio)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": _whole_run("cosine", 0.1),
    "linear": _whole_run("linear", 0.0),  # linear to zero, arXiv 2310.07831
    "wsd": _wsd,  # warm-up, stable, decay: MiniCPM, arXiv 2404.06395
    "constant": _constant,
    "inverse_sqrt": _inverse_sqrt,
    "refined": refined,  # from the gradient norms of a previous run, arXiv 2310.07831
}


def create_schedule(name: str, max_steps: int, **options: Any) -> Schedule:
    """The schedule `name` for a run of `max_steps` updates.

    Options: `warmup_steps`; `min_lr_ratio` (cosine 0.1, linear 0, wsd 0, refined 0); wsd also takes
    `decay_steps` or `decay_fraction`, and `decay_shape`; refined takes `metrics_file`, `weighting` and
    `smoothing`. Raises `UserError` for an unknown name, option or shape, and for a log that cannot serve.
    """
    if name not in SCHEDULES:
        raise UserError(f"schedule.name={name!r} is not known; choose one of {', '.join(sorted(SCHEDULES))}")
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in known:
            raise UserError(
                f"schedule.{option}={value!r} is not an option of {name}; it takes {', '.join(known)}"
            )
    shape = options.get("decay_shape", "linear")
    if shape not in DECAY_SHAPES:
        raise UserError(
            f"schedule.decay_shape={shape!r} is not known; choose one of {', '.join(DECAY_SHAPES)}"
        )
    if options.get("warmup_steps", 0) < 0:
        raise UserError(
            f"schedule.warmup_steps={options['warmup_steps']} must not be negative; 0 means no warm-up"
        )
    return SCHEDULES[name](max_steps, **options)
