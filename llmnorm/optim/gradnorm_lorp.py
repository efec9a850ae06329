"""GradNormLoRP: weight-normalized rows whose directions move in a low-rank subspace (arXiv 2412.19616).

    W_i = g_i v_i / |v_i|  row by row           v is W itself and g its row norms, so nothing is stored twice
    dg_i = G_i . v_i / |v_i|                    dv = G - dg v / |v|, orthogonal to v_i in every row
    g <- (1 - lr wd) g - lr Adam(dg)
    v <- W - lr a back(Adam(project(dv)))       B, M, V as in GaLore
    W_i <- g_i v_i / |v_i|

A reconstruction from the paper's equations: the released code never writes the decomposition back. State:
that of GaLore and 3 m for the norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from llmnorm.optim.lowrank import low_rank_moments
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer, SubspaceOptions
from llmnorm.optim.matrix import State
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import ADAMW_ELSEWHERE, Hyper, Rule, wide

_TINY = 1e-30


def _row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True)


def split_gradient(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dg (..., m, 1), dv (..., m, n)) at |v_i| = g_i; the row of a zero weight has no direction to keep."""
    unit = wide(weight) / _row_norms(weight).clamp_min(_TINY)
    along = (wide(grad) * unit).sum(-1, keepdim=True)
    return along, wide(grad) - along * unit


def gradnorm_lorp_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Tensor:
    """Moves the row norms in `state`; returns what moves the directions."""
    norm_grad, tangent = split_gradient(grad, weight)
    if "row_norm" not in state:
        state["row_norm"] = _row_norms(weight)
        for key in ("norm_exp_avg", "norm_exp_avg_sq"):
            state[key] = torch.zeros_like(state["row_norm"])
    moments = low_rank_moments(tangent.to(grad.dtype), state, hyper)
    beta1, beta2 = hyper["betas"]
    first, second = state["norm_exp_avg"], state["norm_exp_avg_sq"]
    first.lerp_(norm_grad, 1 - beta1)
    second.mul_(beta2).addcmul_(norm_grad, norm_grad, value=1 - beta2)
    adam = (first / moments.bias1) / ((second / moments.bias2).sqrt() + hyper["eps"])
    state["row_norm"].mul_(1 - hyper["lr"] * hyper["weight_decay"]).sub_(hyper["lr"] * adam)
    return hyper["scale"] * moments.space.back(moments.corrected(hyper["eps"]))


def with_norms(weight: Tensor, state: State) -> Tensor:
    """W_i = g_i v_i / |v_i|."""
    return (wide(weight) * (state["row_norm"] / _row_norms(weight).clamp_min(_TINY))).to(weight.dtype)


GRADNORM_LORP = Rule(
    "gradnorm_lorp", gradnorm_lorp_update, reads_weight=True, decays=True, project=with_norms
)


class GradNormLoRP(LowRankOptimizer):
    """GradNormLoRP on hidden matrices, AdamW on the rest. `scale` is a."""

    rules: ClassVar[Mapping[str, Rule]] = {Role.HIDDEN_MATRIX: GRADNORM_LORP, **ADAMW_ELSEWHERE}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 250,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **shared: Unpack[SubspaceOptions],
    ):
        options = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, lr, weight_decay, options, shared)
