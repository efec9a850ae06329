"""SinkGD: gradient multi-normalization by Sinkhorn's iteration (arXiv 2502.06742).

    X <- G;  L times:   every row of X to RMS 1, then every column of X to RMS 1
    W <- (1 - lr wd) W - lr alpha X

X stays diag(a) G diag(b) throughout, so only the vectors a and b are iterated, on the squares of G:
a^2 = n / (S b^2) and b^2 = m / (S^T a^2). Rows and columns that are only rounding noise next to the rest
stay out, as zeros: balancing would bring any of them to full size. State: none.
Embeddings and heads must not be treated so (row normalization blows up rare tokens); they get AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.normalization import RELATIVE_FLOOR, rms
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import Parts, by_rows, shape_of, sums
from llmnorm.optim.rules import ADAMW_ELSEWHERE, Hyper, Rule, wide
from llmnorm.optim.update_size import LrMode, Size, one


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0."""
    return (x > 0) / x.clamp(min=1e-30)


@by_rows()
def sinkgd_update(grad: Tensor, state: State, hyper: Hyper) -> Parts:
    """G with its rows and columns balanced to RMS 1; the columns exactly, for they come last."""
    m, n = shape_of(grad, hyper)
    g = wide(grad)
    (total,) = yield sums(g.square().sum(-2, keepdim=True))
    whole = total.mean(-1, keepdim=True).div(m).sqrt().clamp(min=torch.finfo(g.dtype).tiny)
    x = g / whole
    x = x * (rms(x, -1) > hyper["eps"]) * (total.div(m).sqrt() > hyper["eps"] * whole)
    squares = x.square()
    columns = squares.new_ones((*x.shape[:-2], n, 1))  # b^2
    for _ in range(hyper["iterations"]):
        rows = n * _inverse(squares @ columns)  # a^2
        (total,) = yield sums(squares.mT @ rows)
        columns = m * _inverse(total)
    return rows.sqrt() * x * columns.sqrt().mT


def fused_sinkgd(weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, decay: float) -> None:
    """`sinkgd_update` and its step: G is read, never stored again."""
    m, n = grad.shape
    rows = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32) / math.sqrt(n)
    columns = torch.linalg.vector_norm(grad, dim=0, dtype=torch.float32) / math.sqrt(m)
    whole = rows.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    kernels.sinkgd_step_(
        weight,
        grad,
        lr=lr,
        weight_decay=decay,
        iterations=hyper["iterations"],
        eps=1e-30,
        rows=(rows > hyper["eps"] * whole) / whole,  # so that G has RMS 1, and noise stays out
        columns=(columns > hyper["eps"] * whole).float(),
        **hyper["noise"],
    )


SIZE = Size(lambda m, n, hyper: hyper["alpha"], one)
SINKGD = Rule("sinkgd", sinkgd_update, SIZE, stacks=True, fused=fused_sinkgd)


class SinkGD(MatrixOptimizer):
    """SinkGD on hidden matrices, AdamW with the same lr on the rest: the paper's lr 0.02 is `alpha` times
    smaller for matrices. `eps` is the RMS, relative to the whole gradient, below which a row is noise."""

    rules: ClassVar[Mapping[str, Rule]] = {Role.HIDDEN_MATRIX: SINKGD, **ADAMW_ELSEWHERE}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        alpha: float = 0.05,
        iterations: int = 5,
        eps: float = RELATIVE_FLOOR,
        lr_mode: LrMode = "paper",
        **shared: Unpack[Options],
    ):
        options = {"alpha": alpha, "iterations": iterations, "eps": eps, "lr_mode": lr_mode}
        super().__init__(params, lr, weight_decay, options, shared)
