"""Muon: momentum, orthogonalized by Newton-Schulz (Keller Jordan, 2024; Moonlight, arXiv 2502.16982).

    M <- M + (1 - mu) (G - M)        U = G + mu (M - G) with Nesterov, else M
    W <- (1 - lr wd) W - lr c(m, n) orth(U)        c = sqrt(max(1, m/n)) in `lr_mode: paper` (= keller)

The momentum is an average, as in Keller's code and torch; Moonlight and Dion keep the sum M <- mu M + G,
which is 1 / (1 - mu) times as large and gives the same update. Decay uses the bare learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.newton_schulz import (
    Coefficients,
    NewtonSchulzMethod,
    Preconditioner,
    coefficient_set,
    orthogonalize,
    orthogonalize_rows,
)
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import ADAMW_ELSEWHERE, Hyper, Rule, moment
from llmnorm.optim.update_size import LrMode, RowBlocks, Size

NS_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
JORDAN = (3.4445, -4.7750, 2.0315)


def momentum_direction(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """The (Nesterov) momentum of the gradient; it may be the buffer itself, so it must not be written to."""
    buffer = moment(state, "momentum_buffer", grad, hyper)
    g = grad.to(buffer.dtype)
    buffer.lerp_(g, 1 - hyper["momentum"])
    return g.lerp(buffer, hyper["momentum"]) if hyper["nesterov"] else buffer


def orth(matrix: Tensor, hyper: Hyper) -> Tensor:
    """The polar factor of `matrix` by the engine that the options choose, block by block if it has blocks."""

    def engine(x: Tensor) -> Tensor:
        return orthogonalize(
            x,
            hyper["ns_coefficients"],
            hyper["ns_steps"],
            hyper["eps"],
            NS_DTYPES[hyper["ns_dtype"]],
            hyper["ns_method"],
            hyper["ns_preconditioner"],
        )

    blocks = hyper.get("blocks")
    return orthogonalize_rows(matrix, blocks, engine) if blocks else engine(matrix)


def muon_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """orth of the momentum."""
    return orth(momentum_direction(grad, state, hyper), hyper)


def keller_scale(m: int, n: int, hyper: Hyper) -> float:
    """sqrt(max(1, m/n))."""
    return math.sqrt(max(1, m / n))


def orthogonal_to_unit(m: int, n: int, hyper: Hyper) -> float:
    """An m x n matrix with singular values 1 has RMS 1 / sqrt(max(m, n))."""
    return math.sqrt(max(m, n))


MUON = Rule("muon", muon_update, Size(keller_scale, orthogonal_to_unit), stacks=True)


class Muon(MatrixOptimizer):
    """Muon on hidden matrices, AdamW on the rest; the defaults are torch.optim.Muon's without weight decay.

    `ns_coefficients`: a set's name (jordan, you, polar_express, cans, aol) or three numbers.
    `ns_method: gram` is cheaper where one side of a matrix is much the longer. `ns_preconditioner: aol` saves
    an iteration, and the set aol needs it. `row_blocks: {q_proj: 64}` orthogonalizes
    blocks of 64 rows (heads) by themselves; a list gives uneven blocks, such as the parts of a fused QKV.
    """

    rules: ClassVar[Mapping[str, Rule]] = {Role.HIDDEN_MATRIX: MUON, **ADAMW_ELSEWHERE}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = JORDAN,
        ns_steps: int = 5,
        eps: float = 1e-7,
        ns_dtype: Literal["bf16", "fp32"] = "bf16",
        ns_method: NewtonSchulzMethod = "standard",
        ns_preconditioner: Preconditioner = "none",
        lr_mode: LrMode = "paper",
        row_blocks: RowBlocks | None = None,
        **shared: Unpack[Options],
    ):
        coefficient_set(ns_coefficients, ns_steps, ns_preconditioner)
        options = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "eps": eps,
            "ns_dtype": ns_dtype,
            "ns_method": ns_method,
            "ns_preconditioner": ns_preconditioner,
            "lr_mode": lr_mode,
            "row_blocks": row_blocks,
        }
        super().__init__(params, lr, weight_decay, options, shared)
