"""GaLore: Adam in a low-rank subspace of the gradient (arXiv 2403.03507).

    every T steps: B = the r leading singular vectors of G on one side
    R = project(G)     M <- b1 M + (1 - b1) R     V <- b2 V + (1 - b2) R^2
    released   W <- W - lr a sqrt(1 - b2^t) / (1 - b1^t) back(M / (sqrt(V) + eps));   W <- (1 - lr wd) W
    paper      W <- (1 - lr wd) W - lr a back(Adam(M, V)),  eps after the bias correction; square: left

The moments stay as they are when B changes (`moments: keep`), so that they mean other directions afterwards;
`transport` moves them. 8-bit GaLore is `state_bits: 8`; Q-GaLore (arXiv 2407.08296) is that with INT8
weights, an INT4 basis and lazy refresh: `weights: int8`, `projection_bits: 4`, `lazy_refresh: true`. State:
min(m, n) r + 2 max(m, n) r elements per matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from llmnorm.optim.lowrank import add_back_, fused_moments, keeps_plain_moments, low_rank_moments
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer, SubspaceOptions
from llmnorm.optim.matrix import State
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import ADAMW_ELSEWHERE, LEGACY_ELSEWHERE, Hyper, Rule, decay_after


def released_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Tensor:
    """The update of the released code, with the decay that follows it."""
    moments = low_rank_moments(grad, state, hyper)
    direction = moments.space.back(moments.uncorrected(hyper["eps"]))
    return decay_after(direction * (hyper["scale"] * moments.correction), hyper, weight)


def paper_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """The update of the paper's Algorithm 2."""
    moments = low_rank_moments(grad, state, hyper)
    return hyper["scale"] * moments.space.back(moments.corrected(hyper["eps"]))


def fused_released(
    weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, weight_decay: float
) -> None:
    """`released_update` and its step: moments in one pass, then one product that accumulates into W."""
    moments = fused_moments(grad, state, hyper, corrected=False, direction=True)
    decay = 1 - lr * weight_decay
    size = lr * decay * hyper["scale"] * moments.correction
    add_back_(weight, moments.direction, moments.space, lr=size, decay=decay)


def fused_paper(
    weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, weight_decay: float
) -> None:
    """`paper_update` and its step, as `fused_released`."""
    moments = fused_moments(grad, state, hyper, corrected=True, direction=True)
    size = lr * hyper["scale"]
    add_back_(weight, moments.direction, moments.space, lr=size, decay=1 - lr * weight_decay)


def accumulates(hyper: Hyper) -> bool:
    """Whether the product may write the weight; it rounds to nearest."""
    return keeps_plain_moments(hyper) and not hyper["stochastic_rounding"]


RELEASED = Rule(
    "galore",
    released_update,
    reads_weight=True,
    decays=True,
    decay_follows=True,
    fused=fused_released,
    fuses=accumulates,
)
PAPER = Rule("galore", paper_update, fused=fused_paper, fuses=accumulates)


class GaLore(LowRankOptimizer):
    """GaLore on hidden matrices, Adam at the same learning rate on the rest, as released.

    `scale` is a, `update_proj_gap` T. The released runs use lr 0.01, scale 0.25 and gap 200 (7B: 0.005, 500)
    with rank 128, 256, 256, 512 for 60M, 130M, 350M, 1B.
    """

    subspace_defaults: ClassVar[SubspaceOptions] = {
        **LowRankOptimizer.subspace_defaults,
        "adamw_eps": 1e-6,
        "weights": "param",
    }
    sums_projections: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Rule]]] = {
        "released": {Role.HIDDEN_MATRIX: RELEASED, **LEGACY_ELSEWHERE},
        "paper": {Role.HIDDEN_MATRIX: PAPER, **ADAMW_ELSEWHERE},
    }

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

    def context(self, group: Hyper) -> dict[str, Any]:
        return {**super().context(group), "ties_left": group["variant"] == "paper"}
