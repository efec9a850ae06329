"""Which parameter is what: the role decides which update rule a parameter gets.

Roles follow from the module that owns a parameter, never from its rank or the last part of its name: an
lm_head and a query projection are both two-dimensional and both called `weight`. Under FSDP2 call this
after `fully_shard`, which replaces the parameter objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel


class Role(StrEnum):
    """What a parameter does in the network."""

    HIDDEN_MATRIX = "hidden_matrix"  # projections of attention and MLP: (out, in)
    EMBEDDING = "embedding"  # (vocabulary, hidden), read by look-up
    LM_HEAD = "lm_head"  # (vocabulary, hidden), read by matrix product
    VECTOR = "vector"  # gains, biases, scalars and matrices with one row or one column


class RoutedParameter(NamedTuple):
    """One trainable parameter, once, however many names it has."""

    name: str
    parameter: nn.Parameter
    role: Role


def _is_vector(parameter: nn.Parameter) -> bool:
    return parameter.ndim < 2 or min(parameter.shape[-2:]) == 1


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every (qualified name, owning module, attribute, parameter), a tied parameter once per owner."""
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{attribute}" if prefix else attribute, module, attribute, parameter


def route_parameters(model: nn.Module) -> list[RoutedParameter]:
    """Every trainable parameter of `model` exactly once, in the model's order, with its role.

    A module may settle the role of its own parameters with a class attribute `parameter_roles`, for example
    `{"gate": "vector"}`. Otherwise vectors and degenerate matrices are `vector`, the weight of an
    `nn.Embedding` is `embedding`, the weight of `model.get_output_embeddings()` is `lm_head`, and every
    other matrix or stack of matrices is `hidden_matrix`. A weight tied between embedding and head counts as
    `lm_head`: its gradient is dense because of that use.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    roles: dict[nn.Parameter, Role] = {}
    names: dict[nn.Parameter, str] = {}
    for name, module, attribute, parameter in _owners(model):
        if not parameter.requires_grad:
            continue
        names.setdefault(parameter, name)
        declared = getattr(module, "parameter_roles", {}).get(attribute)
        if declared is not None:
            roles[parameter] = Role(declared)
        elif _is_vector(parameter):
            roles[parameter] = Role.VECTOR
        elif module is head:
            roles[parameter] = Role.LM_HEAD
        elif isinstance(module, nn.Embedding):
            roles.setdefault(parameter, Role.EMBEDDING)
        else:
            roles.setdefault(parameter, Role.HIDDEN_MATRIX)
    return [RoutedParameter(names[parameter], parameter, role) for parameter, role in roles.items()]


def classify_parameters(model: nn.Module) -> dict[str, Role]:
    """Qualified name -> role of every trainable parameter; see `route_parameters` for the rules."""
    return {routed.name: routed.role for routed in route_parameters(model)}


def group_by_role(parameters: Sequence[RoutedParameter]) -> list[dict[str, Any]]:
    """One named parameter group per role present: what the matrix methods take."""
    groups: list[dict[str, Any]] = []
    for role in Role:
        members = [(routed.name, routed.parameter) for routed in parameters if routed.role is role]
        if members:
            groups.append({"params": members, "role": str(role)})
    return groups
