"""SWAN: SGD with whitening and normalization, without state (arXiv 2412.13148).

    N = (G - mean_row G) / std_row G                  every row standardized over its fan-in
    D = (N N^T)^(-1/2) N                              by Newton-Schulz, on the shorter side
    W <- (1 - lr wd) W - lr alpha D RMS(N) / RMS(D)

    S = N N^T;  Y = S / ||S||_F,  Z = I;  k times:  T = 3 I - Z Y;  Y <- beta Y T,  Z <- beta T Z    (one T)

beta = 1/2 is the iteration that converges to the inverse root. Later accounts drop the centering
(`center: false`). Other roles get AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.normalization import rms, rms_normalize, to_unit_rms
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import ADAMW_ELSEWHERE, Hyper, Rule, wide
from llmnorm.optim.update_size import LrMode, Size, one

_BETA = 0.5


def whiten(matrix: Tensor, iterations: int) -> Tensor:
    """(A A^T)^(-1/2) A up to a factor, over the shorter side; zero stays zero. At least fp32 throughout."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    a = wide(matrix.mT if tall else matrix)
    gram = a @ a.mT
    norm = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True)
    y = gram / norm.clamp(min=torch.finfo(gram.dtype).tiny)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    z = eye.expand_as(gram)
    for _ in range(iterations):
        t = 3 * eye - z @ y
        y, z = _BETA * (y @ t), _BETA * (t @ z)
    result = z @ a
    return result.mT if tall else result


def swan_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """The whitened, standardized gradient with the RMS that it had before whitening (1 without dead rows)."""
    g = to_unit_rms(grad)
    centered = g - g.mean(dim=-1, keepdim=True) if hyper["center"] else g
    # Whitening brings every row to full size, so what centering leaves of a constant row, or rounding of a
    # vanishing one, must be zero beforehand.
    alive = rms(centered, -1) > hyper["eps"] * (1 + rms(g, -1))
    normalized = rms_normalize(centered * alive, -1)
    return to_unit_rms(whiten(normalized, hyper["iterations"])) * rms(normalized, (-2, -1))


SWAN_RULE = Rule("swan", swan_update, Size(lambda m, n, hyper: hyper["alpha"], one), stacks=True)


class SWAN(MatrixOptimizer):
    """SWAN on hidden matrices, AdamW on the rest. No released code is known; `alpha` is not verified."""

    rules: ClassVar[Mapping[str, Rule]] = {Role.HIDDEN_MATRIX: SWAN_RULE, **ADAMW_ELSEWHERE}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        alpha: float = 0.05,
        iterations: int = 10,
        center: bool = True,
        eps: float = 1e-6,
        lr_mode: LrMode = "paper",
        **shared: Unpack[Options],
    ):
        options = {"alpha": alpha, "iterations": iterations, "center": center, "eps": eps, "lr_mode": lr_mode}
        super().__init__(params, lr, weight_decay, options, shared)
