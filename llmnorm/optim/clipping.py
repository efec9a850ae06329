"""Ways to clip gradients besides the global norm, each a row of `CLIPPINGS`.

    per_parameter   g_i <- g_i min(1, c / ||g_i||)                                each parameter by itself
    agc             g_r <- g_r min(1, c max(||w_r||, 1e-3) / ||g_r||)             each row, not of the head
    zclip           g <- g (mu + c^2 / z sigma) / ||g||  where z = (||g|| - mu) / sigma > c

AGC: High-Performance Large-Scale Image Recognition Without Normalization, arXiv 2102.06171; a vector is one
unit. ZClip: arXiv 2504.02507; mu and sigma^2 are running averages of the global norm after clipping.
All act on `p.grad` in place, before the optimizer reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.optim.matrix import gather, local
from llmnorm.optim.roles import Role, RoutedParameter


class Clipping(Protocol):
    """What the loop asks of a way to clip."""

    def clip(self, parameters: Sequence[RoutedParameter], norm: Tensor) -> None:
        """Scale gradients in place; `norm` is their global 2-norm."""

    def state(self) -> dict[str, float]:
        """What a resumed run needs."""

    def restore(self, state: dict[str, float]) -> None:
        """Take over what `state` returned."""


class _Stateless:
    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: dict[str, float]) -> None:
        assert not state


class PerParameterClipping(_Stateless):
    """Each parameter's gradient has norm `limit` at most."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def clip(self, parameters: Sequence[RoutedParameter], norm: Tensor) -> None:
        for routed in parameters:
            grad = routed.parameter.grad
            if grad is not None:
                length = gather(torch.linalg.vector_norm(grad, dtype=torch.float32))
                local(grad).mul_((self.limit / length.clamp(min=1e-12)).clamp(max=1.0).to(grad.dtype))


class AdaptiveGradientClipping(_Stateless):
    """A row's gradient is at most `limit` times as long as the row; the head is spared.

    Gradients must be whole or sharded by rows, as FSDP2 shards them.
    """

    smallest_weight = 1e-3  # rows that start at zero could never leave it otherwise

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def clip(self, parameters: Sequence[RoutedParameter], norm: Tensor) -> None:
        for routed in parameters:
            grad = routed.parameter.grad
            if grad is None or routed.role is Role.LM_HEAD:
                continue
            if grad.ndim >= 2:
                g, w = local(grad), local(routed.parameter.detach())
                lengths, sizes = (
                    torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32) for x in (g, w)
                )
            else:
                g = local(grad)
                lengths, sizes = (
                    gather(torch.linalg.vector_norm(x, dtype=torch.float32))
                    for x in (grad, routed.parameter.detach())
                )
            allowed = self.limit * sizes.clamp(min=self.smallest_weight)
            g.mul_((allowed / lengths.clamp(min=1e-12)).clamp(max=1.0).to(g.dtype))


class ZClip:
    """The global norm is pulled back to mu + c^2 / z sigma when it is more than `limit` deviations above mu.

    The first 25 norms only fill the averages. Norms that are not finite are left to the guards.
    """

    decay, warmup = 0.97, 25

    def __init__(self, limit: float) -> None:
        self.limit = limit
        # count, mean, variance: on the device of the norm, so that clipping waits for nothing.
        self.statistics = torch.zeros(3, dtype=torch.float64)

    def clip(self, parameters: Sequence[RoutedParameter], norm: Tensor) -> None:
        factor = self.factor(norm)
        for routed in parameters:
            grad = routed.parameter.grad
            if grad is not None:
                local(grad).mul_(factor.to(grad.device, grad.dtype))

    def factor(self, norm: Tensor) -> Tensor:
        """What the gradient of this norm is multiplied by (fp64); the averages take the norm in."""
        self.statistics = self.statistics.to(norm.device)
        count, mean, variance = self.statistics.unbind()
        value = norm.double()
        deviation = variance.sqrt()
        z = (value - mean) / deviation.clamp(min=1e-12)
        clipped = mean + self.limit**2 / z.clamp(min=1e-12) * deviation
        target = torch.where((count >= self.warmup) & (z > self.limit), clipped, value)
        factor = torch.where(value > 0, target / value.clamp(min=1e-300), 1.0)
        self._remember(value, target)
        return torch.where(value.isfinite(), factor, 1.0)

    def _remember(self, value: Tensor, target: Tensor) -> None:
        """A plain average over the warm-up, a running one afterwards."""
        count, mean, variance = self.statistics.unbind()
        share = torch.where(count < self.warmup, 1 / (count + 1), 1 - self.decay)
        difference = target - mean
        new_mean = mean + share * difference
        new_variance = (1 - share) * (variance + share * difference.square())
        new = torch.stack([count + 1, new_mean, new_variance])
        self.statistics = torch.where(value.isfinite(), new, self.statistics)

    def state(self) -> dict[str, float]:
        return dict(zip(("count", "mean", "variance"), self.statistics.tolist(), strict=True))

    def restore(self, state: dict[str, float]) -> None:
        self.statistics = torch.tensor(
            [state["count"], state["mean"], state["variance"]], dtype=torch.float64
        )


CLIPPINGS: dict[str, Callable[[float], Clipping]] = {
    "per_parameter": PerParameterClipping,
    "agc": AdaptiveGradientClipping,
    "zclip": ZClip,
}


def create_clipping(name: str, limit: float) -> Clipping:
    """The clipping `name`; raises `UserError` for an unknown name or a limit that is not positive."""
    if name not in CLIPPINGS:
        raise UserError(
            f"train.grad_clip_mode={name!r} is not known; choose one of global, {', '.join(CLIPPINGS)}"
        )
    if not limit > 0:
        raise UserError(f"train.grad_clip={limit} must be greater than 0; null turns clipping off")
    return CLIPPINGS[name](limit)
