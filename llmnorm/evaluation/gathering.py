"""A whole-precision view of a sharded model, one block's weights in memory at a time.

Under FSDP2 a forward pass computes in the precision its mixed-precision policy gathers, bf16 as a rule, while
the shards themselves are the fp32 master weights. For a measurement in fp32 the shards are gathered as they
are: an unsharded skeleton of the model runs, and each FSDP unit's parameters are filled in before its forward
and dropped after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` or a part of it is under FSDP2."""
    return any(_is_unit(module) for module in model.modules())


def forward_is_collective(model: nn.Module) -> bool:
    """Whether every process must run a forward pass together: FSDP2, and DeepSpeed's ZeRO-3."""
    return is_sharded(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _is_unit(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def gathered_float32(model: nn.Module) -> nn.Module:
    """An fp32 stand-in for an FSDP2 model, on the device it computes on; its forward is collective.

    Its embedding, output layer and final norm are gathered once, its blocks at every forward. The stand-in
    shares buffers with `model`, costs no memory before it runs, and must not be trained.
    """
    original: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        skeleton: Any = original(model.config)
    device = _compute_device(model)
    for name, buffer in model.named_buffers():
        owner, key = _owner(skeleton, name)
        owner._buffers[key] = buffer.to(device)
    for prefix, unit in model.named_modules():
        if not _is_unit(unit):
            continue
        stand_in = skeleton.get_submodule(prefix)
        shards = {
            name: parameter
            for name, parameter in unit.named_parameters()
            if _nearest_unit(unit, name) is unit
        }
        if unit is model:
            _fill(stand_in, shards, device)
        else:
            stand_in.register_forward_pre_hook(lambda part, _, shards=shards: _fill(part, shards, device))
            stand_in.register_forward_hook(lambda part, _, output, shards=shards: _drop(part, shards, output))
    skeleton.tie_weights()
    return skeleton.eval()


def _fill(part: nn.Module, shards: dict[str, nn.Parameter], device: torch.device) -> None:
    for name, shard in shards.items():
        whole = shard.full_tensor() if isinstance(shard, DTensor) else shard
        owner, key = _owner(part, name)
        value = whole.detach().to(device)
        owner._parameters[key] = nn.Parameter(value.float() if value.is_floating_point() else value, False)


def _drop(part: nn.Module, shards: dict[str, nn.Parameter], output: Any) -> Any:
    for name in shards:
        owner, key = _owner(part, name)
        parameter = owner._parameters[key]
        assert parameter is not None
        owner._parameters[key] = nn.Parameter(parameter.to("meta"), False)
    return output


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key


def _nearest_unit(unit: nn.Module, name: str) -> nn.Module:
    """The innermost FSDP unit below (or equal to) `unit` that holds the parameter `name`."""
    nearest = module = unit
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        if _is_unit(module):
            nearest = module
    return nearest


def _compute_device(model: nn.Module) -> torch.device:
    """Where FSDP2 computes: its mesh's device, which under CPU offload is not where its shards are."""
    mesh = next(parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
