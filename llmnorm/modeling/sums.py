"""The residual sum u = a * xs + b * y: fixed, with a learned b, or behind a gate.

xs is the shortcut and y the output of the sublayer, both [..., d]; a sum has the dtype of the stream. Learned
scales are computed in fp32 or wider and the sum is rounded once. Their parameters have one dimension, also
where they hold one number, since FSDP2 shards no scalar.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sum = Callable[[Tensor, Tensor], Tensor]


def _add_scaled_shortcut(xs: Tensor, y: Tensor, a: float) -> Tensor:
    return torch.add(y, xs, alpha=a)


def _add_scaled_branch(xs: Tensor, y: Tensor, b: float) -> Tensor:
    return torch.add(xs, y, alpha=b)


def _add_scaled_both(xs: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    return torch.add(a * xs, y, alpha=b)


def weighted_sum(a: float, b: float) -> Sum:
    """(xs, y) -> a * xs + b * y in as few passes as the scales allow."""
    if a == 1.0 and b == 1.0:
        return operator.add
    if b == 1.0:
        return partial(_add_scaled_shortcut, a=a)
    if a == 1.0:
        return partial(_add_scaled_branch, b=b)
    return partial(_add_scaled_both, a=a, b=b)


class LearnedScaleSum(nn.Module):
    """u = xs + scale * y with a learned `scale` of `size` numbers: 1, or d for one per feature.

    SkipInit (arXiv 2002.10444), ReZero (arXiv 2003.04887), LayerScale (arXiv 2103.17239).
    """

    def __init__(self, size: int, initial: float) -> None:
        super().__init__()
        self.initial_values = {"scale": initial}
        self.scale = nn.Parameter(torch.full((size,), initial))

    def forward(self, xs: Tensor, y: Tensor) -> Tensor:
        return (xs + self.scale * y).to(xs.dtype)

    def extra_repr(self) -> str:
        return f"{self.scale.shape[0]}, initial={self.initial_values['scale']:.6g}"


def gate_activations(x: Tensor, gate: Tensor) -> Tensor:
    """y = x - SiLU(gate) * sg(x): the forward is scaled by 1 - SiLU(gate), the gradient of x is not.

    dx = dy and dgate = -SiLU'(gate) * sum(x * dy). sg stops the gradient, so numerical derivatives in x
    disagree by design (GPAS, arXiv 2506.22049). x [..., d], gate [1]; y has the shape and dtype of x.
    """
    return (x - F.silu(gate) * x.detach()).to(x.dtype)


class _Gate(nn.Module):
    initial_values: ClassVar[dict[str, float]] = {"gate": 0.0}

    def __init__(self, total: Sum) -> None:
        super().__init__()
        self.total = total
        self.gate = nn.Parameter(torch.zeros(1))


class GatedSum(_Gate):
    """G(a * xs + b * y) with a learned gate, 0 at first; see `gate_activations`."""

    def forward(self, xs: Tensor, y: Tensor) -> Tensor:
        return gate_activations(self.total(xs, y), self.gate)


class GatedShortcutSum(_Gate):
    """a * G(xs) + b * y with a learned gate, 0 at first; see `gate_activations`."""

    def forward(self, xs: Tensor, y: Tensor) -> Tensor:
        return self.total(gate_activations(xs, self.gate), y)


GATED_SUMS: dict[str, type[_Gate]] = {"sum": GatedSum, "shortcut": GatedShortcutSum}
