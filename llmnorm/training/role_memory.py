"""Bytes that each role's parameters take: weights, gradients, moments and the bases of moments.

FSDP2 shards matrices and their gradients over the processes, the first of which have the most rows; vectors
stay whole on each. ZeRO shards an fp32 copy of all weights, gradients from stage 2 on, and weights under
stage 3 too. State is that of the process that has most (`state_by_rank.py`). With `fused_backward` one
gradient exists at a time, and with `train.compile` those of one block, as compiled code hands them over
together; where it accumulates, the sums of projections are there as well, and whole gradients of what is not
projected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from llmnorm.int8 import stored_bytes
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.optim import Role, RoutedParameter, fused_backward_of, route_parameters
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer
from llmnorm.training.state_by_rank import Layout, largest, state_by_rank


class RoleMemory(NamedTuple):
    """Bytes per process. `states` are moments, counters and statistics, `projectors` their bases, `masters`
    copies of weights that are updated in their stead."""

    weights: int
    gradients: int
    states: int
    projectors: int
    masters: int = 0

    def under_zero(self, stage: int, processes: int) -> RoleMemory:
        """What ZeRO leaves of whole weights and gradients on each process; it flattens vectors with the
        rest."""
        weights, gradients = (-(-size // processes) for size in (self.weights, self.gradients))
        return self._replace(
            weights=weights if stage == 3 else self.weights,
            gradients=gradients if stage >= 2 else self.gradients,
            masters=weights,
        )


def memory_by_role(
    model: LlmNormForCausalLM, optimizer: Optimizer, layout: Layout, compiled: bool, accumulates: bool = False
) -> dict[str, RoleMemory]:
    """Role -> what its parameters take on the process that holds most; weights and gradients before ZeRO
    cuts them (`RoleMemory.under_zero`).

    accumulates: an update has several micro-batches, which matters with `fused_backward`.
    """
    routed = route_parameters(model)
    held = largest(state_by_rank(model, optimizer, layout))
    last = _largest_gradient(model, routed, compiled) if fused_backward_of(optimizer) else None
    table = {}
    for role in Role:
        members = [one.parameter for one in routed if one.role is role]
        if not members:
            continue
        shards = layout.shards if layout.strategy == "fsdp2" and role is not Role.VECTOR else 1
        gradients = sum(_first_rows(p, _gradient_bytes([p]), shards) for p in members)
        if last is not None:
            alone = last[1] if role is last[0] else 0
            gradients = alone + _summed_bytes(optimizer, role) if accumulates else alone
        table[role.value] = RoleMemory(
            sum(_first_rows(p, stored_bytes(p), shards) for p in members),
            gradients,
            *held[role.value],
        )
    return table


def _first_rows(parameter: Tensor, bytes_: int, shards: int) -> int:
    """What the first process has of it, which is also what the others make room for."""
    return bytes_ * -(-parameter.shape[0] // shards) // parameter.shape[0]


def _gradient_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _summed_bytes(optimizer: Optimizer, role: Role) -> int:
    """What `fused_backward` holds of the micro-batches' gradients while the next one arrives."""
    assert isinstance(optimizer, LowRankOptimizer)
    groups = [group for group in optimizer.param_groups if group["role"] == role]
    if role is Role.HIDDEN_MATRIX:
        return sum(optimizer.projected_bytes(group, p) for group in groups for p in group["params"])
    return sum(_gradient_bytes(group["params"]) for group in groups)


def _largest_gradient(
    model: LlmNormForCausalLM, routed: Sequence[RoutedParameter], compiled: bool
) -> tuple[Role, int]:
    """The most gradient that is held at once if each is freed as it arrives, and whose it is."""
    sizes = [(one.role, _gradient_bytes([one.parameter])) for one in routed]
    if compiled:
        sizes += [(Role.HIDDEN_MATRIX, _gradient_bytes(block.parameters())) for block in model.model.layers]
    return max(sizes, key=lambda role_and_size: role_and_size[1])
