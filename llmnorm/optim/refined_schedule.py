"""Schedule refinement: the learning rates that the gradient norms of a previous run call for.

    G^ = median filter of the logged norms G_1 .. G_T, width 2 floor(tau T / 2) + 1
    w_t = G^_t^-2  (sgd)    or    G^_t^-1  (adam)
    eta_t ~ w_t sum_(p > t) w_p,  divided by its largest value

Defazio, Cutkosky, Mehta, Mishchenko, arXiv 2310.07831. Constant norms give linear decay to zero, large early
norms a warm-up of themselves. The paper takes L2 norms for SGD and L1 norms for Adam; a run logs L2 norms.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmnorm.errors import UserError

POWERS = {"sgd": 2, "adam": 1}
MIN_POINTS = 50
_MAX_POINTS = 10_000  # longer logs are resampled: the filter's cost is points times width


def smoothed(norms: Tensor, fraction: float) -> Tensor:
    """Running median; the end is mirrored and the start repeated, so that neither bends the filter."""
    width = 2 * math.floor(fraction * len(norms) / 2) + 1
    start = norms[:1].expand(width)
    end = norms.flip(0)[: 2 * width]
    padded = torch.cat([start, norms, end])
    medians = padded.unfold(0, width, 1).median(dim=-1).values
    first = width - width // 2
    return medians[first : first + len(norms)]


def refine(norms: Tensor, power: int, smoothing: float = 0.1) -> Tensor:
    """eta of every logged update, largest 1, last 0; `norms` (T,) positive."""
    weights = smoothed(norms.double(), smoothing).pow(-power)
    remaining = weights.sum() - weights.cumsum(0)
    remaining[-1] = 0.0  # rather than what rounding leaves
    eta = weights * remaining
    return eta / eta.max()


def logged_norms(metrics_file: str) -> Tensor:
    """`grad_norm` of every update in a metrics.jsonl, without the first and last two and without overflows.

    Raises `UserError` for a file that cannot be read and for fewer than 50 usable updates.
    """
    try:
        rows = [json.loads(line) for line in Path(metrics_file).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"schedule.metrics_file={metrics_file} cannot be read ({error}); give the metrics.jsonl of a "
            "finished run"
        ) from error
    by_step = {row["step"]: row["grad_norm"] for row in rows if row.get("grad_norm") is not None}
    norms = [float(by_step[step]) for step in sorted(by_step)][2:-2]
    usable = [norm for norm in norms if math.isfinite(norm) and norm > 0]
    if len(usable) < MIN_POINTS:
        raise UserError(
            f"schedule.metrics_file={metrics_file} has {len(usable)} usable gradient norms, and refining "
            f"needs at least {MIN_POINTS}; give the metrics.jsonl of a longer run"
        )
    return torch.tensor(usable, dtype=torch.float64)


def _resampled(values: Tensor, points: int) -> Tensor:
    return torch.nn.functional.interpolate(
        values[None, None], size=points, mode="linear", align_corners=True
    )[0, 0]


@dataclass(frozen=True)
class RefinedSchedule:
    """Refined learning rates, stretched over the run, under a warm-up and above a floor."""

    rates: tuple[float, ...]
    max_steps: int
    warmup_steps: int
    min_lr_ratio: float

    def multiplier(self, update: int) -> float:
        """Factor of the peak learning rate at 0-based `update`."""
        position = min(1.0, update / self.max_steps) * (len(self.rates) - 1)
        index = min(int(position), len(self.rates) - 2)
        part = position - index
        rate = (1 - part) * self.rates[index] + part * self.rates[index + 1]
        warmup = min(1.0, (update + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * rate)


def refined(
    max_steps: int,
    *,
    metrics_file: str | None = None,
    warmup_steps: int = 0,
    weighting: str = "adam",
    smoothing: float = 0.1,
    min_lr_ratio: float = 0.0,
) -> RefinedSchedule:
    """The schedule for a run of `max_steps`, whatever the length of the logged one."""
    if weighting not in POWERS:
        raise UserError(f"schedule.weighting={weighting!r} is not known; choose one of {', '.join(POWERS)}")
    if metrics_file is None:
        raise UserError("schedule.metrics_file is needed by refined; give the metrics.jsonl of a former run")
    norms = logged_norms(metrics_file)
    if len(norms) > _MAX_POINTS:
        norms = _resampled(norms, _MAX_POINTS)
    rates = refine(norms, POWERS[weighting], smoothing)
    return RefinedSchedule(tuple(rates.tolist()), max_steps, warmup_steps, min_lr_ratio)
