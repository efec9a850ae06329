"""Terms of the loss that see a hidden matrix W (m, n) alone: value and gradient of each, in closed form.

With s its singular values, w_i its rows, k = min(m, n), G = W W^T where m <= n and W^T W otherwise:

    norm_loss             sum_i (1 - ||w_i||)^2                  unit rows (Norm Loss, arXiv 2103.06583)
    soft_orthogonality    ||G - I||_F^2 = sum (s^2 - 1)^2        every s = 1 (arXiv 1810.09102)
    srip                  max |s^2 - 1|                          the same by its worst s (arXiv 1810.09102)
    gor                   soft_orthogonality of each of `groups` blocks of rows (arXiv 2306.10001)
    lambda_orthogonality  sigma(sharpness (r - threshold)) r     r = ||G - I||_F, free below the threshold
                                                                 (arXiv 2509.16664)
    cauchy_schwarz        k ||G||_F^2 - ||W||_F^4                every s the same, whatever it is
                                                                 (arXiv 2503.01639)
    spectral              (s_1^power - 1)^2                      s_1 = 1 (arXiv 2406.06811)

A penalty's gradient, times `strength`, is added to that of the loss before clipping; an optimizer that
normalizes gradients normalizes the sum. Where papers estimate s_1 by power iterations it is exact here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmnorm.errors import UserError
from llmnorm.optim.matrix import gather, local, scatter
from llmnorm.optim.roles import Role, route_parameters


class Penalty(NamedTuple):
    """A row of PENALTIES, how much of it, and its options."""

    name: str
    strength: float
    options: Mapping[str, Any] = {}

    @property
    def all_options(self) -> dict[str, Any]:
        """`options`, and the defaults of those that are not given."""
        return {**PENALTY_OPTIONS.get(self.name, {}), **self.options}


def _flat(weight: Tensor) -> tuple[Tensor, bool]:
    """No more rows than columns, in fp32 or wider, and whether it was transposed for that."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    tall = wide.shape[-2] > wide.shape[-1]
    return (wide.mT if tall else wide), tall


def _excess(flat: Tensor) -> Tensor:
    gram = flat @ flat.mT
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def norm_loss(weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    tiny = torch.finfo(wide.dtype).tiny  # a zero row has no direction to grow in
    return (1 - lengths).square().sum(), -2 * (1 - lengths) * wide / lengths.clamp_min(tiny)


def soft_orthogonality(weight: Tensor) -> tuple[Tensor, Tensor]:
    flat, tall = _flat(weight)
    excess = _excess(flat)
    gradient = 4 * excess @ flat
    return excess.square().sum(), gradient.mT if tall else gradient


def srip(weight: Tensor) -> tuple[Tensor, Tensor]:
    flat, tall = _flat(weight)
    values, vectors = torch.linalg.eigh(_excess(flat))
    worst = int(values.abs().argmax())
    value, direction = values[worst], vectors[:, worst]
    gradient = 2 * value.sign() * torch.outer(direction, direction @ flat)
    return value.abs(), gradient.mT if tall else gradient


def gor(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    assert weight.shape[0] % groups == 0, "see check_penalties"
    parts = [soft_orthogonality(block) for block in weight.chunk(groups)]
    return torch.stack([value for value, _ in parts]).sum(), torch.cat([g for _, g in parts])


def lambda_orthogonality(weight: Tensor, threshold: float, sharpness: float) -> tuple[Tensor, Tensor]:
    flat, tall = _flat(weight)
    excess = _excess(flat)
    r = torch.linalg.matrix_norm(excess)
    gate = torch.sigmoid(sharpness * (r - threshold))
    slope = gate + r * sharpness * gate * (1 - gate)
    gradient = slope * 2 * excess @ flat / r.clamp_min(torch.finfo(r.dtype).tiny)
    return gate * r, gradient.mT if tall else gradient


def cauchy_schwarz(weight: Tensor) -> tuple[Tensor, Tensor]:
    flat, tall = _flat(weight)
    gram, square, k = flat @ flat.mT, flat.square().sum(), flat.shape[-2]
    gradient = 4 * k * gram @ flat - 4 * square * flat
    return k * gram.square().sum() - square.square(), gradient.mT if tall else gradient


def spectral(weight: Tensor, power: int) -> tuple[Tensor, Tensor]:
    flat, tall = _flat(weight)
    values, vectors = torch.linalg.eigh(flat @ flat.mT)
    largest, left = values[-1].clamp_min(0).sqrt(), vectors[:, -1]
    # u v^T s_1 = u u^T W, so that no division by s_1 is needed for power >= 2.
    slope = 2 * (largest**power - 1) * power * largest ** (power - 2)
    gradient = slope * torch.outer(left, left @ flat)
    return (largest**power - 1).square(), gradient.mT if tall else gradient


# name -> (W, **options) -> value (), gradient (m, n) in fp32 or wider
PENALTIES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "norm_loss": norm_loss,
    "soft_orthogonality": soft_orthogonality,
    "srip": srip,
    "gor": gor,
    "lambda_orthogonality": lambda_orthogonality,
    "cauchy_schwarz": cauchy_schwarz,
    "spectral": spectral,
}
# name -> its options with their defaults
PENALTY_OPTIONS: dict[str, dict[str, Any]] = {
    "gor": {"groups": 4},
    "lambda_orthogonality": {"threshold": 1.0, "sharpness": 10.0},
    "spectral": {"power": 2},
}


def check_penalties(model: nn.Module, penalties: Iterable[Penalty]) -> None:
    """Raise UserError where the shapes of `model` do not allow one; the model may be on the meta device."""
    groups = {p.options.get("groups", PENALTY_OPTIONS["gor"]["groups"]) for p in penalties if p.name == "gor"}
    for number in groups:
        for name, parameter, role in route_parameters(model):
            if role is Role.HIDDEN_MATRIX and parameter.shape[0] % number:
                raise UserError(
                    f"train.weight_penalties: groups={number} of gor does not divide the "
                    f"{parameter.shape[0]} rows of {name}; use a number that divides the outputs of every "
                    "hidden matrix"
                )


def penalty_gradient(weight: Tensor, penalties: Iterable[Penalty]) -> Tensor:
    """The sum over `penalties`, each times its strength, of their gradients at a whole matrix (m, n)."""
    parts = [p.strength * PENALTIES[p.name](weight, **p.all_options)[1] for p in penalties]
    return torch.stack(parts).sum(0)


@torch.no_grad()
def add_penalties(model: nn.Module, penalties: Iterable[Penalty]) -> None:
    """p.grad <- p.grad + strength * gradient of each penalty, for every hidden matrix that has a gradient.

    Sharded parameters are gathered, one matrix at a time, and each process adds its part; replicas add the
    same. In a loop of one's own: after `loss.backward()`, before clipping.
    """
    chosen = list(penalties)
    if not chosen:
        return
    for _, parameter, role in route_parameters(model):
        if role is not Role.HIDDEN_MATRIX or parameter.grad is None:
            continue
        total = penalty_gradient(gather(parameter.detach()), chosen)
        grad = local(parameter.grad)
        grad.add_(local(scatter(total, parameter)).to(grad.dtype))


def penalty_values(model: nn.Module, penalties: Iterable[Penalty]) -> dict[str, float]:
    """name -> strength times the sum of its values over the hidden matrices."""
    found = dict.fromkeys((penalty.name for penalty in penalties), 0.0)
    for _, parameter, role in route_parameters(model):
        if role is Role.HIDDEN_MATRIX:
            whole = gather(parameter.detach())
            for penalty in penalties:
                value = PENALTIES[penalty.name](whole, **penalty.all_options)[0]
                found[penalty.name] += penalty.strength * float(value)
    return found
