"""Conda: Adam in the singular basis of the momentum (arXiv 2509.24218).

    M <- b1 M + (1 - b1) G
    every T steps: P = the k x k singular basis of M on its shorter side (k = min(m, n))
    G' = G P^T, M' = M P^T  (m >= n)     or     G' = P^T G, M' = P^T M  (m < n)
    V <- b2 V + (1 - b2) G'^2                        kept in the basis and never rotated when P changes
    W <- W - lr s sqrt(1 - b2^t) / (1 - b1^t) Back(M' / (sqrt(V) + eps));   W <- (1 - lr wd) W

As in the released code: eps meets the uncorrected root, decay follows the update, s = 0.25. The basis is a
plain fp32 tensor here (in bf16 it is no longer orthogonal), and it is found from the k x k Gram matrix, which
leaves the update as it is: the sign and the order of singular vectors cancel in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.normalization import alive
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import LEGACY_ADAMW, Hyper, Rule, count, decay_after, moment, wide
from llmnorm.optim.update_size import ADAM_RMS, Size


def singular_basis(matrix: Tensor) -> Tensor:
    """Orthogonal (k, k): columns are the singular vectors of `matrix` on its shorter side."""
    x = wide(matrix)
    gram = x.mT @ x if x.shape[-2] >= x.shape[-1] else x @ x.mT
    # Only directions matter; without the scale a small gradient squared would underflow.
    largest = gram.abs().amax(dim=(-2, -1), keepdim=True)
    return torch.linalg.eigh(gram / largest.clamp(min=torch.finfo(gram.dtype).tiny)).eigenvectors


def conda_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Tensor:
    """The rotated Adam direction, with the bias corrections, and the decay that follows the update."""
    beta1, beta2 = hyper["betas"]
    step = count(state)
    momentum = moment(state, "exp_avg", grad, hyper)
    second = moment(state, "exp_avg_sq", grad, hyper)
    momentum.lerp_(grad.to(momentum.dtype), 1 - beta1)
    if (step - 1) % hyper["update_proj_gap"] == 0:
        state["basis"] = singular_basis(momentum)
    basis = state["basis"]
    tall = grad.shape[-2] >= grad.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        return wide(x) @ basis if tall else basis.mT @ wide(x)

    rotated = rotate(grad)
    second.mul_(beta2).add_((1 - beta2) * rotated.square())
    ratio = rotate(momentum) / (wide(second).sqrt() + hyper["eps"])
    direction = ratio @ basis.mT if tall else basis @ ratio
    # Products leave rounding error where a row or column of all gradients is zero; the ratio is of full size.
    direction = direction * alive(momentum)
    direction = direction * (hyper["scale"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step))
    return decay_after(direction, hyper, weight)


SIZE = Size(usual=lambda m, n, hyper: ADAM_RMS * hyper["scale"])
CONDA = Rule("conda", conda_update, SIZE, reads_weight=True, decays=True, decay_follows=True)


class Conda(MatrixOptimizer):
    """Conda on hidden matrices, Adam with the same learning rate on the rest, as in the released code.

    `update_proj_gap` is T; state is 2 m n + k^2 elements per matrix.
    """

    rules: ClassVar[Mapping[str, Rule]] = {
        Role.HIDDEN_MATRIX: CONDA,
        Role.EMBEDDING: LEGACY_ADAMW,
        Role.LM_HEAD: LEGACY_ADAMW,
        Role.VECTOR: LEGACY_ADAMW,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        update_proj_gap: int = 2000,
        scale: float = 0.25,
        **shared: Unpack[Options],
    ):
        options = {"betas": betas, "eps": eps, "update_proj_gap": update_proj_gap, "scale": scale}
        super().__init__(params, lr, weight_decay, options, shared)
