"""The gradient of several micro-batches as sums of projections: all that GaLore needs of it.

    sum_k R_k = sum_k project(G_k) = project(sum_k G_k)        for one basis, by linearity

Each micro-batch's gradient is projected as it arrives and freed, so that accumulation holds r numbers where
it held min(m, n). Fira, APOLLO and the others read the whole gradient and cannot do so. Embedding, head and
vectors are not projected and keep their whole sums.

A basis that is due is found from the first micro-batch's gradient, where ordinary accumulation takes the
whole sum: that is the price of never holding it. `whole_refresh` holds it for that one update instead.

The norm of what is held, sqrt(sum |sum_k R_k|^2 + sum |sum_k G_k|^2), is at most the gradient's where bases
are orthonormal, and estimates it where they are `random`; its own does not follow from those of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.optim.lowrank import Subspace, standing_subspace, subspace
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer
from llmnorm.optim.matrix import State
from llmnorm.optim.roles import Role

if TYPE_CHECKING:
    from llmnorm.optim.fused_backward import FusedBackward


class Held(NamedTuple):
    """The sum so far, of R in `space` or of whole gradients; `state`: what finding that space has changed."""

    total: Tensor
    space: Subspace | None
    state: State


class ProjectedSums:
    """Sums over the backward passes of one update. Raises `UserError` for a method that is not GaLore."""

    def __init__(self, fused: FusedBackward, whole_refresh: bool = False) -> None:
        optimizer = fused.optimizer
        if not (isinstance(optimizer, LowRankOptimizer) and optimizer.sums_projections):
            raise UserError(
                f"{type(optimizer).__name__} needs whole gradients, so optimizer.fused_backward=true cannot "
                "accumulate several backward passes for it; make one pass per step, or use galore, whose "
                "projections can be summed"
            )
        self.fused = fused
        self.optimizer: LowRankOptimizer = optimizer
        self.whole_refresh = whole_refresh
        self._held: dict[Tensor, Held] = {}

    @property
    def totals(self) -> Mapping[Tensor, Tensor]:
        """Parameter -> the sum that is held for it, which may be scaled in place."""
        return {parameter: held.total for parameter, held in self._held.items()}

    @torch.no_grad()
    def add(self, parameter: Tensor) -> None:
        """Add the gradient of one backward pass; it is not needed any more."""
        grad = parameter.grad
        assert grad is not None
        held = self._held.get(parameter)
        if held is None:
            space, state = self._space(parameter, grad)
            self._held[parameter] = Held(grad if space is None else space.project(grad), space, state)
        else:
            held.total.add_(grad if held.space is None else held.space.project(grad))

    def _space(self, parameter: Tensor, grad: Tensor) -> tuple[Subspace | None, State]:
        """Where this update's gradients are projected, None for whole sums, and the state that goes with it.

        The optimizer's own state stays as it is until the update is made: it may be dropped.
        """
        group = self.fused.group_of(parameter)
        if group["role"] != Role.HIDDEN_MATRIX:
            return None, {}
        (name,) = group["param_names"]
        hyper = {**group, **self.optimizer.context(group), "name": name}
        state = {
            key: value.clone() if key in self.optimizer.host_state else value
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        step = int(state["step"]) + 1 if "step" in state else 1
        space = standing_subspace(grad, state, hyper, step)
        if space is None and not self.whole_refresh and bool(grad.isfinite().all()):
            space = subspace(grad, state, hyper, step)
        return space, {} if space is None else state

    def move(self) -> None:
        """Make the update, and hold nothing any more."""
        while self._held:
            parameter, held = self._held.popitem()
            if held.space is None:
                parameter.grad = held.total
                self.fused.move(parameter)
            else:
                self.optimizer.state[parameter].update(held.state)
                # Only its shape and dtype are read.
                nothing = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
                parameter.grad = nothing.expand(parameter.shape)
                self.fused.move(parameter, projected=(held.space, held.total))
            parameter.grad = None

    def clear(self) -> None:
        """Hold nothing any more."""
        self._held.clear()
