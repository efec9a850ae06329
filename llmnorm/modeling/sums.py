"""The residual sum u = a * xs + b * y: fixed, or with a learned b.

xs is the shortcut and y the output of the sublayer, both [..., d]; a sum has the dtype of the stream. Learned
scales are computed in fp32 or wider and the sum is rounded once. Their parameters have one dimension, also
where they hold one number, since FSDP2 shards no scalar.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

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
