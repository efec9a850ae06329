"""A norm of one's own, as an example: docs/plugins.md walks through it.

model:
  norm: configs/plugins/partial_rms.py:PartialRMS
  norm_options: {fraction: 0.25, placement: pre}
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PartialRMS(nn.Module):
    """pRMSNorm: y = gain * x / sqrt(mean(x_1^2 .. x_k^2) + eps), k = ceil(fraction * d) (arXiv 1910.07467).

    x [..., d] -> y of the same shape and dtype; statistics in fp32 or wider, rounded once.
    """

    def __init__(self, hidden_size: int, eps: float, fraction: float = 0.25) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"norm_options.fraction={fraction} must be above 0 and at most 1")
        self.eps = eps
        self.size = -int(-fraction * hidden_size // 1)
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide[..., : self.size].square().mean(-1, keepdim=True)
        return (wide * (mean_square + self.eps).rsqrt() * self.weight).to(x.dtype)
