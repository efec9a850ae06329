"""LANTON: learning rates per layer from the noise of its gradients (arXiv 2510.14009).

    B <- b1 B + (1 - b1) G,   O = LMO(B)
    N = ||G_t - G_(t-1)||*^2,   H <- b2 H + (1 - b2) N          in the dual norm of the layer's family
    a = alpha / sqrt(alpha^2 + H)
    W <- (1 - lr wd) W - lr sqrt(a / max a) O                   max over the layers of the family

    family               LMO                          dual norm
    hidden matrices      sqrt(m/n) U V^T              sqrt(m/n) ||.||_nuclear
    embedding and head   radius / n sign              ||.||_1 / n
    vectors              B / RMS(B)                   sqrt(d) ||.||_2

The quietest layer of a family keeps lr, the noisier ones get less. No released code is known: this follows
descriptions of the paper. `alpha: null` takes alpha^2 = the median H of the family, which makes the method
independent of the scale of the loss. G_(t-1) is the gradient of the last step as the optimizer saw it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from llmnorm.optim.matrix import Site, State, local
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.moves import Move, OwnedSite, Path
from llmnorm.optim.muon import NS_DTYPES, orth, orthogonal_to_unit
from llmnorm.optim.newton_schulz import (
    Coefficients,
    NewtonSchulzMethod,
    Preconditioner,
    coefficient_set,
    nuclear_norm,
)
from llmnorm.optim.normalization import RELATIVE_FLOOR, frobenius, rms
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import Hyper, Rule, moment, wide
from llmnorm.optim.update_size import LrMode, Size, one

FAMILIES = {
    Role.HIDDEN_MATRIX: "spectral",
    Role.EMBEDDING: "sign",
    Role.LM_HEAD: "sign",
    Role.VECTOR: "rms",
}


def spectral_dual(difference: Tensor, hyper: Hyper) -> Tensor:
    """sqrt(m/n) ||.||_*."""
    m, n = difference.shape[-2:]
    return math.sqrt(m / n) * nuclear_norm(difference, dtype=NS_DTYPES[hyper["ns_dtype"]])


def sign_dual(difference: Tensor, hyper: Hyper) -> Tensor:
    """||.||_1 / n."""
    return difference.abs().sum((-2, -1), keepdim=True) / difference.shape[-1]


def rms_dual(difference: Tensor, hyper: Hyper) -> Tensor:
    """sqrt(d) ||.||_2."""
    return math.sqrt(difference.numel()) * frobenius(difference)


DUAL_NORMS: dict[str, Callable[[Tensor, Hyper], Tensor]] = {
    "spectral": spectral_dual,
    "sign": sign_dual,
    "rms": rms_dual,
}


def observe_noise(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """Advance and return H, one number per layer; the first gradient has nothing to differ from."""
    noise = state.setdefault("noise", torch.zeros_like(frobenius(grad), dtype=torch.float32))
    if "previous_grad" in state:
        difference = wide(grad) - wide(state["previous_grad"])
        power = DUAL_NORMS[FAMILIES[hyper["role"]]](difference, hyper).square()
        noise.lerp_(power.to(noise.dtype), 1 - hyper["beta2"])
    return noise


def relative_rate(noise: Tensor, alpha_squared: Tensor | float) -> Tensor:
    """a = alpha / sqrt(alpha^2 + H), 1 where there is no noise."""
    total = alpha_squared + noise
    return torch.where(noise > 0, alpha_squared / total.clamp(min=torch.finfo(noise.dtype).tiny), 1.0).sqrt()


def _direction(lmo: Callable[[Tensor, Hyper], Tensor]) -> Callable[[Tensor, State, Hyper], Tensor]:
    def update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
        noise = state.setdefault("noise", torch.zeros_like(frobenius(grad), dtype=torch.float32))
        moment(state, "previous_grad", grad, hyper).copy_(grad)
        buffer = moment(state, "momentum_buffer", grad, hyper)
        buffer.lerp_(grad.to(buffer.dtype), 1 - hyper["momentum"])
        rate = relative_rate(noise, hyper["alpha_squared"]) / hyper["largest_rate"]
        return wide(lmo(buffer, hyper)) * rate.sqrt()

    return update


def sign_lmo(buffer: Tensor, hyper: Hyper) -> Tensor:
    """sign(B), 0 for what is rounding error next to the whole: a sign would make it full size."""
    b = wide(buffer)
    return b.sign() * (b.abs() > RELATIVE_FLOOR * rms(b, (-2, -1)))


def rms_lmo(buffer: Tensor, hyper: Hyper) -> Tensor:
    """B / RMS(B) of a vector; zero stays zero."""
    length = frobenius(buffer).clamp(min=torch.finfo(torch.float32).tiny)
    return wide(buffer) / length * math.sqrt(buffer.numel())


SPECTRAL = Size(lambda m, n, hyper: math.sqrt(m / n), orthogonal_to_unit)
SIGN = Size(lambda m, n, hyper: hyper["embedding_radius"] / n, one)


def _joined(
    shapes: Mapping[Tensor, torch.Size], found: Mapping[Tensor, Tensor], group: dist.ProcessGroup | None
) -> Tensor:
    """What owners found of the parameters in `shapes`, put together: a sum of zeros and a number a layer."""
    device = local(next(iter(shapes))).device
    zeros = {
        parameter: torch.zeros(math.prod(shape[:-2]), device=device) for parameter, shape in shapes.items()
    }
    flat = torch.cat([found.get(parameter, zero) for parameter, zero in zeros.items()])
    dist.all_reduce(flat, group=group)
    return flat


class LANTON(MatrixOptimizer):
    """LANTON on every parameter, each family with its own norm; engine options as in `Muon`.

    `embedding_radius` is the size of a step of embedding and head against that of hidden matrices; Scion's
    radii, 3000 and 50, stand in for the paper's, which are not known here.
    """

    gradient_trips: ClassVar[int] = 2  # the noise of a whole family comes before any update
    # Whole shapes of parameters whose gradients lie with their owners; not set in the constructor, like those
    # of the base.
    _apart: Mapping[Tensor, torch.Size] = MappingProxyType({})
    rules: ClassVar[Mapping[str, Rule]] = {
        Role.HIDDEN_MATRIX: Rule("lanton", _direction(orth), SPECTRAL, stacks=True),
        Role.EMBEDDING: Rule("lanton", _direction(sign_lmo), SIGN),
        Role.LM_HEAD: Rule("lanton", _direction(sign_lmo), SIGN),
        Role.VECTOR: Rule("lanton", _direction(rms_lmo), Size(one, one)),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        alpha: float | None = None,
        embedding_radius: float = 60.0,
        ns_coefficients: Coefficients = "polar_express",
        ns_steps: int = 5,
        eps: float = 1e-7,
        ns_dtype: Literal["bf16", "fp32"] = "bf16",
        ns_method: NewtonSchulzMethod = "standard",
        ns_preconditioner: Preconditioner = "none",
        lr_mode: LrMode = "paper",
        **shared: Unpack[Options],
    ):
        coefficient_set(ns_coefficients, ns_steps, ns_preconditioner)
        options = {
            "momentum": momentum,
            "beta2": beta2,
            "alpha": alpha,
            "embedding_radius": embedding_radius,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "eps": eps,
            "ns_dtype": ns_dtype,
            "ns_method": ns_method,
            "ns_preconditioner": ns_preconditioner,
            "lr_mode": lr_mode,
        }
        super().__init__(params, lr, weight_decay, options, shared)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Measure the noise of every layer first: a layer's rate depends on the whole family."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._noise = self._measure_noise()
        super().step()
        del self._noise
        return loss

    def gradients_lie_apart(self, shapes: Mapping[Tensor, torch.Size]) -> None:
        self._apart = shapes

    def _measure_noise(self) -> dict[str, Tensor]:
        """H of every layer of each family, alike on every process."""
        moves = self.moves(self.param_groups)
        found: dict[Tensor, Tensor] = {}
        for move, site in self._sites(moves):
            found[move.parameter] = observe_noise(site.grad, site.state, move.hyper).flatten()
            site.store()
            self.state[move.parameter] = site.held
        if self._apart:
            return self._noise_of_all(found)
        here: dict[str, list[Tensor]] = {}
        owned: dict[str, dict[Tensor, torch.Size]] = {}
        for move in moves:
            family = FAMILIES[move.hyper["role"]]
            if move.path is Path.OWNER:
                owned.setdefault(family, {})[move.parameter] = move.shape
            else:
                here.setdefault(family, []).append(found[move.parameter])
        for family, shapes in owned.items():
            layout = self.owner_layout(next(iter(shapes)))
            assert layout is not None
            here.setdefault(family, []).append(_joined(shapes, found, layout.group))
        return {family: torch.cat(values) for family, values in here.items()}

    def _noise_of_all(self, found: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
        """The same where every parameter has its gradient on one process only."""
        families: dict[str, dict[Tensor, torch.Size]] = {}
        for group in self.param_groups:
            shapes = {parameter: self._apart[parameter] for parameter in group["params"]}
            families.setdefault(FAMILIES[group["role"]], {}).update(shapes)
        return {family: _joined(shapes, found, None) for family, shapes in families.items()}

    def _sites(self, moves: Sequence[Move]) -> Iterator[tuple[Move, Site | OwnedSite]]:
        for move in moves:
            if move.path is Path.HERE:
                held = self.state.get(move.parameter, {})
                yield move, Site(move.parameter, held, elementwise=False)
        yield from self.owned_moves(moves).owned_sites()

    def context(self, group: Hyper) -> dict[str, Any]:
        """alpha^2 and the largest a of the group's family, without a synchronization."""
        noise = getattr(self, "_noise", {}).get(FAMILIES[group["role"]], torch.zeros(1))
        alpha_squared = noise.median() if group["alpha"] is None else group["alpha"] ** 2
        return {
            "alpha_squared": alpha_squared,
            "largest_rate": relative_rate(noise, alpha_squared).max(),
        }
