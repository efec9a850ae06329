"""Norms that users bring: classes that the config key `norm` names as `file.py:Class`.

A plugin norm is an `nn.Module` class with the constructor `(hidden_size, eps, **options)` and a forward from
x [..., d] to the same shape and dtype. Its options are keys of `norm_options`, beside `placement`, which says
where the norm stands; see `plugin_placements.py`.

CLASSES is filled when a run loads its plugins. An export carries the user's file beside this one, and lines
at the end that fill it from there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

CLASSES: dict[str, type[nn.Module]] = {}  # file.py:Class -> the class


def is_plugin(norm: Any) -> bool:
    """Whether a value of `norm` names a class in a file."""
    return isinstance(norm, str) and ".py:" in norm


def plugin_class(norm: str) -> type[nn.Module]:
    """The class; ValueError when its file has not been loaded."""
    if norm not in CLASSES:
        file = norm.partition(":")[0]
        same_file = [name for name in CLASSES if name.startswith(f"{file}:")]
        known = f"; {file} has {', '.join(same_file)}" if same_file else f"; list {file} in plugins"
        raise ValueError(f"norm={norm} is a class that is not loaded{known}")
    return CLASSES[norm]


def plugin_options(norm: str) -> dict[str, Any]:
    """option -> its default, or inspect.Parameter.empty for one that must be given."""
    parameters = list(inspect.signature(plugin_class(norm)).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    if names[:2] != ["hidden_size", "eps"]:
        raise ValueError(f"norm={norm} must be constructed from (hidden_size, eps, ...), not {tuple(names)}")
    return {p.name: p.default for p in parameters if p.name in names[2:]}


def make_plugin_norm(norm: str, hidden_size: int, eps: float, **options: Any) -> nn.Module:
    """The norm, each of whose parameters says what it starts from, as `initialization.py` asks.

    What `initial_values` does not list starts from what the constructor makes it, which must be one number.
    ValueError for a parameter that is not, and for a buffer that nothing rebuilds on a meta-device model.
    """
    module = plugin_class(norm)(hidden_size, eps, **options)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        example = plugin_class(norm)(hidden_size, eps, **options)
    for (_, part), (path, made) in zip(module.named_modules(), example.named_modules(), strict=True):
        where = f"norm={norm}: {path}." if path else f"norm={norm}: "
        values = dict(getattr(part, "initial_values", {}))
        for name, parameter in made.named_parameters(recurse=False):
            if name not in values:
                first = float(parameter.detach().flatten()[0])
                if bool((parameter != first).any()):
                    raise ValueError(f"{where}{name} starts from more than one value; give it one number")
                values[name] = first
        part.initial_values = values
        buffers = [name for name, _ in made.named_buffers(recurse=False)]
        if buffers and not callable(getattr(part, "rebuild_buffers", None)):
            raise ValueError(
                f"{where}{buffers[0]} is a buffer, and models are made without memory first; define "
                "rebuild_buffers(self), which fills it in place"
            )
    return module
