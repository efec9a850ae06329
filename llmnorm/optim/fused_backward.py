"""The update inside the backward pass: a parameter moves as its gradient arrives, and the gradient is freed.

A hook that autograd calls once a parameter's gradient is complete (`register_post_accumulate_grad_hook`)
hands the parameter on and then lets go of its gradient, so that one gradient is alive at a time and not all
of them (LOMO, arXiv 2306.09782; GaLore's per-layer mode, arXiv 2403.03507).

    optimizer = create_optimizer("apollo_mini", model, lr=1e-2, fused_backward=True)
    loss.backward()       # every parameter that it reaches has moved
    optimizer.step()      # what follows a step (QK-clip, hooks of your own); nothing moves twice

A weight is written after the last node of the graph that reads it for a gradient of its own; one that is read
later by another node makes autograd raise, as its version has changed. Each backward pass is a step, and
nothing that needs all gradients at once (their global norm) can be known before the first parameter moves:
`receiving` lets a caller do something else with the gradients of one pass, which is how training finds the
norm first (`training/fused_update.py`). Several passes make one step with galore alone, whose projections can
be summed (`projected_sums.py`):

    with fused_backward_of(optimizer).accumulating():
        for batch in micro_batches:
            (loss_of(batch) / len(micro_batches)).backward()
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llmnorm.errors import UserError
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.projected_sums import ProjectedSums

Receiver = Callable[[Tensor], None]


class FusedBackward:
    """Moves the parameters of `optimizer` during backward passes, from its making on.

    Takes torch.optim.AdamW and every `MatrixOptimizer` whose parameters move by themselves (`UNFUSED` of the
    registry says which do not); the weights are those of a step after the backward pass, bit for bit where
    that does not stack equal shapes. Raises `UserError` for sharded parameters (DTensors). Under
    DistributedDataParallel gradients are not yet summed when they arrive, which nothing here can see.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._receive: Receiver = self.move
        # By place and not by group: `load_state_dict` replaces the groups.
        self._places: dict[Tensor, tuple[int, int]] = {}
        for number, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                self._watch(parameter, number, index)
        optimizer.fused_backward = self  # type: ignore[attr-defined]

    def _watch(self, parameter: Tensor, group: int, index: int) -> None:
        if isinstance(parameter, DTensor):
            raise UserError(
                "optimizer.fused_backward=true does not take the sharded parameters of "
                "parallel.strategy=fsdp2; remove it, or train with one process"
            )
        self._places[parameter] = (group, index)
        parameter.register_post_accumulate_grad_hook(self._arrived)

    def _arrived(self, parameter: Tensor) -> None:
        try:
            self._receive(parameter)
        finally:
            parameter.grad = None

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """The group of this parameter, with it alone in it."""
        number, index = self._places[parameter]
        group = self.optimizer.param_groups[number]
        names = group.get("param_names")
        name = names[index] if names else f"parameter {index}"
        return {**group, "params": [parameter], "param_names": [name]}

    @torch.no_grad()
    def move(self, parameter: Tensor, **given: Any) -> None:
        """One update of this parameter by its `grad`, as `optimizer.step()` would make it; its rule is given
        `given` beside the options of its group.
        """
        alone = {**self.group_of(parameter), **given}
        if isinstance(self.optimizer, MatrixOptimizer):
            self.optimizer.move_group(alone)
        else:
            _step_alone(self.optimizer, alone)

    @contextmanager
    def accumulating(self, whole_refresh: bool = False) -> Iterator[None]:
        """Backward passes in here are one step, made at the end; see `ProjectedSums`, and what it raises."""
        sums = ProjectedSums(self, whole_refresh)
        with self.receiving(sums.add):
            yield
        sums.move()

    @contextmanager
    def receiving(self, receive: Receiver) -> Iterator[None]:
        """Backward passes in here hand each parameter, its gradient still there, to `receive` instead."""
        kept, self._receive = self._receive, receive
        try:
            yield
        finally:
            self._receive = kept


def _step_alone(optimizer: Optimizer, group: dict) -> None:
    """torch's own step on one group, without the hooks that belong to whole steps."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group]
    try:
        type(optimizer).step.__wrapped__(optimizer)  # type: ignore[attr-defined]
    finally:
        optimizer.param_groups = groups


def fused_backward_of(optimizer: Optimizer) -> FusedBackward | None:
    """What moves the parameters of `optimizer` during backward passes, if anything."""
    return getattr(optimizer, "fused_backward", None)
