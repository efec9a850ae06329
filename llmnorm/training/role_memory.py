"""Bytes that each role's parameters take: weights, gradients, moments and the bases of moments.

FSDP2 shards matrices, their gradients and the state of their shape over the processes. Vectors stay whole on
each, and so does state of another shape, such as a basis and the moments in its coordinates. ZeRO shards
state and an fp32 copy of all weights, gradients from stage 2 on, and weights under stage 3 too. With
`fused_backward` one gradient exists at a time, and with `train.compile` those of one block, as compiled code
hands them over together; where it accumulates, the sums of projections are there as well, and whole gradients
of what is not projected.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from llmnorm.int8 import stored_bytes
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.optim import Role, RoutedParameter, fused_backward_of, route_parameters, routing_table
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer

logger = logging.getLogger("llmnorm.training")


class RoleMemory(NamedTuple):
    """Bytes per process. `states` are moments, counters and statistics, `projectors` their bases, `masters`
    copies of weights that are updated in their stead."""

    weights: int
    gradients: int
    states: int
    projectors: int
    masters: int = 0

    def under_zero(self, stage: int, processes: int) -> RoleMemory:
        """What ZeRO leaves of this on each process; it flattens vectors with the rest."""
        part = RoleMemory(*(-(-size // processes) for size in self))
        return part._replace(
            weights=part.weights if stage == 3 else self.weights,
            gradients=part.gradients if stage >= 2 else self.gradients,
            masters=part.weights,
        )


def memory_by_role(
    model: LlmNormForCausalLM, optimizer: Optimizer, shards: int, compiled: bool, accumulates: bool = False
) -> dict[str, RoleMemory]:
    """Role -> what its parameters take on each of `shards` processes; warns of state that nobody knows.

    accumulates: an update has several micro-batches, which matters with `fused_backward`.
    """
    routed = route_parameters(model)
    routes = {route.role: route for route in routing_table(optimizer)}
    last = _largest_gradient(model, routed, compiled) if fused_backward_of(optimizer) else None
    table = {}
    for role in Role:
        members = [one.parameter for one in routed if one.role is role]
        if not members:
            continue
        parts = 1 if role is Role.VECTOR else shards
        route = routes[role]
        if route.state_bytes is None:
            logger.warning("the state of %s on %s is not in this plan", route.method, role)
        total, whole = route.state_bytes or 0, route.whole_bytes
        state = whole + -(-(total - whole) // parts)
        gradients = -(-_gradient_bytes(members) // parts)
        if last is not None:
            alone = last[1] if role is last[0] else 0
            gradients = alone + _summed_bytes(optimizer, role) if accumulates else alone
        table[role.value] = RoleMemory(
            -(-sum(map(stored_bytes, members)) // parts),
            gradients,
            state - route.projector_bytes,
            route.projector_bytes,
        )
    return table


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
