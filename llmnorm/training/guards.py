"""What the loop does when numbers go wrong: skip a non-finite update, go back behind a loss spike.

Both look at the loss and the gradient norm of an update before it is applied, so a bad one never touches
the weights. Both are plain Python over numbers that the loop has on the host anyway, and their state is a
few JSON numbers.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from enum import Enum
from typing import Any

from llmnorm.config import GuardSection
from llmnorm.errors import UserError


class TrainingStopped(UserError):
    """The guards gave up: names the step, the data and what to try."""


class Verdict(Enum):
    """What to do with an update."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class Guards:
    """Judges every update by its loss and gradient norm.

    A non-finite loss or norm skips the update; `non_finite_limit` of them in a row stop the run. With
    `spike` set, a loss above mean + threshold * deviation of the last `window` accepted losses rolls back;
    more than `max_rollbacks` of those stop the run.
    """

    def __init__(self, config: GuardSection) -> None:
        self.limit = config.non_finite_limit
        self.spike = config.spike
        self.in_a_row = 0
        self.skipped = 0
        self.rollbacks = 0
        self.window: deque[float] = deque(maxlen=self.spike.window if self.spike else 0)

    def judge(self, step: int, loss: float, grad_norm: float | None, samples: range) -> Verdict:
        """The verdict on the update that would complete `step`, computed on the samples at these positions.

        A norm of None is not known yet; `judge_gradient` goes on with it once it is.

        Raises `TrainingStopped` when the limit of skipped updates or of roll-backs is reached.
        """
        if not (math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))):
            return self._skip(step, loss, math.nan if grad_norm is None else grad_norm, samples)
        if grad_norm is not None:
            self.in_a_row = 0
        if self.spike is None:
            return Verdict.APPLY
        if self._is_spike(loss):
            return self._roll_back(step, loss, samples)
        self.window.append(loss)
        return Verdict.APPLY

    def judge_gradient(self, step: int, loss: float, grad_norm: float, samples: range) -> Verdict:
        """The verdict on an update that was judged by its loss alone and then found this norm."""
        if not math.isfinite(grad_norm):
            return self._skip(step, loss, grad_norm, samples)
        self.in_a_row = 0
        return Verdict.APPLY

    def _skip(self, step: int, loss: float, grad_norm: float, samples: range) -> Verdict:
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row < self.limit:
            return Verdict.SKIP
        raise TrainingStopped(
            f"stopped at step {step}: loss {loss} and gradient norm {grad_norm} on training samples "
            f"{samples.start} to {samples.stop - 1}, non-finite update number {self.in_a_row} in a row "
            f"(guards.non_finite_limit={self.limit}); the weights are those of step "
            f"{step - self.in_a_row}. Lower optimizer.lr or raise schedule.warmup_steps, or look at those "
            "samples; the same command started again goes on from the newest checkpoint"
        )

    def _is_spike(self, loss: float) -> bool:
        assert self.spike is not None
        if len(self.window) < self.spike.window:
            return False
        return loss > statistics.fmean(self.window) + self.spike.threshold * statistics.stdev(self.window)

    def _roll_back(self, step: int, loss: float, samples: range) -> Verdict:
        assert self.spike is not None
        if self.rollbacks < self.spike.max_rollbacks:
            self.rollbacks += 1
            return Verdict.ROLL_BACK
        raise TrainingStopped(
            f"stopped at step {step}: loss {loss:.4f} on training samples {samples.start} to "
            f"{samples.stop - 1} is another spike after {self.rollbacks} roll-backs "
            f"(guards.spike.max_rollbacks={self.spike.max_rollbacks}); lower optimizer.lr, or raise "
            "guards.spike.threshold"
        )

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as JSON types."""
        return {
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "window": list(self.window),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]
        self.skipped = state["skipped"]
        self.rollbacks = state["rollbacks"]
        self.window.clear()
        self.window.extend(state["window"])
