"""APOLLO and APOLLO-Mini: the gradient itself, scaled as Adam would on a random sketch (arXiv 2412.05270).

    every T steps: B with entries N(0, 1/r) from (seed, parameter, refresh), r x k      R = project(G)
    N = M / (sqrt(V) + eps) of R                                  M, V: Adam's moments of R
    s = |N| / |R|      channel: per row of W on the right side, per column on the left; tensor: one number
    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) sqrt(scale) limit(s G);   W <- (1 - lr wd) W

`scale` enters under a root, as in the released code, so Mini's 128 is a factor of 11.3; it makes up for the
sketch, which finds rows of N too small by sqrt(r / k). Since |s G|^2 = sum_i s_i^2 |g_i|^2 the limiter (see
`growth_limiter.py`) needs no second pass. The sketch is drawn again in each step and never stored:
2 max(m, n) r + 1 elements of state per matrix, 2 max(m, n) + 1 for Mini. Embedding, head and vectors keep
Adam's two moments, which the published memory leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.optim.growth_limiter import growth_limit
from llmnorm.optim.lowrank import (
    RANDOM,
    fused_moments,
    keeps_plain_moments,
    moments_of,
    projects_right,
    rank_of,
    subspace,
)
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer, SubspaceOptions
from llmnorm.optim.matrix import State
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import Parts, by_rows, sums
from llmnorm.optim.rules import LEGACY_ELSEWHERE, Hyper, Rule, count, decay_after, wide

_EPS = 1e-8


def _stays_in_rows(shape: Sequence[int], hyper: Hyper) -> bool:
    """A sketch of the inputs is at home where the rows are, and one of the outputs is a sum over them:
    B G = sum_p B[:, rows of p] G[rows of p]. With r rows, sending that costs more than sending G to an owner
    as soon as r P > m / 2, and every process would keep its moments; a single row is less than a vector."""
    return hyper["projection"] == RANDOM and (projects_right(shape, hyper) or rank_of(shape, hyper) == 1)


def _whole_state(shape: Sequence[int], hyper: Hyper) -> frozenset[str]:
    on_rows = projects_right(shape, hyper)
    return frozenset({"limiter_norm"} if on_rows else {"limiter_norm", "exp_avg", "exp_avg_sq"})


def apollo_factors(grad: Tensor, state: State, hyper: Hyper) -> Parts:
    """limit * s and all that multiplies them: (..., m, 1) on the right side, (..., 1, n) on the left, or
    (..., 1, 1)."""
    step = count(state)
    space = subspace(grad, state, hyper, step)
    dim = -1 if space.right else -2
    low, lengths = space.project(grad), wide(grad).square().sum(dim, keepdim=True)
    if not space.right:
        low, lengths = yield sums(low, lengths)
    moments = moments_of(low, grad, state, hyper, space, step)
    adam = moments.uncorrected(hyper["eps"])
    squares = (*(x.square().sum(dim, keepdim=True) for x in (adam, low)), lengths)
    if hyper["granularity"] == "tensor":
        squares = tuple(x.sum((-2, -1), keepdim=True) for x in squares)
        if space.right:
            squares = yield sums(*squares)
    s = squares[0].sqrt() / (squares[1].sqrt() + _EPS)
    total = (s.square() * squares[2]).sum((-2, -1), keepdim=True)
    if hyper["granularity"] == "channel" and space.right:
        (total,) = yield sums(total)
    limited = growth_limit(total.sqrt(), state)
    return moments.correction * hyper["scale"] ** 0.5 * limited * s


@by_rows(whole_state=_whole_state, serves=_stays_in_rows)
def apollo_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Parts:
    """The scaled gradient, limited, with the decay that follows it."""
    factors = yield from apollo_factors(grad, state, hyper)
    return decay_after(factors * wide(grad), hyper, weight)


def fused_apollo(
    weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, weight_decay: float
) -> None:
    """`apollo_update` and its step: one pass over R, one for the lengths of G, one over G and W."""
    moments = fused_moments(grad, state, hyper, corrected=False, direction=False)
    dim = 1 if moments.space.right else 0
    adam, low = moments.adam_squares, moments.low_squares
    lengths = torch.linalg.vector_norm(grad, dim=dim, dtype=torch.float32)
    if hyper["granularity"] == "tensor":
        adam, low = adam.sum().expand_as(adam), low.sum().expand_as(low)
    s = adam.sqrt() / (low.sqrt() + _EPS)
    limited = growth_limit(torch.linalg.vector_norm(s * lengths).view(1, 1), state)
    # The decay follows the update, and so applies to it.
    factor = moments.correction * hyper["scale"] ** 0.5 * (1 - lr * weight_decay)
    factors = (factor * limited.view(1) * s).contiguous()
    sides = (factors, None) if moments.space.right else (None, factors)
    kernels.scaled_step_(weight, grad, *sides, lr=lr, weight_decay=weight_decay, **hyper["noise"])


APOLLO_RULE = Rule(
    "apollo",
    apollo_update,
    reads_weight=True,
    decays=True,
    decay_follows=True,
    factors=by_rows()(apollo_factors),
    fused=fused_apollo,
    fuses=keeps_plain_moments,
)
MINI_RULE = replace(APOLLO_RULE, name="apollo_mini")


class APOLLO(LowRankOptimizer):
    """APOLLO on hidden matrices, Adam at the same learning rate on the rest, as released.

    granularity: channel or tensor. `projection: svd` is the paper's variant with GaLore's basis. A changed
    rank wants scale in proportion to 1 / rank. Q-APOLLO is `weights: int8` (blocks of 128) with
    `state_dtype: fp32`.
    """

    subspace_defaults: ClassVar[SubspaceOptions] = {
        **LowRankOptimizer.subspace_defaults,
        "adamw_eps": 1e-6,
        "weights": "param",
        "projection": "random",
    }
    weight_block: ClassVar[int] = 128
    rules: ClassVar[Mapping[str, Rule]] = {Role.HIDDEN_MATRIX: APOLLO_RULE, **LEGACY_ELSEWHERE}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        granularity: Literal["channel", "tensor"] = "channel",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **shared: Unpack[SubspaceOptions],
    ):
        options = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "granularity": granularity,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, lr, weight_decay, options, shared)


class APOLLOMini(APOLLO):
    """APOLLO with rank 1 and one factor per matrix, at about the memory of SGD."""

    rules: ClassVar[Mapping[str, Rule]] = {Role.HIDDEN_MATRIX: MINI_RULE, **LEGACY_ELSEWHERE}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 1,
        update_proj_gap: int = 200,
        scale: float = 128.0,
        granularity: Literal["channel", "tensor"] = "tensor",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        **shared: Unpack[SubspaceOptions],
    ):
        super().__init__(
            params,
            lr,
            weight_decay,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            granularity=granularity,
            betas=betas,
            eps=eps,
            **shared,
        )
