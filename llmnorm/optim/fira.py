"""Fira: GaLore's subspace, and outside of it the gradient scaled as Adam scales inside (arXiv 2410.01623).

    R, M, V as in GaLore        c = sqrt(1 - b2^t) / (1 - b1^t)        limit: see `growth_limiter.py`
    phi = |N| / |R| per row of W on the right side, per column on the left

    paper      N = c M / (sqrt(V) + eps)    S = limit(phi (G - back(R)))      W <- W - lr a (back(N) + S)
    released   N = M / (sqrt(V) + eps)      S = limit(phi (G - a back(R)))    W <- W - lr c (a back(N) + S)

Published numbers come from the released form: there the part outside is 1/a larger, and (1 - a) of the raw
gradient inside leaks into it. Either way the sum is one product of rank r and a multiple of G,

    u back(N) + phi (G - k back(R)) / q = back(u N - phi k R / q) + phi G / q,
    |phi (G - k back(R))|^2 = sum_i phi_i^2 (|g_i|^2 - (2 k - k^2) |r_i|^2),

so no residual is ever stored. State: GaLore's and one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from llmnorm.optim.growth_limiter import growth_limit
from llmnorm.optim.lowrank import LowRankMoments, low_rank_moments
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer, SubspaceOptions
from llmnorm.optim.matrix import State
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import ADAMW_ELSEWHERE, LEGACY_ELSEWHERE, Hyper, Rule, decay_after, wide

_PHI_EPS = 1e-8


def _full_rank(
    grad: Tensor, moments: LowRankMoments, adam: Tensor, inside: float, removed: float, state: State
) -> Tensor:
    """back(inside * adam) + limit(phi (G - removed * back(R)))."""
    low, space = moments.low, moments.space
    dim = -1 if space.right else -2
    g = wide(grad)
    low_norm = torch.linalg.vector_norm(low, dim=dim, keepdim=True)
    phi = torch.linalg.vector_norm(adam, dim=dim, keepdim=True) / (low_norm + _PHI_EPS)
    squares = g.square().sum(dim, keepdim=True) - (2 * removed - removed**2) * low_norm.square()
    # Rounding may leave less than nothing of a gradient that lies in the subspace.
    norm = (phi.square() * squares.clamp_min(0)).sum((-2, -1), keepdim=True).sqrt()
    factor = growth_limit(norm, state) * phi
    return space.back(inside * adam - removed * factor * low) + factor * g


def released_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Tensor:
    """The update of the released code, with the decay that follows it."""
    moments, scale = low_rank_moments(grad, state, hyper), hyper["scale"]
    update = _full_rank(grad, moments, moments.uncorrected(hyper["eps"]), scale, scale, state)
    return decay_after(moments.correction * update, hyper, weight)


def paper_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """The update of the paper."""
    moments = low_rank_moments(grad, state, hyper)
    adam = moments.correction * moments.uncorrected(hyper["eps"])
    return hyper["scale"] * _full_rank(grad, moments, adam, 1.0, 1.0, state)


RELEASED = Rule("fira", released_update, reads_weight=True, decays=True, decay_follows=True)
PAPER = Rule("fira", paper_update)


class Fira(LowRankOptimizer):
    """Fira on hidden matrices, Adam at the same learning rate on the rest, as released.

    `scale` is a: 0.25 up to 350M parameters, 0.0625 above. Needs a projection with orthonormal rows.
    """

    subspace_defaults: ClassVar[SubspaceOptions] = {
        **LowRankOptimizer.subspace_defaults,
        "adamw_eps": 1e-6,
        "weights": "param",
    }
    variants: ClassVar[Mapping[str, Mapping[str, Rule]]] = {
        "released": {Role.HIDDEN_MATRIX: RELEASED, **LEGACY_ELSEWHERE},
        "paper": {Role.HIDDEN_MATRIX: PAPER, **ADAMW_ELSEWHERE},
    }
    orthonormal: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        variant: Literal["released", "paper"] = "released",
        **shared: Unpack[SubspaceOptions],
    ):
        options = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "betas": betas,
            "eps": eps,
            "variant": variant,
        }
        super().__init__(params, lr, weight_decay, options, shared)
