"""LAMB: Adam with a trust ratio per layer (arXiv 1904.00962).

    r = m^ / (sqrt(v^) + eps) + wd W
    W <- W - lr min(||W||, phi) / ||r|| r            ratio 1 where either norm is 0, and for vectors

m^ and v^ are Adam's bias-corrected moments; the decay is inside the ratio, as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.normalization import squared_norm
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import Parts, by_rows, sums
from llmnorm.optim.rules import Hyper, Rule, adam_direction, wide
from llmnorm.optim.update_size import ADAM_LIKE


@by_rows()
def lamb_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Parts:
    """min(||W||, phi) / ||r|| r."""
    r = adam_with_decay(grad, state, hyper, weight)
    squares = yield sums(squared_norm(r), squared_norm(weight))
    length, size = (square.sqrt() for square in squares)
    trusted = size.clamp(max=hyper["max_weight_norm"]) if hyper["max_weight_norm"] else size
    return r * torch.where((length > 0) & (size > 0), trusted / length, torch.ones_like(length))


def adam_with_decay(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Tensor:
    """r: the update of vectors, which have no trust ratio."""
    return adam_direction(grad, state, hyper) + hyper["weight_decay"] * wide(weight)


LAYER = Rule("lamb", lamb_update, reads_weight=True, decays=True)
VECTOR = Rule("lamb", adam_with_decay, ADAM_LIKE, elementwise=True, reads_weight=True, decays=True)


class LAMB(MatrixOptimizer):
    """LAMB on every matrix, the same without trust ratio on vectors. `max_weight_norm` is phi, 10 in the
    authors' code; null for none."""

    rules: ClassVar[Mapping[str, Rule]] = {
        Role.HIDDEN_MATRIX: LAYER,
        Role.EMBEDDING: LAYER,
        Role.LM_HEAD: LAYER,
        Role.VECTOR: VECTOR,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        max_weight_norm: float | None = 10.0,
        **shared: Unpack[Options],
    ):
        options = {"betas": betas, "eps": eps, "max_weight_norm": max_weight_norm}
        super().__init__(params, lr, weight_decay, options, shared)
