"""One parameter's part in a step: where its update is computed, and how the weights take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import llmnorm_kernels as kernels
from llmnorm.int8 import Int8Weight
from llmnorm.optim.matrix import RowLayout, State, local
from llmnorm.optim.row_shards import ByRows
from llmnorm.optim.rules import Hyper, Rule
from llmnorm.optim.stochastic_rounding import Rounding, rounds
from llmnorm.optim.update_size import shape_factor


class Path(StrEnum):
    """Where the update of a parameter is computed."""

    HERE = "here"  # on every process that holds it: plain tensors, element by element, or gathered
    ROWS = "rows"  # on the rows of each process, sums joined
    OWNER = "owner"  # on the one process that owns the matrix


def path_of(parameter: Tensor, rule: Rule, hyper: Hyper, shared: bool) -> Path:
    """The path of a parameter under a rule; `shared`: plain matrices have owners too (DDP)."""
    if rule.elementwise:
        return Path.HERE
    if not isinstance(parameter, DTensor):
        # Rules that could run by rows are cheap: sending their updates would cost more than computing them.
        return Path.OWNER if shared and not isinstance(rule.update, ByRows) else Path.HERE
    return Path.HERE if RowLayout.of(parameter) is None else sharded_path(parameter.shape, rule, hyper)


def sharded_path(shape: Sequence[int], rule: Rule, hyper: Hyper) -> Path:
    """The path of a parameter of this whole shape that is cut by rows."""
    if rule.elementwise:
        return Path.HERE
    by_rows = isinstance(rule.update, ByRows) and len(shape) == 2 and rule.update.serves(shape, hyper)
    projects_by_rows = rule.project is None or isinstance(rule.project, ByRows)
    return Path.ROWS if by_rows and projects_by_rows else Path.OWNER


@dataclass(frozen=True)
class Move:
    """A parameter with a gradient, its rule, and what the rule reads beside gradient, state and weight."""

    name: str
    parameter: Tensor
    rule: Rule
    hyper: Hyper
    path: Path
    group: int  # index of its parameter group

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @property
    def factor(self) -> float | Tensor:
        """c(m, n), or a column of factors."""
        return shape_factor(self.rule.size, self.shape, self.hyper)


class SiteLike(Protocol):
    """What a rule reads and where its state goes."""

    grad: Tensor
    state: dict[str, Any]

    @property
    def weight(self) -> Tensor: ...


class OwnedSite:
    """A whole matrix at its owner, gradient (and weight, where the rule reads it) gathered there."""

    def __init__(self, parameter: Tensor, held: State, grad: Tensor, weight: Tensor) -> None:
        self.parameter = parameter
        self.held = held
        self.grad = grad
        self.weight = weight
        self.state: dict[str, Any] = dict(held)

    def store(self) -> None:
        """Write the state back into `held`."""
        for key, value in self.state.items():
            held = self.held.get(key)
            if held is None:
                self.held[key] = value
            elif held.data_ptr() != value.data_ptr():
                held.copy_(value)


def updates_of(sites: Sequence[SiteLike], rule: Rule, hyper: Hyper) -> list[Tensor]:
    """What the rule says of each site; several sites are stacked into one call."""
    if len(sites) == 1:
        site = sites[0]
        return [rule.update(site.grad, site.state, hyper, *([site.weight] if rule.reads_weight else []))]
    state = {key: torch.stack([site.state[key] for site in sites]) for key in sites[0].state}
    weights = [torch.stack([site.weight for site in sites])] if rule.reads_weight else []
    update = rule.update(torch.stack([site.grad for site in sites]), state, hyper, *weights)
    for index, site in enumerate(sites):
        # New state is copied out of the stack, which it would otherwise keep alive as a whole.
        site.state = {
            key: value[index] if key in site.state else value[index].clone() for key, value in state.items()
        }
    return list(update.unbind(0))


def add_update(weight: Tensor, update: Tensor, rule: Rule, hyper: Hyper, factor: float = 1.0) -> None:
    """w <- (1 - lr wd) w - lr c u, in place; rules that decay by themselves have done so in u."""
    lr, decay = hyper["lr"], 0.0 if rule.decays else hyper["weight_decay"]
    if decay and hyper.get("cautious_weight_decay"):
        # Only where the update shrinks the weight anyway: decay never works against the gradient.
        weight.sub_(lr * decay * weight * (update * weight > 0))
    elif decay:
        weight.mul_(1 - lr * decay)
    weight.add_(update, alpha=-lr * factor)


def moving(weight: Tensor, rounding: Rounding | None) -> Tensor:
    """The local weight that an update is added to: itself, or a copy in fp32 of one that is rounded after."""
    if isinstance(weight, Int8Weight):
        return weight.decoded(torch.float32)
    return weight if rounding is None else weight.float()


def split_factor(update: Tensor, factor: float | Tensor) -> tuple[Tensor, float]:
    """A column of factors multiplies the update itself; a number can wait for `add_update`."""
    return (update * factor.to(update), 1.0) if isinstance(factor, Tensor) else (update, factor)


def is_fused(parameter: Tensor, rule: Rule, hyper: Hyper) -> bool:
    """Whether the kernels make this step: they take what a process holds whole, and decay plainly."""
    if rule.fused is None or hyper.get("cautious_weight_decay") or isinstance(parameter, Int8Weight):
        return False
    if not rule.fuses(hyper):
        return False
    if isinstance(parameter, DTensor):
        alone = rule.elementwise or (rule.fuses_rows and RowLayout.of(parameter) is not None)
        if not alone or rounds(parameter, hyper):
            return False
    weight, grad = local(parameter), local(parameter.grad)  # type: ignore[arg-type]
    takes = (weight.is_contiguous() and grad.is_contiguous()) and (rule.elementwise or weight.ndim == 2)
    return takes and weight.numel() > 0 and weight.dtype != torch.float64 and kernels.runs_triton(weight)


def take_fused_step(move: Move, grad: Tensor, state: State, context: Hyper) -> None:
    """Move the local weight by the rule's kernels; `context` is what they read of the options."""
    rule, hyper, factor = move.rule, move.hyper, move.factor
    assert rule.fused is not None and isinstance(factor, float)
    if hyper["lr"] == 0.0 or factor == 0.0:
        factor = 1.0
    # The kernels' decay is (1 - lr wd), and theirs is the lr with the factor of the shape.
    lr, decay = hyper["lr"] * factor, hyper["weight_decay"] / factor
    rule.fused(local(move.parameter.detach()), grad, state, context, lr, decay)
