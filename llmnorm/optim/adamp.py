"""AdamP: Adam that does not move scale-invariant weights outwards (arXiv 2006.08217).

    u = m^ / (sqrt(v^) + eps)
    for the rows, then for the whole matrix, with d elements per view:
        if max_i |cos(g_i, w_i)| < delta / sqrt(d):   u_i <- u_i - <w^_i, u_i> w^_i,  wd <- wd_ratio wd;  stop
    W <- (1 - lr wd) W - lr u                         w^_i = w_i / (||w_i|| + eps)

A gradient that is orthogonal to its weight is the mark of a weight whose length does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import Hyper, Rule, adam_direction, wide
from llmnorm.optim.update_size import ADAM_LIKE

_Dims = int | tuple[int, int]
ROWS: _Dims = -1
WHOLE: _Dims = (-2, -1)


def _norm(x: Tensor, dim: _Dims) -> Tensor:
    return x.square().sum(dim, keepdim=True).sqrt()


def _orthogonal(grad: Tensor, weight: Tensor, dim: _Dims, hyper: Hyper) -> Tensor:
    """Whether all views of a matrix have gradients orthogonal to their weights; shape (..., 1, 1)."""
    products = (grad * weight).sum(dim, keepdim=True).abs()
    lengths = _norm(grad, dim).clamp(min=hyper["eps"]) * _norm(weight, dim).clamp(min=hyper["eps"])
    elements = weight.shape[-1] if dim == ROWS else weight.shape[-2] * weight.shape[-1]
    return (products / lengths).amax((-2, -1), keepdim=True) < hyper["delta"] / math.sqrt(elements)


def _tangent(update: Tensor, weight: Tensor, dim: _Dims, eps: float) -> Tensor:
    unit = weight / (_norm(weight, dim) + eps)
    return update - (unit * update).sum(dim, keepdim=True) * unit


def adamp_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Tensor:
    """u, projected where the weight looks scale-invariant, and the decay that belongs to it."""
    u = adam_direction(grad, state, hyper)
    g, w = wide(grad), wide(weight)
    by_row = _orthogonal(g, w, ROWS, hyper)
    as_whole = _orthogonal(g, w, WHOLE, hyper)
    whole = torch.where(as_whole, _tangent(u, w, WHOLE, hyper["eps"]), u)
    u = torch.where(by_row, _tangent(u, w, ROWS, hyper["eps"]), whole)
    ratio = torch.where(by_row | as_whole, hyper["wd_ratio"], 1.0)
    return u + hyper["weight_decay"] * ratio * w


MATRIX = Rule("adamp", adamp_update, ADAM_LIKE, reads_weight=True, decays=True)
VECTOR = Rule("adamp", adam_direction, ADAM_LIKE, elementwise=True)


class AdamP(MatrixOptimizer):
    """AdamP on every matrix, Adam with the same betas and eps on vectors."""

    rules: ClassVar[Mapping[str, Rule]] = {
        Role.HIDDEN_MATRIX: MATRIX,
        Role.EMBEDDING: MATRIX,
        Role.LM_HEAD: MATRIX,
        Role.VECTOR: VECTOR,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **shared: Unpack[Options],
    ):
        options = {"betas": betas, "eps": eps, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__(params, lr, weight_decay, options, shared)
