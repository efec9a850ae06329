"""Weights that must obey something after every update: unit rows (nGPT, FixNorm), capped singular values.

A module states its own rule as a method `project_weights_()`, which moves the module's own parameters to the
nearest weights, or to whatever its method says, that obey. `project_weights(model)` calls them all; training
calls it after every optimizer step and once before the first. A model whose config has `weight_constraint`
has its matrices treated after that (`spectral_constraints.py`). With an optimizer of one's own loop:

    optimizer.register_step_post_hook(lambda *_: project_weights(model, optimizer))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llmnorm.optim.matrix import gather, local, scatter
from llmnorm.optim.spectral_constraints import constrain_spectra


@torch.no_grad()
def project_weights(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Call `project_weights_()` of every module of `model` that has it, in the model's order; then apply the
    config's `weight_constraint`, of which some rules depend on the step that `optimizer` has just made.

    The method sees plain tensors. Where the module's parameters are DTensors, it is given the whole matrices,
    and each process keeps its shard of the result: one gather per matrix, joined by every process. A module
    with a true attribute `projects_rows` treats each row (entry of dimension 0) by itself; it is given the
    rows that this process holds, without communication. Replicas (DDP) each compute the same.

    Parameters that the method reads or writes are the module's own, not those of its children.
    """
    for module in constrained_modules(model):
        parameters = dict(module.named_parameters(recurse=False))
        sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
        if getattr(module, "projects_rows", False) and all(_holds_whole_rows(p) for p in sharded.values()):
            with _standing_in(module, {name: local(p.detach()) for name, p in sharded.items()}):
                module.project_weights_()  # type: ignore[operator]
            continue
        whole = {name: gather(p.detach()) for name, p in sharded.items()}
        with _standing_in(module, whole):
            module.project_weights_()  # type: ignore[operator]
        for name, parameter in sharded.items():
            local(parameter.detach()).copy_(local(scatter(whole[name], parameter)))
    constrain_spectra(model, optimizer)


def constrained_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` that define `project_weights_()`."""
    return (module for module in model.modules() if hasattr(module, "project_weights_"))


def _holds_whole_rows(parameter: DTensor) -> bool:
    return all(placement.is_replicate() or placement.is_shard(0) for placement in parameter.placements)


@contextmanager
def _standing_in(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """`module` with plain tensors in place of its parameters; they are written to in place."""
    parameters = dict(module._parameters)
    module._parameters.update(values)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(parameters)
