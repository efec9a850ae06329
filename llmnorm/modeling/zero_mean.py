"""The zero-mean residual stream, and its compressed form in which one feature of d is left out.

With P = I - 11^T / d, which removes the mean of d features: Pre-LN reads its stream x only through LayerNorm,
and LN(x) = RMSNorm(P x), so it computes the same from P x. A matrix that writes to the stream may therefore
be replaced by P W (`recenter`). A stream of zero mean has d - 1 free features: the last is minus the sum of
the others (`decompress`), so it need be neither stored nor computed (Pre-RMSNorm and Pre-CRMSNorm
Transformers, arXiv 2305.14858):

    writer    W [d, in]     ->  P W without its last row                          (`compress_writer`)
    reader    W [out, d]    ->  W_{:, 1..d-1} - w_d 1^T, w_d its last column       (`compress_reader`)

Parameters of a compressed model hold d - 1 features. The stream is computed with zeros behind them, up to a
multiple of ALIGNMENT, since matrix products are slow on odd widths; the zeros are never read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig

# 16 bytes of a 16-bit number: what tensor cores ask of every operand. Divides all usual hidden sizes, whose
# compressed streams are then hidden_size wide again.
ALIGNMENT = 8


def recenter(weight: Tensor, dim: int) -> Tensor:
    """P W: `weight` less its mean along `dim`, the one with the stream's d features; computed in fp64."""
    wide = weight.double()
    return (wide - wide.mean(dim, keepdim=True)).to(weight.dtype)


def compress_writer(weight: Tensor, dim: int) -> Tensor:
    """P W without its last feature: d -> d - 1 along `dim`."""
    return recenter(weight, dim).narrow(dim, 0, weight.shape[dim] - 1)


def compress_reader(weight: Tensor, dim: int = 1) -> Tensor:
    """What reads x_{1..d-1} as `weight` reads x of zero mean: W_{1..d-1} - w_d, d -> d - 1 along `dim`."""
    count = weight.shape[dim] - 1
    return weight.narrow(dim, 0, count) - weight.narrow(dim, count, 1)


def decompress(x: Tensor, dim: int = -1) -> Tensor:
    """(x_1, ..., x_{d-1}, -sum of them): the stream, or what writes to it, with all d features."""
    return torch.cat((x, -x.sum(dim, keepdim=True)), dim)


def aligned(width: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def widen(x: Tensor, width: int) -> Tensor:
    """`x` [..., n] with zeros behind it, [..., width]."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def unwiden(x: Tensor, width: int) -> Tensor:
    """The first `width` features of x."""
    return x[..., :width]


class StreamReader(nn.Linear):
    """A matrix that reads a compressed stream: weight [out, d - 1], input of d - 1 features or the aligned
    width.
    """

    def forward(self, z: Tensor) -> Tensor:
        width = aligned(self.in_features)
        return F.linear(widen(z, width), widen(self.weight, width), self.bias)


class StreamWriter(nn.Linear):
    """A matrix that writes to a compressed stream: weight [d - 1, in], output of the aligned width."""

    def forward(self, y: Tensor) -> Tensor:
        width = aligned(self.out_features)
        if width == self.out_features:
            return super().forward(y)
        bias = None if self.bias is None else widen(self.bias, width)
        return F.linear(y, F.pad(self.weight, (0, 0, 0, width - self.out_features)), bias)


class RecenteredWriter(nn.Linear):
    """A matrix W = P W, and bias b = P b, that writes to a stream kept at zero mean by its weights alone.

    Training projects gradients before clipping (`zero_mean_outputs`) and weights after the step: then the
    RMSNorm that reads the stream is trained exactly as LayerNorm would be.
    """

    zero_mean_outputs = True

    def project_weights_(self) -> None:
        """W <- P W, b <- P b, in at least fp32."""
        for parameter in self.parameters(recurse=False):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            parameter.copy_(parameter - parameter.mean(0, dtype=wide))


def stream_linears(config: LlmNormConfig) -> tuple[type[nn.Linear], type[nn.Linear]]:
    """The classes of the matrices that read the stream and of those that write to it."""
    if config.is_compressed:
        return StreamReader, StreamWriter
    return nn.Linear, RecenteredWriter if config.is_recentered else nn.Linear
