"""The variance of an update's gradient, from the gradients of its micro-batches as they pass by.

    g = sum_j c_j over the J micro-batches of all processes; the c_j are independent and alike, so

    Var(g) = E ||g - E g||^2 = (J sum_j ||c_j||^2 - ||g||^2) / (J - 1)        without bias

c_j is micro-batch j's share of the token-exact gradient, before it is accumulated or summed over processes.
It is never stored: hooks add up squares while the backward pass makes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class GradientSquares:
    """Adds ||c_j||^2 of every backward pass between `start` and `stop` on this process."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._total: Tensor | None = None
        for parameter in parameters:
            # A hook on a leaf sees the sum over all its uses in one backward pass, before accumulation.
            parameter.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        if self._total is not None:
            # Norms of rows first: torch's fp32 sum over a whole matrix is 8e-5 off on a CPU.
            rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
            self._total += torch.linalg.vector_norm(rows).square()

    def start(self) -> None:
        """Begin at zero."""
        self._total = torch.zeros((), dtype=torch.float32, device=self._device)

    def stop(self) -> Tensor:
        """The sum since `start`: an fp32 scalar on the device."""
        assert self._total is not None, "started before"
        total, self._total = self._total, None
        return total


def gradient_variance(squares: float, grad_norm: float, parts: int) -> float:
    """Var(g) from sum_j ||c_j||^2, ||g|| and J; rounding below zero counts as zero."""
    assert parts > 1, "one part has no variance"
    return max(0.0, (parts * squares - grad_norm**2) / (parts - 1))
