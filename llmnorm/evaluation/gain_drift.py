"""How far the gains of the norms have moved from their initial value, and how many never moved.

    drift = sqrt(mean_i (gain_i - gain_0)^2) / |gain_0|            (divided by 1 where gain_0 = 0)

gain_0 is what the module states in `initial_values`, or 1 for another library's norm. Gains that are exactly
gain_0 after training were never updated: in bf16 a gain of 1 swallows every step below 1/256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Gain(NamedTuple):
    """One parameter that starts at a constant. `layer` counts from 1; 0 is outside the layers."""

    name: str
    layer: int
    parameter: Tensor
    initial: float
    is_norm: bool


def find_gains(model: nn.Module, blocks: Sequence[nn.Module]) -> list[Gain]:
    """The gains of norms, and of our models also learned branch scales and gates, in the model's order."""
    layer_of = {id(part): number for number, block in enumerate(blocks, 1) for part in block.modules()}
    found = []
    for prefix, module in model.named_modules():
        for name, initial in _initial_values(module).items():
            parameter = getattr(module, name)
            layer = layer_of.get(id(module), 0)
            found.append(Gain(f"{prefix}.{name}", layer, parameter.detach(), initial, name == "weight"))
    return found


def _initial_values(module: nn.Module) -> dict[str, float]:
    if hasattr(module, "initial_values"):
        stated: dict[str, Any] = module.initial_values  # type: ignore[assignment]
        constant = {name: value for name, value in stated.items() if isinstance(value, (int, float))}
        return {name: value for name, value in constant.items() if name != "bias"}
    weight = getattr(module, "weight", None)
    kind = type(module).__name__
    if not (kind.endswith("Norm") and isinstance(weight, Tensor) and weight.ndim == 1):
        return {}
    # Gemma's norms multiply by 1 + weight.
    return {"weight": 0.0 if kind.startswith("Gemma") else 1.0}


def drift(gain: Gain) -> float:
    """The equation at the top of this file."""
    moved = gain.parameter.double() - gain.initial
    return math.sqrt(float(moved.square().mean())) / (abs(gain.initial) or 1.0)


def gain_drift(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, Any]:
    """Each gain's numbers, and per layer the RMS over the gains of its norms (null: the layer has none)."""
    gains = find_gains(model, blocks)
    return {
        "gain_drift": drift_per_layer(gains, len(blocks)),
        "gains": [
            {
                "name": gain.name,
                "layer": gain.layer,
                "initial": gain.initial,
                "mean": float(gain.parameter.double().mean()),
                "min": float(gain.parameter.min()),
                "max": float(gain.parameter.max()),
                "drift": drift(gain),
                "unchanged": float((gain.parameter == gain.initial).double().mean()),
            }
            for gain in gains
        ],
    }


def drift_per_layer(gains: Sequence[Gain], num_layers: int) -> list[float | None]:
    """RMS of (gain - gain_0) / gain_0 over all norm gains of each layer, in one transfer from the device."""
    squares: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]
    counts = [0] * (num_layers + 1)
    for gain in gains:
        if gain.is_norm:
            moved = (gain.parameter.double() - gain.initial) / (abs(gain.initial) or 1.0)
            squares[gain.layer].append(moved.square().sum())
            counts[gain.layer] += moved.numel()
    sums = [torch.stack(of_layer).sum() for of_layer in squares[1:] if of_layer]
    totals = iter(torch.stack(sums).tolist() if sums else [])
    return [math.sqrt(next(totals) / count) if count else None for count in counts[1:]]
