"""Stable-SPAM: Adam behind an adaptive clip and an adaptive norm, with momentum resets (arXiv 2502.17055).

    tau the update, counted from 1; t the updates since the last reset, the one at hand included
    tau mod gap = 0:  M, V <- 0,  t <- 1                                  T, mu, nu go on
    AdaClip   T <- g3 T + (1 - g3) max|g|,  T' = T / (1 - g3^tau),  g_ij <- g_ij T' / max|g| if |g_ij| > T'
    AdaGN     mu <- g1 mu + (1 - g1) |g|,   nu <- g2 nu + (1 - g2) |g|^2,   both corrected by tau as T is
              g <- g / |g| * mu' / (sqrt(nu') + eps)
    W <- (1 - lr wd) W - lr (M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)

`reset_clock: restart` is the t above, so that the first update after a reset is lr sign(g); `global` puts tau
for t, as the paper writes it, which makes the steps after a reset up to 6.5 times as large, with no warm-up
to hide it. `variant: released` repeats what the authors' code does at a reset: the step goes on with the old
moments and t = 1, its gradient is lost to the new ones, and T, mu, nu keep their values while their clock
starts again, so that T' is hundreds of times too large and AdaClip rests for most of every period. What
that code does not save, and so restarts with every resumed run (the count of updates), is saved here.

`cosine_steps: N`, which the authors' code has and the paper has not, puts c b1 for b1 and c g1 for g1 with

    c = 3/4 + cos(pi tau / (N + 1)) / 4        from 1 to 1/2, then 1/2; as released it rises again instead

(g1, g2, g3) = (0.7, 0.9, 0.999) for 4-bit training, (0.85, 0.99999, 0.999) in bf16. State: Adam's two moments
and three numbers per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import Parts, by_rows, largest, maxima, sums
from llmnorm.optim.rules import Hyper, Rule, count, moment, wide
from llmnorm.optim.update_size import ADAM_LIKE


class Clocks(NamedTuple):
    """What an update counts: for AdaClip and AdaGN, for the moments, and whether it resets them."""

    averages: int
    moments: int
    resets: bool


def clocks(step: int, gap: int, variant: str, reset_clock: str) -> Clocks:
    """The clocks of update `step`; gap 0 never resets."""
    resets = gap > 0 and step % gap == 0
    since = step % gap + 1 if gap > 0 and step >= gap else step
    if variant == "paper":
        return Clocks(step, since if reset_clock == "restart" else step, resets)
    # Released: the clock is set to 1 in the middle of the reset's own step, after the averages have used it.
    return Clocks(step if step <= gap or not gap else gap + 1 if resets else since, since, resets)


def cosine_scale(step: int, steps: int | None, variant: str) -> float:
    """c of update `step`, 1 where `steps` is None."""
    if steps is None:
        return 1.0
    place = step if variant == "released" else min(step, steps + 1)
    return 0.75 + 0.25 * math.cos(math.pi * place / (steps + 1))


def _average(state: State, key: str, value: Tensor, decay: float, clock: int) -> Tensor:
    held = state.setdefault(key, torch.zeros_like(value))
    held.mul_(decay).add_(value, alpha=1 - decay)
    return held / (1 - decay**clock)


@by_rows()
def stabilized(grad: Tensor, state: State, hyper: Hyper, clock: int) -> Parts:
    """The gradient behind AdaClip and AdaGN; a gradient of zeros stays one."""
    decay_norm, decay_square, decay_largest = hyper["gammas"]
    g = wide(grad)
    (greatest,) = yield maxima(largest(g.abs()))
    limit = _average(state, "largest_avg", greatest, decay_largest, clock)
    g = torch.where(g.abs() > limit, g * (limit / greatest), g)
    (square,) = yield sums(g.square().sum())
    norm = square.sqrt()
    mean = _average(state, "norm_avg", norm, decay_norm, clock)
    power = _average(state, "norm_sq_avg", square, decay_square, clock)
    return g * torch.where(norm > 0, mean / (power.sqrt() + hyper["eps"]) / norm, 0.0)


@by_rows()
def stable_spam_update(grad: Tensor, state: State, hyper: Hyper) -> Parts:
    """Adam's direction from the stabilized gradient."""
    step = count(state)
    clock = clocks(step, hyper["reset_interval"], hyper["variant"], hyper["reset_clock"])
    scale = cosine_scale(step, hyper["cosine_steps"], hyper["variant"])
    decay_norm, *others = hyper["gammas"]
    averages = {**hyper, "gammas": (scale * decay_norm, *others)}
    g = yield from stabilized.parts(grad, state, averages, clock.averages)
    beta1, beta2 = scale * hyper["betas"][0], hyper["betas"][1]
    first = moment(state, "exp_avg", grad, hyper)
    second = moment(state, "exp_avg_sq", grad, hyper)
    leaves_old = clock.resets and hyper["variant"] == "released"
    if clock.resets and not leaves_old:
        first.zero_()
        second.zero_()
    g = g.to(first.dtype)
    first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    m, v = wide(first) / (1 - beta1**clock.moments), wide(second) / (1 - beta2**clock.moments)
    direction = m / (v.sqrt() + hyper["eps"])
    if leaves_old:
        first.zero_()
        second.zero_()
    return direction


STABLE_SPAM = Rule("stable_spam", stable_spam_update, ADAM_LIKE)


class StableSPAM(MatrixOptimizer):
    """Stable-SPAM on every parameter. `gammas` are (g1, g2, g3), `reset_interval` the gap, 0 for no resets.

    variant: paper, the algorithm as meant, or released. reset_clock: restart or global, for variant paper.
    cosine_steps: updates over which b1 and g1 fall to half of themselves, as the authors' code can; None:
    they stay.

    Raises `UserError` for reset_clock global with variant released.
    """

    rules: ClassVar[Mapping[str, Rule]] = dict.fromkeys(Role, STABLE_SPAM)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        gammas: tuple[float, float, float] = (0.7, 0.9, 0.999),
        reset_interval: int = 1000,
        reset_clock: Literal["restart", "global"] = "restart",
        cosine_steps: int | None = None,
        variant: Literal["paper", "released"] = "paper",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **shared: Unpack[Options],
    ):
        options = {
            "gammas": gammas,
            "reset_interval": reset_interval,
            "reset_clock": reset_clock,
            "cosine_steps": cosine_steps,
            "variant": variant,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, lr, weight_decay, options, shared)

    def _check_group(self, group: Hyper) -> None:
        super()._check_group(group)
        if group["variant"] == "released" and group["reset_clock"] == "global":
            raise UserError(
                "optimizer.reset_clock=global would do nothing with optimizer.variant=released, whose clocks "
                "are those of the authors' code; leave it at restart, or choose variant paper"
            )
