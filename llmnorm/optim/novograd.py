"""NovoGrad: gradients normalized by one second moment per layer (arXiv 1905.11286).

    v <- b2 v + (1 - b2) ||G||^2,  v = ||G||^2 at first         one number per layer
    M <- b1 M + (1 - b1) (G / (sqrt(v) + eps) + wd W)
    W <- W - lr M

The factor (1 - b1) is the paper's gradient averaging; without it lr would count 1 / (1 - b1) times as much.
"""

from __future__ import annotations

import math
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
from llmnorm.optim.rules import Hyper, Rule, moment, wide
from llmnorm.optim.update_size import ADAM_RMS, Size


@by_rows(whole_state=["second_moment"])
def novograd_update(grad: Tensor, state: State, hyper: Hyper, weight: Tensor) -> Parts:
    """The momentum of the layer-normalized gradient and the decay."""
    beta1, beta2 = hyper["betas"]
    (power,) = yield sums(squared_norm(grad))
    held = state.setdefault("second_moment", torch.zeros_like(power))
    # A moment that is still zero has seen no gradient, and starts at the first one.
    held.copy_(torch.where(held > 0, held.lerp(power, 1 - beta2), power))
    normalized = wide(grad) / (held.sqrt() + hyper["eps"]) + hyper["weight_decay"] * wide(weight)
    momentum = moment(state, "momentum_buffer", grad, hyper)
    return momentum.lerp_(normalized.to(momentum.dtype), 1 - beta1)


SIZE = Size(usual=lambda m, n, hyper: ADAM_RMS / math.sqrt(m * n))
NOVOGRAD = Rule("novograd", novograd_update, SIZE, reads_weight=True, decays=True)


class NovoGrad(MatrixOptimizer):
    """NovoGrad on every parameter, each a layer; state is one momentum and one number."""

    rules: ClassVar[Mapping[str, Rule]] = dict.fromkeys(Role, NOVOGRAD)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        **shared: Unpack[Options],
    ):
        super().__init__(params, lr, weight_decay, {"betas": betas, "eps": eps}, shared)
