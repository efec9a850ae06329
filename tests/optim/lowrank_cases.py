"""The golden run of the low-rank methods: a small matrix, three gradients, and what must come out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def matrix(text: str) -> Tensor:
    """Rows separated by `;`."""
    return torch.tensor([[float(x) for x in row.split()] for row in text.split(";")], dtype=torch.float64)


def weight(m: int, n: int) -> Tensor:
    rows = [[0.1 * math.cos(0.5 * (i + 1) * (j + 1)) for j in range(n)] for i in range(m)]
    return torch.tensor(rows, dtype=torch.float64)


def gradient(t: int, m: int, n: int) -> Tensor:
    def entry(i: int, j: int) -> float:
        return math.sin(0.7 * (i + 1) * (j + 2) + 1.3 * t) / (1 + 0.3 * i + 0.2 * j)

    return torch.tensor([[entry(i, j) for j in range(n)] for i in range(m)], dtype=torch.float64)


def trajectory(method: type, m: int, n: int, steps: int = 3, **options) -> tuple[Tensor, list[Tensor]]:
    """The weight after `steps` updates at lr 0.01, the limiter's norm after each."""
    parameter = weight(m, n).requires_grad_()
    optimizer = method([("w", parameter)], lr=0.01, **options)
    norms = []
    for t in range(1, steps + 1):
        parameter.grad = gradient(t, m, n)
        optimizer.step()
        norms.append(optimizer.state[parameter].get("limiter_norm", torch.zeros(())).clone())
    return parameter.detach(), norms
