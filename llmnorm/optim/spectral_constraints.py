"""The config key `weight_constraint`, applied after an optimizer's step to whole matrices by role.

    hidden matrices (m, n)   the rule of `name`, with the limit max_norm sqrt(m/n) on singular values
    embedding, head          row <- row min(1, max_rms / RMS(row)), in storage

Rules live in `spectral_caps.py`. A soft cap depends on the step before it: with rate lr, decay wd and an
update of norm at most M, both over sqrt(m/n), a matrix within max_norm reaches at most

    k = max_norm (1 - lr wd) + lr M                  alpha: p(k) = max_norm, 0 where k <= max_norm

so alpha is solved anew in every step (Training Transformers with Enforced Lipschitz Constants,
arXiv 2507.13338).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmnorm.errors import UserError
from llmnorm.optim.matrix import gather, local, scatter
from llmnorm.optim.muon import Muon
from llmnorm.optim.newton_schulz import Coefficients, Preconditioner, coefficient_set
from llmnorm.optim.norm_keeping import keep_norms
from llmnorm.optim.roles import Role, route_parameters
from llmnorm.optim.spectral_caps import (
    LARGEST_EXCESS,
    cap_rows,
    hammer,
    hard_cap,
    normalize,
    polynomial_cap,
    soft_cap,
    soft_cap_alpha,
    spectral_decay,
    stiefel,
)
from llmnorm.optim.update_size import blocks_of, shape_factor

Options = Mapping[str, Any]
# What rounding may add to a singular value in one Newton-Schulz iteration: it can leave the interval for
# which the next coefficients were fitted, and those of CANS then blow it up.
ROUNDING = {"bf16": 2**-7, "fp32": 1e-4}


class Step(NamedTuple):
    """What the optimizer did to one matrix: its group, the matrix's name and the group's rate."""

    optimizer: Optimizer
    group: Mapping[str, Any]
    name: str

    @property
    def lr(self) -> float:
        return float(self.group["lr"])


def _hard(weight: Tensor, limit: float, options: Options, step: Step | None) -> Tensor:
    return (hard_cap if options["method"] == "exact" else polynomial_cap)(weight, limit)


def _soft(weight: Tensor, limit: float, options: Options, step: Step | None) -> Tensor:
    if step is None:
        return hard_cap(weight, limit)
    unit = limit / options["max_norm"]
    alpha = soft_cap_alpha(reach(weight.shape, options["max_norm"], step), options["max_norm"])
    # p commutes with a change of units: alpha / unit^2 on W is alpha on W / unit.
    return soft_cap(weight, alpha / unit**2) if alpha else weight


def _decay(weight: Tensor, limit: float, options: Options, step: Step | None) -> Tensor:
    return weight if step is None else spectral_decay(weight, step.lr * options["decay"])


# name -> rule(whole matrix, largest singular value allowed, options, the step just made or None at the start)
RULES: dict[str, Callable[[Tensor, float, Options, Step | None], Tensor]] = {
    "spectral_cap": _hard,
    "spectral_soft_cap": _soft,
    "spectral_normalize": lambda weight, limit, options, step: normalize(weight, limit),
    "spectral_hammer": lambda weight, limit, options, step: hammer(weight, limit),
    "spectral_weight_decay": _decay,
    "stiefel": lambda weight, limit, options, step: stiefel(weight, limit),
}
# Rules that see no singular values, and need not see whole matrices.
OTHER_RULES: dict[str, Callable[[nn.Module], None]] = {"normalize_and_project": keep_norms}


@lru_cache(maxsize=64)
def largest_output(
    coefficients: Coefficients, steps: int, rounding: float, preconditioner: Preconditioner = "none"
) -> float:
    """The largest singular value that Newton-Schulz can make of one in [0, 1] times the norm that the
    preconditioner bounds it by.

    Interval by interval: [0, h] becomes [0, (1 + rounding) max |p|] with the maximum over [0, h].
    """
    chosen = coefficient_set(coefficients, steps, preconditioner)
    largest = (1 + rounding) / chosen.safety
    for a, b, c in chosen.schedule(steps):
        values = torch.linspace(0, largest, 20_001, dtype=torch.float64)
        largest = (1 + rounding) * float((a * values + b * values**3 + c * values**5).abs().max())
    return largest


def update_norm(shape: torch.Size, step: Step) -> float:
    """M: an upper bound of the norm, over sqrt(m/n), of an update of Muon per unit of learning rate.

    Raises UserError for an optimizer whose updates have no known bound.
    """
    optimizer, group = step.optimizer, step.group
    if not isinstance(optimizer, Muon):
        raise UserError(
            f"model.weight_constraint.name=spectral_soft_cap needs updates of known spectral norm, and "
            f"{type(optimizer).__name__}'s depends on the data; use optimizer.name=muon, or "
            "name: spectral_cap, which holds with any optimizer"
        )
    if group["weight_decay"] and group.get("cautious_weight_decay"):
        raise UserError(
            "optimizer.cautious_weight_decay=true may raise a singular value, which "
            "model.weight_constraint.name=spectral_soft_cap does not allow for; remove it, or use "
            "name: spectral_cap"
        )
    m, n = shape[-2:]
    blocks = blocks_of(step.name, shape, group.get("row_blocks"))
    coefficients = group["ns_coefficients"]
    key = coefficients if isinstance(coefficients, str) else tuple(coefficients)
    bound = largest_output(key, group["ns_steps"], ROUNDING[group["ns_dtype"]], group["ns_preconditioner"])
    if not bound <= 2.0:  # nan where it overflows
        raise UserError(
            f"optimizer.ns_coefficients={coefficients} gives updates of no useful bound in "
            f"{group['ns_dtype']}: rounding leaves the interval they were fitted on, and the next iteration "
            "multiplies it; use polar_express or you with model.weight_constraint.name=spectral_soft_cap"
        )
    # Blocks are orthogonalized by themselves, and b blocks of norm 1 may share their input direction.
    bound *= math.sqrt(len(blocks) if blocks else 1)
    factor = shape_factor(optimizer.rule(group).size, shape, {**group, "blocks": blocks})
    return bound * float(torch.as_tensor(factor).max()) / math.sqrt(m / n)


def reach(shape: torch.Size, max_norm: float, step: Step) -> float:
    """k: how far a step can take the norm of a matrix that obeyed `max_norm` before it.

    Raises UserError, with the largest feasible learning rate, where no soft cap brings k back.
    """
    size, decay = update_norm(shape, step), float(step.group["weight_decay"])
    k = max_norm * (1 - step.lr * decay) + step.lr * size
    if k > LARGEST_EXCESS * max_norm:
        largest = (LARGEST_EXCESS - 1) * max_norm / (size - decay * max_norm)
        # Rounded down, so that the number given is itself feasible.
        digits = 10.0 ** (3 - math.ceil(math.log10(largest)))
        raise UserError(
            f"model.weight_constraint.max_norm={max_norm:g} with name=spectral_soft_cap is infeasible at "
            f"optimizer.lr={step.lr:g} and optimizer.weight_decay={decay:g} for {step.name} {tuple(shape)}: "
            f"a step can reach {k:.4g}, and a soft cap brings back at most 81/62 of max_norm; the largest "
            f"feasible learning rate here is {math.floor(largest * digits) / digits:g}"
        )
    return k


def check_feasible(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise UserError where the model's soft cap cannot hold at the optimizer's present learning rates."""
    options = _options(model)
    if options is None or options["name"] != "spectral_soft_cap":
        return
    steps = _steps(model, optimizer)
    for routed in route_parameters(model):
        if routed.role is Role.HIDDEN_MATRIX:
            reach(routed.parameter.shape, options["max_norm"], steps[routed.parameter])


@torch.no_grad()
def constrain_spectra(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Move the weights of `model` to what its config's `weight_constraint` asks; without one, do nothing.

    `optimizer` has just made a step. None is the start of a run: spectral_soft_cap then cuts exactly, as its
    induction needs, and spectral_weight_decay leaves the matrices alone. Sharded parameters are gathered, one
    matrix at a time, and each process keeps its part; replicas compute the same. There is no state, so that a
    run that goes on is the run that never stopped.
    """
    options = _options(model)
    if options is None:
        return
    if options["name"] in OTHER_RULES:
        OTHER_RULES[options["name"]](model)
        return
    steps = {} if optimizer is None else _steps(model, optimizer)
    rule = RULES[options["name"]]
    row_limits = {Role.EMBEDDING: options["embedding_max_rms"], Role.LM_HEAD: options["head_max_rms"]}
    for _, parameter, role in route_parameters(model):
        if role is Role.VECTOR:
            continue
        whole = gather(parameter.detach())
        if role is Role.HIDDEN_MATRIX:
            m, n = whole.shape[-2:]
            limit = options.get("max_norm", math.inf) * math.sqrt(m / n)
            obeying = rule(whole, limit, options, steps.get(parameter))
        else:
            obeying = cap_rows(whole, row_limits[role])
        if obeying is not whole:
            local(parameter.detach()).copy_(local(scatter(obeying, parameter)))


def _options(model: nn.Module) -> Options | None:
    return getattr(getattr(getattr(model, "module", model), "config", None), "weight_constraint", None)


def _steps(model: nn.Module, optimizer: Optimizer) -> dict[nn.Parameter, Step]:
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    return {
        routed.parameter: Step(optimizer, groups[routed.parameter], routed.name)
        for routed in route_parameters(model)
        if routed.parameter in groups
    }
