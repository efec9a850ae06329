"""Linear layers that multiply with a function What = f(W) of their stored matrix; `weight_parametrization.py`
has the equations.

What is computed in every forward pass from W, from learned gains, and from the vectors u and v that belong to
the largest singular value, so that training, evaluation, a recomputed layer and a sharded one that FSDP2 has
gathered see the same. u and v are buffers, saved with the weights. They are constants of the forward pass and
brought up to date by `project_weights_()` after every optimizer step, which gives it whole matrices:

    exact    from the eigendecomposition of the smaller Gram matrix in fp64: u^T W v is s_1 to rounding, and
             as d s_1 / dW = u v^T, the gradient is that of W / s_1(W) itself
    power    `iterations` of power iteration from the former vectors, as published: u^T W v may be below s_1,
             and What above the norm it should have. docs/lipschitz.md has by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig

TINY = 1e-12  # of a length or deviation that divides
FIRST_ITERATIONS = 32  # of power iteration from a random start
Step = dict[str, Any]


class ParametrizedLinear(nn.Linear):
    """y = What x + b; x [..., n], What [m, n] in W's dtype, computed in fp32 or wider."""

    steps: tuple[Step, ...]
    initial_values: dict[str, float]

    @classmethod
    def of(cls, linear: nn.Linear, steps: Iterable[Step]) -> ParametrizedLinear:
        """`linear` under `steps`: the same parameters, role and name, and gains beside them."""
        assert type(linear) is nn.Linear
        made = cls.__new__(cls)
        made.__dict__ = linear.__dict__
        made.steps = tuple(steps)
        made.initial_values = {}
        for step in made.steps:
            if step["name"] == "sigma_reparam":
                made._add_gain("gain", 1, step["initial_gain"])
            elif step["name"] == "weight_norm" or step.get("scaled"):
                made._add_gain("row_gain", linear.out_features, 1.0)
        return made

    def _add_gain(self, name: str, size: int, initial: float) -> None:
        weight = self.weight
        self.initial_values[name] = float(initial)
        self.register_parameter(
            name, nn.Parameter(torch.full((size,), float(initial), dtype=weight.dtype, device=weight.device))
        )

    def effective_weight(self) -> Tensor:
        """What [m, n]."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._under(self.weight, len(self.steps)).to(self.weight.dtype)

    def _under(self, weight: Tensor, count: int, gains: Any = None) -> Tensor:
        """`weight`, whole, after the first `count` steps, in fp32 or wider; gains: another owner of them."""
        matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for step in self.steps[:count]:
            matrix = EQUATIONS[step["name"]](matrix, self if gains is None else gains, step)
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def derived_values(self, weight: Tensor) -> dict[str, Tensor]:
        """First values of what depends on the whole first `weight`: g of weight_norm."""
        for count, step in enumerate(self.steps):
            if step["name"] == "weight_norm":
                return {"row_gain": _lengths(self._under(weight, count)).squeeze(-1)}
        return {}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {' then '.join(step['name'] for step in self.steps)}"


class SpectralLinear(ParametrizedLinear):
    """One whose steps include a division by s_1 = u^T W v; u is `left_vector` [m], v `right_vector` [n]."""

    left_vector: Tensor
    right_vector: Tensor

    @classmethod
    def of(cls, linear: nn.Linear, steps: Iterable[Step]) -> ParametrizedLinear:
        made = super().of(linear, steps)
        for name, size in (("left_vector", linear.out_features), ("right_vector", linear.in_features)):
            made.register_buffer(name, torch.zeros(size, dtype=torch.float32, device=linear.weight.device))
        return made

    def rebuild_buffers(self) -> None:
        """Not a direction yet: until the vectors are loaded or taken from the weights, everything is nan."""
        self.left_vector.fill_(math.nan)
        self.right_vector.fill_(math.nan)

    def derived_values(self, weight: Tensor) -> dict[str, Tensor]:
        """The same, and u and v."""
        derived = super().derived_values(weight)
        gains = {
            name: derived.get(name, getattr(self, name)).to(weight.device) for name in self.initial_values
        }
        left, right = self._vectors(weight, None, SimpleNamespace(**gains))
        return {**derived, "left_vector": left, "right_vector": right}

    @torch.no_grad()
    def project_weights_(self) -> None:
        """Bring u and v up to date; the weights are left alone."""
        former = self.left_vector if torch.isfinite(self.left_vector).all() else None
        left, right = self._vectors(self.weight, former)
        self.left_vector.copy_(left)
        self.right_vector.copy_(right)

    @torch.no_grad()
    def _vectors(self, weight: Tensor, former: Tensor | None, gains: Any = None) -> tuple[Tensor, Tensor]:
        place = next(i for i, step in enumerate(self.steps) if "method" in step)
        matrix, step = self._under(weight, place, gains), self.steps[place]
        if step["method"] == "exact":
            return top_vectors(matrix)
        if former is None:
            start = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(0))
            return power_iteration(matrix, start.to(matrix), FIRST_ITERATIONS)
        return power_iteration(matrix, former.to(matrix), step["iterations"])


def top_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """u [m] and v [n] of the largest singular value of `matrix` [m, n], computed in fp64."""
    wide = matrix.double()
    tall = wide.shape[0] > wide.shape[1]
    flat = wide.mT if tall else wide
    short = torch.linalg.eigh(flat @ flat.mT).eigenvectors[:, -1]
    long = F.normalize(flat.mT @ short, dim=0, eps=TINY)
    return (long, short) if tall else (short, long)


def power_iteration(matrix: Tensor, left: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """v <- W^T u / ||.||, u <- W v / ||.||, `iterations` times from u = `left` [m]."""
    right = left
    for _ in range(iterations):
        right = F.normalize(matrix.mT @ left, dim=0, eps=TINY)
        left = F.normalize(matrix @ right, dim=0, eps=TINY)
    return left, right


def _lengths(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=-1, keepdim=True).clamp_min(TINY)


def _sigma(matrix: Tensor, linear: Any) -> Tensor:
    sigma = linear.left_vector.to(matrix.dtype) @ (matrix @ linear.right_vector.to(matrix.dtype))
    return sigma.clamp_min(TINY)


def _spectral(matrix: Tensor, linear: Any, step: Step) -> Tensor:
    return matrix * (step["scale"] / _sigma(matrix, linear))


def _sigma_reparam(matrix: Tensor, linear: Any, step: Step) -> Tensor:
    return matrix * (linear.gain.to(matrix.dtype) / _sigma(matrix, linear))


def _weight_norm(matrix: Tensor, linear: Any, step: Step) -> Tensor:
    return matrix * (linear.row_gain.to(matrix.dtype).unsqueeze(-1) / _lengths(matrix))


def _conditioned(matrix: Tensor, linear: Any, step: Step) -> Tensor:
    return matrix / _lengths(matrix)


def _standardized(matrix: Tensor, linear: Any, step: Step) -> Tensor:
    centered = matrix - matrix.mean(dim=-1, keepdim=True)
    if step["scaled"]:
        return _weight_norm(centered, linear, step)  # sqrt(n) std is a centered row's length
    return centered * (math.sqrt(matrix.shape[-1]) / _lengths(centered))


def _shifted(matrix: Tensor, linear: Any, step: Step) -> Tensor:
    return matrix + step["shift"] * torch.eye(*matrix.shape, dtype=matrix.dtype, device=matrix.device)


# name -> (matrix under the steps before, its layer, options) -> matrix
EQUATIONS: dict[str, Callable[[Tensor, Any, Step], Tensor]] = {
    "spectral_norm": _spectral,
    "sigma_reparam": _sigma_reparam,
    "weight_norm": _weight_norm,
    "weight_conditioning": _conditioned,
    "weight_standardization": _standardized,
    "spectral_conditioning": _shifted,
}


def parametrize_projections(block: Any, config: LlmNormConfig) -> None:
    """Put the projections of a layer under the config's `weight_parametrization`, where it has one."""
    steps = config.weight_parametrization
    if steps is None:
        return
    kind = SpectralLinear if any("method" in step for step in steps) else ParametrizedLinear
    for owner in (block.self_attn, block.mlp):
        for name in steps[0]["modules"]:
            if hasattr(owner, name):
                setattr(owner, name, kind.of(getattr(owner, name), steps))
