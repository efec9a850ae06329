"""PRepBN: from a norm of each token to BatchNorm plus a scaled identity, a little with every update."""

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


@dataclass(frozen=True)
class _Seen:
    """lambda, the tokens that count and how many they are, mean and variance [d]: those of the batch, or else
    the running ones.
    """

    share: float
    mask: Tensor | None
    count: Tensor
    mean: Tensor
    variance: Tensor


class _Standardize(torch.autograd.Function):
    """xhat = (x - mean) / sqrt(variance + eps), with the gradient through mean and variance of the tokens
    that count, of all processes:

        dx = (dy - mean(dy) - xhat mean(dy xhat)) / sqrt(variance + eps)

    where both means are over all tokens' dy divided by the number of tokens that count, and a token that does
    not count has dx = dy / sqrt(variance + eps).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: _Seen, eps: float, synchronize: bool) -> Tensor:
        mean = seen.mean.to(x.dtype)
        inverse = (seen.variance + eps).rsqrt().to(x.dtype)
        ctx.save_for_backward(x, mean, inverse)
        ctx.seen, ctx.synchronize = seen, synchronize
        return (x - mean) * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse = ctx.saved_tensors
        xhat = (x - mean) * inverse
        sums = pooled(token_sums(None, dy, dy * xhat), ctx.synchronize)[1:]
        through_mean, through_variance = (sums / ctx.seen.count.clamp(min=1)).to(dy.dtype).chunk(2)
        through = counted(ctx.seen.mask, through_mean + xhat * through_variance)
        return (dy - through) * inverse, None, None, None


class _Keep(torch.autograd.Function):
    """y, with a zero gradient for parameters that this step does not read: DDP waits for one of each."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes]
        return (grad_outputs[0], *zeros)


class PRepBN(BatchStatisticsNorm):
    """PRepBN: y = lambda N(x) + (1 - lambda) RepBN(x), RepBN(x) = weight xhat + bias + eta x, xhat = (x -
    mean) / sqrt(var + eps) (SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
    Re-parameterized Batch Normalization, arXiv 2405.11582).

    N is the norm of each token, `token_norm`. In update t, counted from 0, lambda = 1 for `hold_steps`
    updates, in which the statistics see nothing, and then falls from 1 to 0 over `interpolation_steps`:

        lambda(t) = max(0, T - (t - hold)) / T

    The running mean and (unbiased) variance move by 1 - `statistics_decay` = 0.1 a step. weight and eta
    (`identity_scale`) begin at `branch_init`: 0 in SLAB's language model, where RepBN begins at 0, and 1 in
    its vision models. Its gradient is a true one, also through the statistics.

    Eval mode keeps lambda where the updates have brought it, so that a model in training is evaluated as what
    it is. The released code drops N in eval mode at once, whatever lambda; at lambda = 0 both are the same,
    one number and one shift per feature.

    x [..., d], y its shape and dtype.
    """

    initial_statistics: ClassVar[dict[str, float]] = {"running_mean": 0.0, "running_variance": 1.0}
    running_mean: Tensor
    running_variance: Tensor

    def __init__(
        self,
        token_norm: nn.Module,
        hidden_size: int,
        eps: float,
        *,
        statistics: str,
        synchronize: bool,
        statistics_decay: float,
        hold_steps: int,
        interpolation_steps: int,
        branch_init: float,
    ) -> None:
        super().__init__(hidden_size, eps, statistics, synchronize)
        self.decay, self.hold_steps = statistics_decay, hold_steps
        self.interpolation_steps = interpolation_steps
        standardize = {"batch": self._by_batch, "prefix": self._by_prefix, "running": self._by_running}
        self.standardize = standardize[statistics]
        branch_init = float(branch_init)
        self.initial_values = {"weight": branch_init, "bias": 0.0, "identity_scale": branch_init}
        self.token_norm = token_norm
        self.weight = nn.Parameter(torch.full((hidden_size,), branch_init))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.identity_scale = nn.Parameter(torch.full((1,), branch_init))
        self.add_statistic("running_mean", hidden_size)
        self.add_statistic("running_variance", hidden_size)

    @property
    def token_share(self) -> float:
        """lambda, after as many updates as there have been."""
        since = self.step - self.hold_steps
        return 1.0 if since < 0 else max(0, self.interpolation_steps - since) / self.interpolation_steps

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._mixed(x, self.token_share, self._at_rest)
        seen = self.found(self.observe, x)
        y = self._mixed(x, seen.share, lambda wide: self._repbn(wide, seen))
        if seen.share == 1.0:
            return _Keep.apply(y, self.weight, self.bias, self.identity_scale)
        return _Keep.apply(y, *self.token_norm.parameters()) if seen.share == 0.0 else y

    def _mixed(self, x: Tensor, share: float, repbn: Any) -> Tensor:
        if share == 1.0:
            return self.token_norm(x)
        y = repbn(widen(x))
        if share > 0.0:
            y = share * self.token_norm(x) + (1 - share) * y
        return y.to(x.dtype)

    def _at_rest(self, wide: Tensor) -> Tensor:
        a, b = self._affine()
        return wide * a + b

    def _affine(self) -> tuple[Tensor, Tensor]:
        scale = widen(self.weight) * (self.running_variance + self.eps).rsqrt()
        return scale + self.identity_scale, self.bias - scale * self.running_mean

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """a = weight / sqrt(var + eps) + eta, b = bias - mean weight / sqrt(var + eps)."""
        if self.token_share > 0.0:
            raise ValueError(
                f"lambda={self.token_share:.3g} after {self.step} updates, and is 0 only after "
                f"hold_steps + interpolation_steps = {self.hold_steps + self.interpolation_steps}"
            )
        return self._affine()

    def _repbn(self, wide: Tensor, seen: _Seen) -> Tensor:
        xhat = self.standardize(wide, seen)
        return xhat * self.weight + self.bias + self.identity_scale * wide

    def _by_batch(self, wide: Tensor, seen: _Seen) -> Tensor:
        return _Standardize.apply(wide, seen, self.eps, self.synchronize)

    def _by_running(self, wide: Tensor, seen: _Seen) -> Tensor:
        return (wide - seen.mean) * (seen.variance + self.eps).rsqrt()

    def _by_prefix(self, wide: Tensor, seen: _Seen) -> Tensor:
        """By mean and variance [B, T, d] of each token's document up to it, two tokens or more.

        In fp64: the variance of two tokens may be a small difference of large squares.
        """
        x = wide.double()
        mean = prefix_means(self.tokens, x, seen.mean, least=2)
        square = prefix_means(self.tokens, x.square(), seen.variance + seen.mean.square(), least=2)
        variance = (square - mean.square()).clamp_min(0.0)
        return ((x - mean) * (variance + self.eps).rsqrt()).to(wide.dtype)

    @torch.no_grad()
    def observe(self, x: Tensor) -> _Seen:
        """lambda and the statistics of this forward pass; records its sums."""
        share = self.token_share
        if share == 1.0:
            nothing = x.new_zeros(self.sizes["forward"], dtype=torch.float64)
            self.record("forward", nothing)
            return _Seen(share, None, nothing[:1], self.running_mean, self.running_variance)
        sums = self._sums(widen(x))
        mean, variance, count = self.running_mean.clone(), self.running_variance.clone(), sums[:1]
        if self.statistics == "batch":
            together = pooled(sums, self.synchronize)
            count = together[:1]
            batch, running = _mean_and_variance(together), (mean, variance)
            mean, variance = (
                torch.where(count > 0, one, other.double()) for one, other in zip(batch, running, strict=True)
            )
        self.record("forward", sums)
        return _Seen(share, self.mask, count, mean, variance)

    @property
    def sizes(self) -> dict[str, int]:
        return {"forward": 1 + 2 * self.hidden_size}

    def _sums(self, wide: Tensor) -> Tensor:
        """Number, sum and sum of squares, the latter from the centered ones: two passes and fp64, since
        E[x^2] - E[x]^2 in fp32 has lost the variance where the mean is 1000 times larger.
        """
        origin = means(token_sums(self.mask, wide)).to(wide.dtype)
        u = wide - origin
        count, first, second = token_sums(self.mask, u, u.square()).split(
            [1, self.hidden_size, self.hidden_size]
        )
        origin = origin.double()
        return torch.cat([count, first + count * origin, second + origin * (2 * first + count * origin)])

    def move(self, kind: str, sums: Tensor, number: int) -> None:
        mean, variance = _mean_and_variance(sums)
        unbiased = variance * sums[0] / (sums[0] - 1).clamp(min=1)
        toward(self.running_mean, mean, self.decay, sums)
        toward(self.running_variance, unbiased, self.decay, sums)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, eps={self.eps}, statistics={self.statistics}, hold={self.hold_steps}, "
            f"interpolation={self.interpolation_steps}"
        )


def _mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance [d], fp64, behind a number, sums and sums of squares."""
    mean, square = means(sums).chunk(2)
    return mean, (square - mean.square()).clamp_min(0.0)
