"""What a rule is, the state it keeps, and AdamW as the rule of the roles that a method leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.optim.matrix import State
from llmnorm.optim.roles import Role
from llmnorm.optim.update_size import ADAM_LIKE, PLAIN, Size

Hyper = Mapping[str, Any]


def always(hyper: Hyper) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """How the parameters of one role move.

    `update(grad, state, hyper)`, or with `reads_weight` `update(grad, state, hyper, weight)`, returns what
    `lr * c` multiplies (a `ByRows` can do so from shards); `size` knows c and the RMS of the update. A rule
    that `decays` applies `hyper["weight_decay"]` itself; where it does so by `decay_after` alone, which is
    all it reads the weight for, its `decay_follows`. `project(weight, state)` returns the weight that
    replaces a moved one. Where the update, but for such a decay, is the gradient times a number for each row
    or column, `factors(grad, state, hyper)` returns those: an owner sends them back and not the update.
    `elementwise` rules never look beyond one element; `stacks` rules gain from one call on equal shapes.
    `fused(weight, grad, state, hyper, lr, weight_decay)` makes the whole step in place with the kernels of
    `llmnorm_kernels`, where they serve the weight; `update` is its specification, and `hyper["noise"]` the
    kernels' arguments of stochastic rounding, empty without it. A rule that asks nothing of other rows
    `fuses_rows`: each process may make the step of its own.
    """

    name: str
    update: Callable[..., Tensor]
    size: Size = PLAIN
    elementwise: bool = False
    reads_weight: bool = False
    decays: bool = False
    decay_follows: bool = False
    stacks: bool = False
    project: Callable[[Tensor, State], Tensor] | None = None
    factors: Callable[[Tensor, State, Hyper], Tensor] | None = None
    fused: Callable[[Tensor, Tensor, State, Hyper, float, float], None] | None = None
    fuses: Callable[[Hyper], bool] = always
    fuses_rows: bool = False
    fused_many: Callable[[list[Tensor], list[Tensor], list[State], Hyper], None] | None = None


def wide(tensor: Tensor) -> Tensor:
    """At least fp32: statistics and norms of bf16 tensors are taken in it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def moment(state: State, key: str, grad: Tensor, hyper: Hyper) -> Tensor:
    """The running average `key`, zeros at first, in the dtype that `state_dtype` asks for."""
    if key not in state:
        dtype = torch.float32 if hyper["state_dtype"] == "fp32" else grad.dtype
        state[key] = torch.zeros_like(grad, dtype=dtype)
    return state[key]


def count(state: State) -> int:
    """Advance and return the number of steps this parameter has made (fp32, as torch keeps it)."""
    step = state.setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
    step += 1
    return int(step.item())


def adam_moments(
    grad: Tensor, state: State, hyper: Hyper, betas: tuple[float, float]
) -> tuple[Tensor, Tensor, float, float]:
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2; returns m, v and both bias corrections 1 - b^t."""
    step = count(state)
    first = moment(state, "exp_avg", grad, hyper)
    second = moment(state, "exp_avg_sq", grad, hyper)
    g = grad.to(first.dtype)
    first.lerp_(g, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    return wide(first), wide(second), 1 - betas[0] ** step, 1 - betas[1] ** step


def adam_direction(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) with the method's own `betas` and `eps`."""
    m, v, bias1, bias2 = adam_moments(grad, state, hyper, hyper["betas"])
    return (m / bias1) / ((v / bias2).sqrt() + hyper["eps"])


def adamw_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps): Adam as in torch.optim.AdamW."""
    m, v, bias1, bias2 = adam_moments(grad, state, hyper, hyper["adamw_betas"])
    return (m / bias1) / ((v / bias2).sqrt() + hyper["adamw_eps"])


def decay_after(direction: Tensor, hyper: Hyper, weight: Tensor) -> Tensor:
    """What lr multiplies so that W <- W - lr D is followed by W <- (1 - lr wd) W, as in HF's old AdamW."""
    decay = hyper["weight_decay"]
    return (1 - hyper["lr"] * decay) * direction + decay * wide(weight) if decay else direction


def legacy_adamw_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps): eps meets the uncorrected v, as in HF's old AdamW."""
    m, v, bias1, bias2 = adam_moments(grad, state, hyper, hyper["adamw_betas"])
    return m / (v.sqrt() + hyper["adamw_eps"]) * (bias2**0.5 / bias1)


def fused_adamw(
    weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, weight_decay: float
) -> None:
    """`adamw_update` and the step it is for in one pass over memory."""
    own = {**hyper, "betas": hyper["adamw_betas"], "eps": hyper["adamw_eps"]}
    fused_adam(weight, grad, state, own, lr, weight_decay)


def fused_adam(
    weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, weight_decay: float
) -> None:
    """`adam_direction` and the step it is for in one pass over memory."""
    step = count(state)
    moments = moment(state, "exp_avg", grad, hyper), moment(state, "exp_avg_sq", grad, hyper)
    options = {"betas": tuple(hyper["betas"]), "eps": hyper["eps"], "seed": hyper["noise"].get("seed")}
    kernels.adamw_(weight, grad, *moments, step=step, lr=lr, weight_decay=weight_decay, **options)


def fused_legacy_adamw(
    weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, weight_decay: float
) -> None:
    """`legacy_adamw_update` and the step it is for in one pass over memory."""
    step = int(state["step"].item()) + 1 if "step" in state else 1
    own = {**hyper, "adamw_eps": _corrected_eps(hyper, step)}
    fused_adamw(weight, grad, state, own, lr, weight_decay)


def _plain_eps(hyper: Hyper, step: int) -> float:
    return hyper["adamw_eps"]


def _corrected_eps(hyper: Hyper, step: int) -> float:
    """What eps beside sqrt(v) is beside sqrt(v / (1 - b2^t)): eps / sqrt(1 - b2^t)."""
    return hyper["adamw_eps"] / (1 - hyper["adamw_betas"][1] ** step) ** 0.5


def _many(eps: Callable[[Hyper, int], float]) -> Callable[..., None]:
    def many(weights: list[Tensor], grads: list[Tensor], states: list[State], hyper: Hyper) -> None:
        """Adam on weights of any shapes, in one launch for each step count among them."""
        counts = [count(state) for state in states]
        moments = [
            [moment(state, key, grad, hyper) for state, grad in zip(states, grads, strict=True)]
            for key in ("exp_avg", "exp_avg_sq")
        ]
        for step in dict.fromkeys(counts):
            alike = [index for index, other in enumerate(counts) if other == step]
            lists = [[column[index] for index in alike] for column in (weights, grads, *moments)]
            options = {"betas": tuple(hyper["adamw_betas"]), "eps": eps(hyper, step)}
            kernels.adamw_many_(
                *lists, step=step, lr=hyper["lr"], weight_decay=hyper["weight_decay"], **options
            )

    return many


ADAMW = Rule(
    "adamw", adamw_update, ADAM_LIKE, elementwise=True, fused=fused_adamw, fused_many=_many(_plain_eps)
)
LEGACY_ADAMW = Rule(
    "adamw",
    legacy_adamw_update,
    ADAM_LIKE,
    elementwise=True,
    fused=fused_legacy_adamw,
    fused_many=_many(_corrected_eps),
)
_ELSEWHERE = (Role.EMBEDDING, Role.LM_HEAD, Role.VECTOR)
ADAMW_ELSEWHERE: dict[str, Rule] = dict.fromkeys(_ELSEWHERE, ADAMW)
LEGACY_ELSEWHERE: dict[str, Rule] = dict.fromkeys(_ELSEWHERE, LEGACY_ADAMW)
