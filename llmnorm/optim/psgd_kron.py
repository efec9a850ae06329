"""PSGD with a Kronecker-factored preconditioner (Xi-Lin Li, arXiv 1512.04202; kron_torch).

    P = (Q_L x Q_R)^T (Q_L x Q_R),   Q upper triangular, diagonal where a side exceeds `max_size_triangular`
    U = Q_L^T Q_L m^ Q_R^T Q_R, its RMS clipped to 1.1,   m^ the bias-corrected momentum
    W <- (1 - lr wd) W - lr U

with probability p_t = clip(exp(-0.001 (t - 500)), p_min, 1), for V of independent normals:
    A = Q_L m^ Q_R^T,   B = Q_L^-T V Q_R^-1
    Q_L <- Q_L - mu triu(A A^T - B B^T) / max|A A^T + B B^T| Q_L,   Q_R likewise with A^T A and B^T B

so that P whitens: E[U U^T] and E[U^T U] tend to multiples of the identity. V and the coins come from (seed,
parameter name, step) alone, hence all replicas draw the same. Every role is treated; a vector has a diagonal
factor. The learning rate is about a third of Adam's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.normalization import rms
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.random_numbers import normal_like, seed_of
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import Hyper, Rule, count, moment, wide
from llmnorm.optim.update_size import Size, one

_MAX_RMS = 1.1
_BALANCE_PROBABILITY = 0.01
_FLAT_STEPS, _ANNEALING = 500, 0.001
# Noise mixed into m^ for the fit only, relative to its mean size: bounds what a dead direction is amplified.
_DAMPING = math.sqrt(torch.finfo(torch.float32).eps)


def update_probability(step: int, smallest: float) -> float:
    """p_t: 1 for 500 steps, then an exponential down to `smallest`."""
    return min(1.0, max(smallest, math.exp(-_ANNEALING * (step - _FLAT_STEPS))))


def _is_diagonal(q: Tensor, x: Tensor) -> bool:
    return q.ndim < x.ndim


def _left(q: Tensor, x: Tensor) -> Tensor:
    return q.unsqueeze(-1) * x if _is_diagonal(q, x) else q @ x


def _factor(x: Tensor, side: int, hyper: Hyper, vector: bool) -> Tensor:
    """The first Q of one side: the identity."""
    size = x.shape[side]
    if vector or size == 1 or size > hyper["max_size_triangular"]:
        return torch.ones((*x.shape[:-2], size), dtype=torch.float32, device=x.device)
    eye = torch.eye(size, dtype=torch.float32, device=x.device)
    return eye.expand(*x.shape[:-2], size, size).clone()


def _solve_left(q: Tensor, x: Tensor) -> Tensor:
    """Q^-T X."""
    if _is_diagonal(q, x):
        return x / q.unsqueeze(-1)
    return torch.linalg.solve_triangular(q.mT, x, upper=False)


def _fit(q: Tensor, a: Tensor, b: Tensor, precond_lr: float) -> Tensor:
    """One step of the left factor; a zero A, which no factor can whiten, leaves it as it is."""
    if _is_diagonal(q, a):
        first, second = a.square().sum(-1), b.square().sum(-1)
        largest = (first + second).amax(-1, keepdim=True)
        new = q - precond_lr * (first - second) / largest * q
        alive = first.sum(-1, keepdim=True) > 0
    else:
        first, second = a @ a.mT, b @ b.mT
        largest = (first + second).abs().amax((-2, -1), keepdim=True)
        new = q - precond_lr * torch.triu(first - second) / largest @ q
        alive = a.square().sum((-2, -1), keepdim=True) > 0
    return torch.where(alive, new, q)


def psgd_kron_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """Fit the factors if the coin says so, then precondition the momentum."""
    vector = grad.ndim < 2
    step = count(state)
    buffer = moment(state, "momentum_buffer", grad, hyper)
    buffer.lerp_(grad.to(buffer.dtype), 1 - hyper["momentum"])
    m = wide(buffer).reshape(1, -1) if vector else wide(buffer)
    m = m / (1 - hyper["momentum"] ** step)
    left = state.setdefault("factor_left", _factor(m, -2, hyper, vector))
    right = state.setdefault("factor_right", _factor(m, -1, hyper, vector))

    seed = seed_of(hyper["seed"], hyper["name"], step)
    fits, balances = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    if fits < update_probability(step, hyper["min_update_probability"]):
        noise = normal_like(m, seed + 1)
        damped = m + _DAMPING * m.abs().mean((-2, -1), keepdim=True) * noise
        a = _left(right, _left(left, damped).mT).mT
        b = _solve_left(right, _solve_left(left, noise).mT).mT
        left.copy_(_fit(left, a, b, hyper["precond_lr"]))
        right.copy_(_fit(right, a.mT, b.mT, hyper["precond_lr"]))
    if balances < _BALANCE_PROBABILITY:
        _balance(left, right, m)

    whitened = _left(right, _left(left, m).mT).mT
    transposed = [q if _is_diagonal(q, m) else q.mT for q in (left, right)]
    update = _left(transposed[1], _left(transposed[0], whitened).mT).mT
    update = update / (rms(update, (-2, -1)) / _MAX_RMS).clamp(min=1)
    return update.reshape(grad.shape)


def _balance(left: Tensor, right: Tensor, m: Tensor) -> None:
    """Give both factors the same largest element; their product, all that matters, stays."""
    sizes = []
    for q in (left, right):
        largest = q.abs().amax(-1) if _is_diagonal(q, m) else q.abs().amax((-2, -1))
        sizes.append(largest)
    ratio = (sizes[1] / sizes[0]).sqrt()
    for q, scale in ((left, ratio), (right, 1 / ratio)):
        q.mul_(scale[..., None] if _is_diagonal(q, m) else scale[..., None, None])


KRON = Rule("psgd_kron", psgd_kron_update, Size(usual=one))


class PSGDKron(MatrixOptimizer):
    """PSGD Kron on every parameter; state is one momentum and the factors, m^2 + n^2 elements per matrix."""

    rules: ClassVar[Mapping[str, Rule]] = dict.fromkeys(Role, KRON)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        precond_lr: float = 0.1,
        max_size_triangular: int = 8192,
        min_update_probability: float = 0.03,
        **shared: Unpack[Options],
    ):
        options = {
            "momentum": momentum,
            "precond_lr": precond_lr,
            "max_size_triangular": max_size_triangular,
            "min_update_probability": min_update_probability,
        }
        super().__init__(params, lr, weight_decay, options, shared)
