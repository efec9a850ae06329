"""PowerNorm and Unified Norm: each feature over its root mean square, with a gradient of their own.

    z = x / sqrt(psi2 + eps),    y = weight * z + bias

No mean is subtracted. psi2 is [d], one number per feature, or [B, T, d] where `statistics` is prefix; no
gradient passes through it, and what the backward pass subtracts in its stead comes from running means. So
their gradients differ from numerical ones by definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .batch_statistics import (
    BatchStatisticsNorm,
    counted,
    means,
    pooled,
    prefix_means,
    token_sums,
    toward,
    widen,
)


class _Normalize(torch.autograd.Function):
    """z and y as above; dx = compensate(g, z) / sqrt(psi2 + eps), dweight = sum of dy r z, dbias of dy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, psi2: Tensor, norm: _PowerNorm, found: Any
    ) -> Tensor:
        wide = widen(x)
        inverse = (psi2 + norm.eps).rsqrt().to(wide.dtype)
        ctx.save_for_backward(x, weight, inverse, psi2)
        ctx.norm, ctx.found = norm, found
        return (wide * inverse * weight + bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, psi2 = ctx.saved_tensors
        z, dy = widen(x) * inverse, widen(dy)
        ratio = ctx.norm.gradient_ratio(psi2, ctx.found)
        scaled = dy if ratio is None else dy * ratio
        dx = ctx.norm.compensate(scaled * weight, z, ctx.found) * inverse
        dweight = (scaled * z).flatten(0, -2).sum(0)
        dbias = dy.flatten(0, -2).sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


class _PowerNorm(BatchStatisticsNorm):
    """What the two have in common: weight, bias, phi (`mean_square`) and nu (`projection`)."""

    initial_values: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}
    initial_statistics: ClassVar[dict[str, float]] = {"mean_square": 1.0, "projection": 0.0}
    mean_square: Tensor
    projection: Tensor

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        statistics: str,
        synchronize: bool,
        statistics_decay: float,
        statistics_warmup: int,
    ) -> None:
        super().__init__(hidden_size, eps, statistics, synchronize)
        self.decay, self.warmup = statistics_decay, statistics_warmup
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.add_statistic("mean_square", hidden_size)
        self.add_statistic("projection", hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            a, b = self._affine()
            return (widen(x) * a + b).to(x.dtype)
        found = self.found(self.observe, x)
        psi2 = self.psi2(x, found).to(widen(x).dtype)
        return _Normalize.apply(x, self.weight, self.bias, psi2, self, found)

    def _affine(self) -> tuple[Tensor, Tensor]:
        return widen(self.weight) * (self.mean_square + self.eps).rsqrt(), widen(self.bias)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """a = weight / sqrt(phi + eps), b = bias."""
        return self._affine()

    def current(self, sums: Tensor, otherwise: Tensor) -> Tensor:
        """The means over the tokens of this forward pass, of all processes if `synchronize`; `otherwise`
        where none counts.
        """
        sums = pooled(sums, self.synchronize)
        return torch.where(sums[0] > 0, means(sums), otherwise.to(sums.dtype))

    def prefix_squares(self, x: Tensor, otherwise: Tensor) -> Tensor:
        return prefix_means(self.tokens, widen(x).square(), otherwise)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}, statistics={self.statistics}, warmup={self.warmup}"

    def observe(self, x: Tensor) -> Any:
        """What this forward pass needs of the running statistics as they are now; records its sums."""
        raise NotImplementedError

    def psi2(self, x: Tensor, found: Any) -> Tensor:
        raise NotImplementedError

    def gradient_ratio(self, psi2: Tensor, found: Any) -> Tensor | None:
        """r, where g = r * weight * dy."""
        return None

    def compensate(self, g: Tensor, z: Tensor, found: Any) -> Tensor:
        """g less what stands in for the gradient through psi2; records the sums of the backward pass."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Seen:
    """psi2 [d] of a forward pass, or, where each token has its own, that of a token without a prefix; and the
    tokens that count.
    """

    psi2: Tensor
    per_token: bool
    mask: Tensor | None


class PowerNorm(_PowerNorm):
    """PowerNorm: z = x / sqrt(psi2 + eps), y = weight * z + bias (PowerNorm: Rethinking Batch Normalization
    in Transformers, arXiv 2003.07845).

    psi2 is the mean square over the batch for the first `statistics_warmup` updates, and then phi, the
    running one from before this step: phi <- a phi + (1 - a) mean(x^2), a = `statistics_decay`, from 1.
    Backward:

        g = weight * dy,  h = g - (1 - b) nu z,  dx = h / sqrt(psi2 + eps),  nu <- nu + mean(h z)

    with b = `gradient_decay` and nu from 0; h = g for a token that does not count, as it moves no statistic.
    The released code divides by the current batch's statistic also after the warm-up; here, as in the paper,
    both passes use the same psi2. Its GroupScaling, which divides each token by its own root mean square
    first, is `token_rms`.

    x [..., d], y its shape and dtype.
    """

    def __init__(
        self, hidden_size: int, eps: float, *, gradient_decay: float, token_rms: bool, **settings: Any
    ) -> None:
        super().__init__(hidden_size, eps, **settings)
        self.gradient_decay, self.token_rms = gradient_decay, token_rms

    def forward(self, x: Tensor) -> Tensor:
        if not self.token_rms:
            return super().forward(x)
        wide = widen(x)
        scaled = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return super().forward(scaled).to(x.dtype)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        if self.token_rms:
            raise ValueError("norm_options.token_rms=true divides each token by its own root mean square")
        return super().coefficients()

    @torch.no_grad()
    def observe(self, x: Tensor) -> _Seen:
        sums = token_sums(self.mask, widen(x).square())
        source = self.statistics if self.step < self.warmup else "running"
        psi2 = self.mean_square.clone()
        if source == "batch":
            psi2 = self.current(sums, psi2)
        self.record("forward", sums)
        return _Seen(psi2, source == "prefix", self.mask)

    @torch.no_grad()
    def psi2(self, x: Tensor, found: _Seen) -> Tensor:
        return self.prefix_squares(x, found.psi2) if found.per_token else found.psi2

    def compensate(self, g: Tensor, z: Tensor, found: _Seen) -> Tensor:
        h = g - counted(found.mask, (1 - self.gradient_decay) * self.projection.to(z.dtype) * z)
        self.record("backward", token_sums(found.mask, h * z))
        return h

    def move(self, kind: str, sums: Tensor, number: int) -> None:
        if kind == "forward":
            toward(self.mean_square, means(sums), self.decay, sums)
        else:
            self.projection += means(sums).to(self.projection.dtype)  # of no token: 0


@dataclass(frozen=True)
class _Window:
    """What a forward pass of Unified Norm saw: its number, psi2 [d] if the tokens share one, phi before it,
    whether it is an outlier, the sum of the window's other logarithms, and the tokens that count.
    """

    number: int
    psi2: Tensor | None
    mean_square: Tensor
    skipped: Tensor
    other_logarithms: Tensor | None
    mask: Tensor | None


def _logarithm(moments: Tensor) -> Tensor:
    return moments.clamp_min(torch.finfo(torch.float32).tiny).log()


class UnifiedNorm(_PowerNorm):
    """Unified Normalization: z = x / sqrt(psi2 + eps), y = weight * z + bias (Unified Normalization for
    Accelerating and Stabilizing Transformers, arXiv 2208.01313).

    With m the mean square of the current batch, psi2 = m in the first `window` updates and before update
    `statistics_warmup`, and then the geometric mean of the last `window` of them, exp(mean(log m)). Eval mode
    uses phi <- a phi + (1 - a) psi2, a = `statistics_decay`. Backward, with r = sqrt(psi2 + eps) / sqrt(phi +
    eps) cut to [1/5, 5] (1 up to update max(1000, `statistics_warmup`)):

        g = r weight dy,   dx = (g - nu z) / sqrt(psi2 + eps),   dweight = sum of dy r z

    nu <- a nu + (1 - a) * mean over the window of mean(g z), this one included. With `outlier_filter` a
    batch is an outlier if for any feature the window's arithmetic mean exceeds its geometric one by more than
    `window` times the variance of all sqrt(m) in it: it is normalized by its own m, with r = 1 and its own
    mean(g z) in place of nu, and leaves phi and nu in the windows instead.

    In prefix and running, nothing of the current batch enters either pass: nu is that of earlier steps.

    x [..., d], y its shape and dtype.
    """

    RATIO_FROM, RATIO_LIMIT = 1000, 5.0
    initial_statistics: ClassVar[dict[str, float]] = {
        **_PowerNorm.initial_statistics,
        "mean_squares": 0.0,
        "projections": 0.0,
    }
    mean_squares: Tensor
    projections: Tensor

    def __init__(
        self, hidden_size: int, eps: float, *, window: int, outlier_filter: bool, **settings: Any
    ) -> None:
        super().__init__(hidden_size, eps, **settings)
        self.window, self.outlier_filter = window, outlier_filter
        self.add_statistic("mean_squares", window, hidden_size)
        self.add_statistic("projections", window, hidden_size)
        self._skipped = torch.zeros((), dtype=torch.bool)

    def _is_early(self, number: int) -> bool:
        return number <= self.window or number < self.warmup

    def _with(self, windows: Tensor, value: Tensor, number: int) -> Tensor:
        windows = windows.clone()
        windows[number % self.window] = value
        return windows

    def _smoothed(self, m: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """(psi2, whether m is an outlier) for the mean square m [d] of update `number`."""
        inliers = torch.zeros((), dtype=torch.bool, device=m.device)
        if self._is_early(number):
            return m, inliers
        window = self._with(self.mean_squares, m.to(self.mean_squares.dtype), number)
        geometric = _logarithm(window).mean(0).exp()
        if not self.outlier_filter:
            return geometric, inliers
        spread = self.mean_squares.sqrt().var() * self.window
        outlier = (window.mean(0) - geometric > spread).any()
        return torch.where(outlier, m.to(geometric.dtype), geometric), outlier

    @torch.no_grad()
    def observe(self, x: Tensor) -> _Window:
        sums = token_sums(self.mask, widen(x).square())
        number = self.step + 1
        psi2, skipped = None, torch.zeros((), dtype=torch.bool, device=x.device)
        others = None
        if self.statistics == "batch":
            psi2, skipped = self._smoothed(self.current(sums, self.mean_square), number)
        elif self.statistics == "running":
            psi2 = self.mean_square.clone()
        elif not self._is_early(number):
            neutral = torch.ones_like(self.mean_square)
            others = _logarithm(self._with(self.mean_squares, neutral, number)).sum(0)
        found = _Window(number, psi2, self.mean_square.clone(), skipped, others, self.mask)
        self.record("forward", sums)
        return found

    @torch.no_grad()
    def psi2(self, x: Tensor, found: _Window) -> Tensor:
        if found.psi2 is not None:
            return found.psi2
        squares = self.prefix_squares(x, found.mean_square)
        if found.other_logarithms is None:
            return squares
        return ((found.other_logarithms + _logarithm(squares)) / self.window).exp()

    def gradient_ratio(self, psi2: Tensor, found: _Window) -> Tensor | None:
        if found.number <= max(self.RATIO_FROM, self.warmup):
            return None
        ratio = ((psi2 + self.eps) / (found.mean_square + self.eps)).sqrt()
        ratio = ratio.clamp(1 / self.RATIO_LIMIT, self.RATIO_LIMIT)
        return torch.where(found.skipped, torch.ones_like(ratio), ratio)

    def _mean_projection(self, gz: Tensor, skipped: Tensor, number: int) -> Tensor:
        """mean(g z) [d] of the batch, or its mean over the window."""
        if self._is_early(number):
            return gz
        return torch.where(skipped, gz, self._with(self.projections, gz, number).mean(0))

    def compensate(self, g: Tensor, z: Tensor, found: _Window) -> Tensor:
        sums = token_sums(found.mask, g * z)
        nu = self.projection
        if self.statistics == "batch":
            gz = self.current(sums, nu).to(nu.dtype)
            mean = self._mean_projection(gz, found.skipped, found.number)
            nu = torch.where(found.skipped, mean, torch.lerp(mean, nu, self.decay))
        compensated = g - counted(found.mask, nu.to(z.dtype) * z)
        self.record("backward", sums)  # may move nu, which has been used
        return compensated

    def move(self, kind: str, sums: Tensor, number: int) -> None:
        mean = means(sums).to(self.mean_square.dtype)
        slot, some = number % self.window, sums[0] > 0
        if kind == "forward":
            psi2, self._skipped = self._smoothed(mean, number)
            kept = torch.where(self._skipped | ~some, self.mean_square, mean)
            self.mean_squares[slot] = kept
            toward(self.mean_square, psi2, self.decay, sums)
        else:
            smoothed = self._mean_projection(mean, self._skipped, number)
            self.projections[slot] = torch.where(self._skipped | ~some, self.projection, mean)
            toward(self.projection, smoothed, self.decay, sums)
