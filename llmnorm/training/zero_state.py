"""A run under ZeRO in the checkpoint format of every other run, so that each can go on as the other.

Weights and state are gathered one parameter at a time; its owner keeps the whole tensor in host memory and
writes it. Reading goes the other way: each process reads one whole tensor and keeps its part.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmnorm.checkpoint import model_tensors, optimizer_tensors, read_whole, restore_optimizer
from llmnorm.training.zero_step import runs_on_partitions

if TYPE_CHECKING:
    from llmnorm.training.zero import ZeroModel


def zero_tensors(model: ZeroModel, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`(tensors, json of the optimizer)`: what `RunState` saves; collective."""
    view = _by_parameter(model, optimizer) if runs_on_partitions(optimizer) else optimizer
    tensors, state = optimizer_tensors(model.module, view)
    # Each process knows the state of what it owns; the JSON must tell of all.
    everyone = [entries for part in model.ranks.exchange(state["state"]) for entries in part.items()]
    state["state"] = dict(sorted(everyone))
    return {**_host(tensors), **_weights(model)}, state


def _weights(model: ZeroModel) -> dict[str, Tensor]:
    """The whole weights that this process owns, and all buffers."""
    found = {}
    for name, tensor in model_tensors(model.module).items():
        if not isinstance(tensor, nn.Parameter):
            found[name] = tensor
            continue
        whole = model.partitions.whole_weight(tensor)
        if model.owners[tensor] == model.processes.rank:
            found[name] = whole.cpu()
    return found


def _host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _by_parameter(model: ZeroModel, optimizer: Optimizer) -> Optimizer:
    """The optimizer as if it had run on whole parameters, with the state of those that this process owns."""
    view = copy.copy(optimizer)
    view.state = {}  # type: ignore[assignment]
    for parameter, owner in model.owners.items():
        flat = model.partitions.parts[parameter].flat
        entries = {}
        for key, value in optimizer.state.get(flat, {}).items():
            whole = value.clone() if value.ndim == 0 else model.partitions.gather(parameter, value)
            entries[key] = whole.cpu()
        if entries and owner == model.processes.rank:
            view.state[parameter] = entries
    return view


def restore_zero(model: ZeroModel, optimizer: Optimizer, checkpoint: Path) -> None:
    """Take weights and optimizer state over from a checkpoint of any kind of run."""
    targets = model_tensors(model.module)
    shapes = {
        name: torch.empty(model.partitions.shape(t), dtype=t.dtype, device="meta")
        if isinstance(t, nn.Parameter)
        else t
        for name, t in targets.items()
    }
    for name, whole in read_whole(checkpoint, shapes):
        target = targets[name]
        if isinstance(target, nn.Parameter):
            model.partitions.set_weight(target, whole.to(model.processes.device))
        else:
            target.copy_(whole)
    if not runs_on_partitions(optimizer):
        rank = model.processes.rank
        restore_optimizer(
            model.module, optimizer, checkpoint, {p for p, owner in model.owners.items() if owner == rank}
        )
        return
    optimizer.state.clear()
    for parameter in model.owners:
        view = copy.copy(optimizer)
        view.state = {}  # type: ignore[assignment]
        restore_optimizer(model.module, view, checkpoint, {parameter})
        _put(model, optimizer, parameter, view.state.get(parameter, {}))


def _put(model: ZeroModel, optimizer: Optimizer, parameter: nn.Parameter, entries: dict[str, Tensor]) -> None:
    """A parameter's whole state into the flat state of its partition; counts are the partition's own."""
    part = model.partitions.parts[parameter]
    state = optimizer.state[part.flat]
    for key, value in entries.items():
        if value.ndim == 0:
            state[key] = value
        else:
            if key not in state:
                state[key] = torch.zeros_like(part.flat, dtype=value.dtype, requires_grad=False)
            part.of(state[key]).copy_(part.cut(value))
