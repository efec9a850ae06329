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
from llmnorm.optim.normalization import inner, squared_norm
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import Parts, by_rows, largest, maxima, shape_of, sums
from llmnorm.optim.rules import Hyper, Rule, adam_direction, wide
from llmnorm.optim.update_size import ADAM_LIKE


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


def _cosine(product: Tensor, g_norm: Tensor, w_norm: Tensor, eps: float) -> Tensor:
    return product.abs() / (g_norm.clamp(min=eps) * w_norm.clamp(min=eps))


@by_rows()
def adamp_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Parts:
    """u, projected where the weight looks scale-invariant, and the decay that belongs to it."""
    u = adam_direction(grad, state, hyper)
    g, w, eps = wide(grad), wide(weight), hyper["eps"]
    m, n = shape_of(grad, hyper)
    g_row, w_row, along = _norm(g), _norm(w), (g * w).sum(-1, keepdim=True)
    (row_cosine,) = yield maxima(largest(_cosine(along, g_row, w_row, eps), (-2, -1)))
    g_square, w_square, product, u_along = yield sums(
        squared_norm(g), squared_norm(w), along.sum(-2, keepdim=True), inner(u, w)
    )
    by_row = row_cosine < hyper["delta"] / math.sqrt(n)
    w_norm = w_square.sqrt()
    as_whole = _cosine(product, g_square.sqrt(), w_norm, eps) < hyper["delta"] / math.sqrt(m * n)

    row_unit, unit = w / (w_row + eps), w / (w_norm + eps)
    row_tangent = u - (row_unit * u).sum(-1, keepdim=True) * row_unit
    tangent = u - u_along / (w_norm + eps) * unit
    u = torch.where(by_row, row_tangent, torch.where(as_whole, tangent, u))
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
