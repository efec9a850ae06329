"""Model, optimizer and random state as named tensors and JSON.

    model/<fqn>                        parameters and persistent buffers; tied ones under their first name
    optimizer/<fqn>/<key>[/<index>]    per-parameter optimizer state, in its own dtype
    rng/<rank>/<generator>             state of each process's random generators

Python numbers of the optimizer go to `state.json`, under the key "optimizer".
"""

from __future__ import annotations

import inspect
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.tensor as dtensor
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from llmnorm.checkpoint.format import DTYPES, TensorRecord
from llmnorm.checkpoint.layout import placements_from_names
from llmnorm.checkpoint.ranks import Ranks, logger
from llmnorm.checkpoint.reading import copy_from_checkpoint, open_index, read_state, read_tensors
from llmnorm.errors import UserError
from llmnorm.int8 import stored_parts

# Names that torch.compile and the checkpoint wrapper put in front of a module's own.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_TENSOR_TYPES = (Tensor, nn.Parameter, DTensor)


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by fully qualified name, without wrappers' names, tied ones once."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    # state_dict rather than named_parameters: its hook makes FSDP2 return to the shards that the optimizer
    # holds, where an evaluation left the root module gathered.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        named[name] = tensor
    return named


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`model/<fqn>` -> the live parameters and persistent buffers, plain or DTensor, sharing storage.

    An INT8 weight is its codes; its scales and zero points stand beside, see `int8.stored_parts`.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in _named(model).items():
        named |= stored_parts(f"model/{name}", tensor)
    return named


def _optimizer_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's parameters by fully qualified name, in the model's order."""
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: tensor for name, tensor in _named(model).items() if id(tensor) in owned}
    assert len(parameters) == len(owned), "the optimizer holds parameters that are not the model's"
    return parameters


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for one entry of the optimizer state; tensors go to `tensors` and leave their name behind."""
    if type(value) in _TENSOR_TYPES:
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    raise TypeError(
        f"{name}: optimizer state of type {type(value).__name__} cannot be saved; use plain tensors, "
        "numbers, strings, and lists, tuples or dicts of them"
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content.items()}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _counters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Per group, the numbers that the optimizer counts there itself (a step count, Prodigy's `d`).

    What the constructor takes by name, or as any keyword, is a hyperparameter: those come from the config.
    """
    constructor = inspect.signature(type(optimizer).__init__).parameters
    hyperparameters = {"params", "initial_lr", *constructor}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in constructor.values()):
        hyperparameters |= optimizer.defaults.keys()
    return [
        {
            key: value
            for key, value in group.items()
            if key not in hyperparameters and isinstance(value, bool | int | float)
        }
        for group in optimizer.param_groups
    ]


def optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, ranks: Ranks | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All the state of any `torch.optim.Optimizer`: `(tensors, json)`; save the json as `state["optimizer"]`.

    Tensors are the live ones, in their own dtypes, shapes and placements. An optimizer whose
    `keeps_state_apart()` is true has state of some parameters on some processes only; with `ranks`, the json
    then names everybody's, and the call is collective. Raises TypeError, naming the
    parameter and the key, for state that is neither tensors nor plain Python numbers, strings and containers.
    """
    parameters = _optimizer_parameters(model, optimizer)
    owned = {id(parameter) for parameter in parameters.values()}
    for key in optimizer.state:
        if id(key) not in owned:
            raise TypeError(f"optimizer state under {str(key)[:50]!r}, no parameter, cannot be saved")
    tensors: dict[str, Tensor] = {}
    state = {
        name: {
            key: _encode(value, f"optimizer/{name}/{key}", tensors)
            for key, value in optimizer.state[parameter].items()
        }
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }
    apart = getattr(optimizer, "keeps_state_apart", None)
    if ranks is not None and apart is not None and apart():
        joined: dict[str, dict[str, Any]] = {}
        for part in ranks.exchange(state):
            for name, entries in part.items():
                joined[name] = {**joined.get(name, {}), **entries}
        state = joined
    return tensors, {"class": type(optimizer).__name__, "groups": _counters(optimizer), "state": state}


def _device(
    record: TensorRecord, saved_parameter: TensorRecord, parameter: Tensor, group: dict[str, Any]
) -> Any:
    """Where a state tensor lives: beside its parameter, unless the optimizer had it on the CPU by choice.

    torch's own rule for a 0-d step count: on the CPU, but beside the parameter for fused and capturable
    optimizers.
    """
    if record.device == "cpu":
        if saved_parameter.device != "cpu":
            return "cpu"
        if not record.shape and not group.get("fused") and not group.get("capturable"):
            return "cpu"
    return parameter.device


def _empty_state(
    record: TensorRecord, saved_parameter: TensorRecord, parameter: Tensor, device: Any
) -> Tensor:
    """Memory for a state tensor, distributed like its parameter if it has the parameter's shape.

    State of another shape keeps its own placements where the parameter is still a DTensor of a mesh with as
    many dimensions, and is whole on every process otherwise. So is state that was whole beside a sharded
    parameter.
    """
    dtype = DTYPES[record.dtype]
    whole_by_choice = record.placements is None and saved_parameter.placements is not None
    if record.shape == saved_parameter.shape and not whole_by_choice:
        if hasattr(parameter, "ds_shape"):  # ZeRO-3 leaves parameters empty
            return torch.zeros(record.shape, dtype=dtype, device=device)
        return torch.zeros_like(parameter, dtype=dtype, device=device, requires_grad=False)
    if (
        isinstance(parameter, DTensor)
        and record.placements is not None
        and len(record.placements) == parameter.device_mesh.ndim
    ):
        placements = placements_from_names(record.placements)
        return dtensor.zeros(
            *record.shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements
        )
    return torch.zeros(record.shape, dtype=dtype, device=device)


def _tensor_names(node: Any) -> list[str]:
    if not isinstance(node, dict):
        return []
    ((kind, content),) = node.items()
    if kind == "tensor":
        return [content]
    items = content.values() if kind == "dict" else content
    return [name for item in items for name in _tensor_names(item)]


def restore_optimizer(
    model: nn.Module, optimizer: Optimizer, checkpoint: str | Path, only: set[Any] | None = None
) -> None:
    """Replace the optimizer's state, if it has any yet, by what `optimizer_tensors` gave to the checkpoint;
    with `only`, a set of parameters, by the part that is theirs.

    Not through `Optimizer.load_state_dict`, which casts state to the parameter's dtype (pytorch#43706). An
    optimizer with `empty_state(parameter, key, shape, dtype, device)` says by it where state lives now: plain
    memory, a DTensor, or None for what another process keeps.
    Learning rate and the other hyperparameters stay as the config made them. Raises UserError if another
    optimizer, or other parameters, saved the state.
    """
    checkpoint = Path(checkpoint)
    index = open_index(checkpoint)
    saved = read_state(checkpoint)["optimizer"]
    parameters = _optimizer_parameters(model, optimizer)
    problem = None
    if saved["class"] != type(optimizer).__name__:
        problem = f"was saved by {saved['class']}, and this run's optimizer is {type(optimizer).__name__}"
    elif len(saved["groups"]) != len(optimizer.param_groups):
        problem = (
            f"has {len(saved['groups'])} parameter groups, and this run has {len(optimizer.param_groups)}"
        )
    elif unknown := sorted(saved["state"].keys() - parameters.keys()):
        problem = f"holds state of {unknown[0]} ({len(unknown)} in all), which this run does not train"
    if problem:
        raise UserError(
            f"the optimizer state in {checkpoint} {problem}; restore the optimizer and model keys of "
            "that run, or set output_dir to a new folder"
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    wanted = {
        name: entries for name, entries in saved["state"].items() if only is None or parameters[name] in only
    }
    tensors: dict[str, Tensor] = {}
    elsewhere: set[str] = set()
    make = getattr(optimizer, "empty_state", None)
    for name, entries in wanted.items():
        parameter, saved_parameter = parameters[name], index.tensors[f"model/{name}"]
        for key, node in entries.items():
            for tensor_name in _tensor_names(node):
                record = index.tensors[tensor_name]
                device = _device(record, saved_parameter, parameter, groups[id(parameter)])
                if make is None:
                    memory = _empty_state(record, saved_parameter, parameter, device)
                else:
                    memory = make(parameter, key, record.shape, DTYPES[record.dtype], device)
                if memory is None:
                    elsewhere.add(tensor_name)
                else:
                    tensors[tensor_name] = memory
    if only is None and tensors:
        read_tensors(checkpoint, tensors, elsewhere)
    else:
        copy_from_checkpoint(checkpoint, index, tensors)
    for name, entries in wanted.items():
        held = {
            key: _decode(node, tensors)
            for key, node in entries.items()
            if not elsewhere.intersection(_tensor_names(node))
        }
        if held:
            optimizer.state[parameters[name]] = held
    for group, counters in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(counters)


def rng_tensors(rank: int) -> dict[str, Tensor]:
    """State of this process's global generators (torch CPU and current CUDA device, Python, NumPy)."""
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([legacy["state"]["pos"], legacy["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor(legacy["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return {f"rng/{rank}/{name}": tensor for name, tensor in tensors.items()}


def restore_rng(checkpoint: str | Path, rank: int) -> None:
    """Set this process's generators to what `rank` saved; the first process whose state the checkpoint does
    not have warns for all.
    """
    checkpoint = Path(checkpoint)
    index = open_index(checkpoint)
    current = rng_tensors(rank)
    absent = sorted(current.keys() - index.tensors.keys())
    lower = {name.replace(f"rng/{rank}/", f"rng/{rank - 1}/") for name in absent}
    if absent and (rank == 0 or lower <= index.tensors.keys()):
        logger.warning(
            "%s has no %s (another process count or device saved it): these generators, and those of higher "
            "ranks, keep their seeds",
            checkpoint,
            ", ".join(absent),
        )
    found = {name: tensor for name, tensor in current.items() if name not in absent}
    copy_from_checkpoint(checkpoint, index, found)
    state = {name.rsplit("/", 1)[1]: tensor for name, tensor in found.items()}
    if "torch" in state:
        torch.set_rng_state(state["torch"])
        gauss = state["python_gauss"].item()
        random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
        key, cached = state["numpy"].numpy().astype(np.uint32), state["numpy_gauss"].item()
        position, has_gauss = state["numpy_position"].tolist()
        np.random.set_state(("MT19937", key, position, has_gauss, cached))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
