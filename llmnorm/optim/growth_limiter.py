"""The norm-growth limiter of Fira (arXiv 2410.01623) and APOLLO (arXiv 2412.05270).

|S_t| <= 1.01 |S_{t-1}|          S_{t-1}: what the limiter let through the last time; falling is free
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmnorm.optim.matrix import State

GROWTH = 1.01
_KEY = "limiter_norm"


def growth_limit(norm: Tensor, state: State) -> Tensor:
    """1/q, the factor of an S of Frobenius norm `norm` (..., 1, 1); keeps the norm that passed in `state`.

    The first S passes whole. A zero S leaves the kept norm as it is: a kept 0 would hold the layer at
    nothing for a thousand steps.
    """
    if _KEY not in state:
        state[_KEY] = torch.zeros_like(norm)
    previous = state[_KEY]
    ratio = (norm / (previous + 1e-8)).clamp_min(GROWTH) / GROWTH
    factor = torch.where(previous > 0, 1 / ratio, 1.0)
    state[_KEY] = torch.where(norm > 0, norm * factor, previous)
    return factor
