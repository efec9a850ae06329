"""Hidden matrices in INT8, and no other copy of them (Q-GaLore, arXiv 2407.08296; Q-APOLLO, 2412.05270).

    w <- SR(W' - lr u)        W' the decoded weight, u the update, SR: rounded at random, right on average

The step (`MatrixOptimizer`) decodes in fp32, moves and encodes again with new ranges, one matrix at a time.
The random numbers come from (seed, parameter, step), so that a resumed run draws what it would have drawn. A
block whose numbers do not move keeps its codes. The number at the end of a block's range is cut to the codes,
as published: it can lose up to half a step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmnorm.errors import UserError
from llmnorm.int8 import Int8Weight
from llmnorm.optim.constraints import constrained_modules
from llmnorm.optim.roles import Role, route_parameters

_REMEDY = "leave optimizer.weights at param"


@torch.no_grad()
def quantize_weights(model: nn.Module, block: int = 256) -> None:
    """Put INT8 weights in place of the hidden matrices of `model`, whose embedding, head and vectors stay.

    block: numbers that share a range, 256 in Q-GaLore and 128 in Q-APOLLO. Call it before the optimizer is
    made; weights that are INT8 already are left as they are.

    Raises `UserError` where something else owns the weights: several processes, a weight constraint, 4-bit
    operands, a matrix that two modules share.
    """
    _require_own_weights(model)
    hidden = {id(routed.parameter) for routed in route_parameters(model) if routed.role is Role.HIDDEN_MATRIX}
    places = [
        (name, module, attribute, parameter)
        for name, module in model.named_modules()
        for attribute, parameter in module.named_parameters(recurse=False)
        if id(parameter) in hidden and not isinstance(parameter, Int8Weight)
    ]
    seen: dict[int, str] = {}
    for name, _, attribute, parameter in places:
        full = f"{name}.{attribute}"
        if id(parameter) in seen:
            raise UserError(
                f"optimizer.weights=int8 cannot keep {full}, which is {seen[id(parameter)]} as well: tied "
                f"matrices have one gradient and would get two sets of codes; {_REMEDY}"
            )
        seen[id(parameter)] = full
    for _, module, attribute, parameter in places:
        setattr(module, attribute, nn.Parameter(Int8Weight.of(parameter, block)))


def _require_own_weights(model: nn.Module) -> None:
    several = isinstance(model, DistributedDataParallel) or (
        dist.is_initialized() and dist.get_world_size() > 1
    )
    if several:
        raise UserError(
            "optimizer.weights=int8 works in one process: DDP and FSDP2 send and shard plain tensors. Start "
            f"one process, or {_REMEDY}"
        )
    config = getattr(model, "config", None)
    for key in ("weight_constraint", "weight_parametrization", "quantization"):
        if getattr(config, key, None) is not None:
            raise UserError(
                f"optimizer.weights=int8 and model.{key} both decide what the weights hold; remove one of "
                "them"
            )
    owners = [*constrained_modules(model)]
    owners += [module for module in model.modules() if getattr(module, "zero_mean_outputs", False)]
    if owners:
        raise UserError(
            f"optimizer.weights=int8 rounds weights that {type(owners[0]).__name__} of model.norm="
            f"{getattr(config, 'norm', None)} needs to be exact after each step; {_REMEDY}"
        )
