"""SPAM: Adam with spikes clipped and momentum reset (arXiv 2501.06842).

    t the update, counted from 1; T = reset_interval
    t mod T = 0:                  M, V <- 0
    t >= a and t mod T >= a:      g_ij <- sign(g_ij) sqrt(theta V_ij)   where g_ij^2 > theta V_ij
    M, V Adam's averages of g
    W <- W - lr w c M / (sqrt(V) + eps);   W <- (1 - lr wd) W      c = sqrt(1 - b2^t) / (1 - b1^t)
    w = 1 - 0.99 (1 + cos(pi u / (N + 1))) / 2 for the first N updates u = 0, 1, ... after a reset, else 1

V is that of before the step, without bias correction; a = grace_steps. As released, c keeps counting through
a reset, which makes the raw step up to 6.5 times too large: w hides that, so N must stay below T. The
published script passed its learning-rate warm-up (1,000) as N with T = 500, so that w never rose above one
half. `reset_clock: restart` counts c from the reset.

Sparse momentum (`density` d < 1): of every row of a hidden matrix d n random places move, have moments and
decay; the others rest until the next draw, which comes with each reset. Places come from (seed, parameter,
reset), the same number in each row, where the released code draws each place by itself from the device's
generator: state is then 2 d m n elements and 4 d m n bytes of places, whatever is drawn, and replicas agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.random_numbers import normal_like, seed_of
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import Hyper, Rule, count, decay_after, moment, wide
from llmnorm.optim.update_size import ADAM_LIKE, ADAM_RMS, Size


def warm_restart(step: int, interval: int, warmup: int) -> float:
    """w of update `step`: 1 until the first reset, then a cosine from 0.01 over `warmup` updates."""
    since = step % interval
    if step < interval or since >= warmup:
        return 1.0
    return 1 - 0.99 * (1 + math.cos(math.pi * since / (warmup + 1))) / 2


def _direction(grad: Tensor, state: State, hyper: Hyper, step: int) -> Tensor:
    """w c M / (sqrt(V) + eps) of update `step`."""
    interval, grace = hyper["reset_interval"], hyper["grace_steps"]
    beta1, beta2 = hyper["betas"]
    first = moment(state, "exp_avg", grad, hyper)
    second = moment(state, "exp_avg_sq", grad, hyper)
    if step % interval == 0:
        first.zero_()
        second.zero_()
    g = grad.to(first.dtype)
    if step >= grace and step % interval >= grace:
        limit = (hyper["threshold"] * wide(second)).sqrt().to(g.dtype)
        g = torch.maximum(torch.minimum(g, limit), -limit)
    first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    clock = step
    if hyper["reset_clock"] == "restart" and step >= interval:
        clock = step % interval + 1
    factor = (1 - beta2**clock) ** 0.5 / (1 - beta1**clock)
    warm = warm_restart(step, interval, hyper["warmup_steps"])
    return warm * factor * wide(first) / (wide(second).sqrt() + hyper["eps"])


def spam_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Tensor:
    """The clipped, warmed-up Adam direction, with the decay that follows it and is not warmed up."""
    return decay_after(_direction(grad, state, hyper, count(state)), hyper, weight)


def _places(grad: Tensor, state: State, hyper: Hyper, step: int) -> Tensor:
    """Columns (..., m, k) that move until the next reset, ascending in each row; k = d n, at least 1."""
    if "places" not in state or step % hyper["reset_interval"] == 0:
        k = max(1, round(hyper["density"] * grad.shape[-1]))
        seed = seed_of(hyper["seed"], hyper["name"], step // hyper["reset_interval"])
        drawn = normal_like(torch.empty_like(grad, dtype=torch.float32), seed).topk(k, dim=-1).indices
        state["places"] = drawn.sort(dim=-1).values.int()
    return state["places"].long()


def masked_spam_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Tensor:
    """`spam_update` on the places of this period; zero elsewhere."""
    step = count(state)
    places = _places(grad, state, hyper, step)
    direction = _direction(grad.gather(-1, places), state, hyper, step)
    moved = decay_after(direction, hyper, weight.gather(-1, places))
    return torch.zeros_like(grad, dtype=moved.dtype).scatter_(-1, places, moved)


SPAM_RULE = Rule("spam", spam_update, ADAM_LIKE, elementwise=True, reads_weight=True, decays=True)
# Not element by element: the places of a row are drawn for the whole row.
SHARE = Size(usual=lambda m, n, hyper: ADAM_RMS * hyper["density"] ** 0.5)
MASKED = Rule("spam", masked_spam_update, SHARE, reads_weight=True, decays=True)


class SPAM(MatrixOptimizer):
    """SPAM on every parameter. `threshold` is theta, `reset_interval` T, `warmup_steps` N, `grace_steps` a.

    density: share of the places of a hidden matrix that move between two resets; seed: of the draw.

    Raises `UserError` for warmup_steps or grace_steps >= reset_interval.
    """

    rules: ClassVar[Mapping[str, Rule]] = dict.fromkeys(Role, SPAM_RULE)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        threshold: float = 5000.0,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        grace_steps: int = 20,
        reset_clock: Literal["global", "restart"] = "global",
        density: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **shared: Unpack[Options],
    ):
        options = {
            "threshold": threshold,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
            "grace_steps": grace_steps,
            "reset_clock": reset_clock,
            "density": density,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, lr, weight_decay, options, shared)

    def _check_group(self, group: Hyper) -> None:
        super()._check_group(group)
        interval, warmup, grace = (group[key] for key in ("reset_interval", "warmup_steps", "grace_steps"))
        if interval < 1 or warmup >= interval:
            raise UserError(
                f"optimizer.warmup_steps={warmup} must be below optimizer.reset_interval={interval}: the "
                "learning rate would never recover from a reset; lower the one or raise the other"
            )
        if grace >= interval:
            raise UserError(
                f"optimizer.grace_steps={grace} must be below optimizer.reset_interval={interval}: no spike "
                "would ever be clipped; lower the one or raise the other"
            )

    def rule(self, group: Hyper) -> Rule:
        masked = group["role"] == Role.HIDDEN_MATRIX and group["density"] < 1
        return MASKED if masked else super().rule(group)
