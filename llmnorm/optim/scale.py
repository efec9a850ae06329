"""SCALE: normalized gradients, with momentum on the head only (arXiv 2506.16659).

    hidden matrix   W <- W - lr G / RMS_row(G)          a row is an output unit: RMS over its fan-in
    embedding       W <- W - lr G / RMS_column(G)       stored (vocabulary, hidden): its units are columns
    lm_head         M <- M + (1 - mu)(G - M),   W <- W - lr M / RMS_row(M)
    vector          Adam, eps added to the uncorrected root of the second moment

`variant: released` divides by the RMS, as the authors' code does, and the published learning rates belong to
it; `variant: paper` divides by the L2 norm, which is sqrt(slice length) times as large. State: one momentum
of the head, Adam's two moments of vectors, nothing else. A tied embedding counts as the head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.normalization import RELATIVE_FLOOR, normalize_columns, normalize_rows
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import Parts, by_rows
from llmnorm.optim.rules import LEGACY_ADAMW, Hyper, Rule, moment
from llmnorm.optim.update_size import LrMode, Size, one


@by_rows()
def normalized_rows(grad: Tensor, state: State, hyper: Hyper) -> Parts:
    """G / RMS over dim 1: the rule of every matrix stored (out, in)."""
    return normalize_rows(grad, hyper)


@by_rows()
def normalized_columns(grad: Tensor, state: State, hyper: Hyper) -> Parts:
    """G / RMS over dim 0: the rule of an embedding (vocabulary, hidden)."""
    return normalize_columns(grad, hyper)


@by_rows()
def normalized_momentum_rows(grad: Tensor, state: State, hyper: Hyper) -> Parts:
    """The row rule on the running average of the gradient; a bias correction would cancel in it."""
    buffer = moment(state, "momentum_buffer", grad, hyper)
    buffer.lerp_(grad.to(buffer.dtype), 1 - hyper["momentum"])
    return normalize_rows(buffer, hyper)


def _inverse_rms(x: Tensor, dim: int, floor: float) -> Tensor:
    """1 / max(RMS_dim(x), floor RMS(x)) of a matrix, as `rms_normalize` divides, in one pass over x."""
    sizes = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float32) / math.sqrt(x.shape[dim])
    whole = sizes.square().mean().sqrt()
    return torch.maximum(sizes, floor * whole).clamp(min=torch.finfo(torch.float32).tiny).reciprocal()


def fused_rows(weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, decay: float) -> None:
    """`normalized_rows` and its step."""
    rows = _inverse_rms(grad, -1, hyper["eps"])
    kernels.scaled_step_(weight, grad, rows, lr=lr, weight_decay=decay, **hyper["noise"])


def fused_columns(weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, decay: float) -> None:
    """`normalized_columns` and its step."""
    columns = _inverse_rms(grad, -2, hyper["eps"])
    kernels.scaled_step_(weight, grad, columns=columns, lr=lr, weight_decay=decay, **hyper["noise"])


def fused_momentum_rows(
    weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, decay: float
) -> None:
    """`normalized_momentum_rows` and its step."""
    buffer = moment(state, "momentum_buffer", grad, hyper)
    buffer.lerp_(grad.to(buffer.dtype), 1 - hyper["momentum"])
    fused_rows(weight, buffer, state, hyper, lr, decay)


def _rules(row: Size, column: Size) -> dict[str, Rule]:
    return {
        Role.HIDDEN_MATRIX: Rule("scale", normalized_rows, row, fused=fused_rows),
        Role.EMBEDDING: Rule("scale", normalized_columns, column, fused=fused_columns),
        Role.LM_HEAD: Rule("scale", normalized_momentum_rows, row, fused=fused_momentum_rows),
        Role.VECTOR: LEGACY_ADAMW,
    }


RELEASED = _rules(Size(one, one), Size(one, one))
PAPER = _rules(
    Size(lambda m, n, hyper: 1 / math.sqrt(n), one),
    Size(lambda m, n, hyper: 1 / math.sqrt(m), one),
)


class SCALE(MatrixOptimizer):
    """SCALE (Stochastic Column-normalized Last-layer Momentum); each role has its rule, see the module.

    `eps` is the floor of a norm, relative to the RMS of the whole gradient. The authors train vectors with
    their own rate: `adamw_lr` 2e-2 up to 350M parameters, 1e-3 above.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Rule]]] = {"released": RELEASED, "paper": PAPER}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        eps: float = RELATIVE_FLOOR,
        variant: Literal["released", "paper"] = "released",
        lr_mode: LrMode = "paper",
        **shared: Unpack[Options],
    ):
        options = {"momentum": momentum, "eps": eps, "variant": variant, "lr_mode": lr_mode}
        super().__init__(params, lr, weight_decay, options, shared)
