"""A causal depthwise convolution over tokens: how linear attention knows the order of its nearest tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .initialization import Normal


class CausalConvolution(nn.Module):
    """y_t = sum_{i < k} w_i * x_{t - i}, one filter of k taps for each channel.

    x [B, T, channels], history [B, k - 1, channels] of the tokens before them -> y like x, in its dtype.
    Inside a document: segments [B, T] cuts the taps that reach over a boundary.
    """

    parameter_roles: ClassVar[dict[str, str]] = {"weight": "vector"}  # filters, no map between features

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        # torch's own variance for a convolution, U(-1, 1) / sqrt(k).
        self.initial_values = {"weight": Normal((3 * kernel_size) ** -0.5)}
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))

    def with_history(self, x: Tensor, history: Tensor | None) -> Tensor:
        """[B, k - 1 + T, channels]: what the taps read."""
        if history is None:
            history = x.new_zeros(x.shape[0], self.kernel_size - 1, x.shape[2])
        return torch.cat((history.to(x.dtype), x), 1)

    def forward(self, inputs: Tensor, segments: Tensor | None = None) -> Tensor:
        """inputs: `with_history`."""
        weight, reach = self.weight.to(inputs.dtype), self.kernel_size - 1
        time = inputs.shape[1] - reach
        y = inputs[:, reach:] * weight[:, 0]
        for back in range(1, self.kernel_size):
            tap = inputs[:, reach - back : reach - back + time]
            if segments is not None:
                inside = torch.zeros_like(segments, dtype=inputs.dtype)
                inside[:, back:] = (segments[:, back:] == segments[:, :-back]).to(inputs.dtype)
                tap = tap * inside[..., None]
            y = torch.addcmul(y, tap, weight[:, back])
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={self.kernel_size}"
