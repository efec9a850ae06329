"""One good call of every public operator: its tensors by name, and what else it is given."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import llmnorm_kernels as kernels


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) + 0.1


def tokens() -> torch.Tensor:
    return torch.zeros(4, dtype=torch.long)


def codes() -> torch.Tensor:
    return torch.zeros(4, 8, dtype=torch.uint8)


def cells() -> torch.Tensor:
    return torch.zeros(1 << 16, dtype=torch.int32)


X, W = (4, 8), (8,)
HEADS = (1, 2, 4, 8)
# operator -> its tensors by name, and what else it is given. The others must fit the first tensor.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rms_norm": ({"x": X, "weight": W}, {}),
    "layer_norm": ({"x": X, "weight": W, "bias": W}, {}),
    "crms_norm": ({"x": X, "weight": W}, {}),
    "add_rms_norm": ({"x": X, "residual": X, "weight": W}, {}),
    "add_layer_norm": ({"x": X, "residual": X, "weight": W, "bias": W}, {}),
    "norm_add": ({"x": X, "residual": X, "weight": W}, {}),
    "sandwich_add": ({"x": X, "residual": X, "weight": W}, {}),
    "swiglu": ({"gate": X, "up": X}, {}),
    "apply_rope": ({"q": HEADS, "k": HEADS, "cos": (1, 4, 4), "sin": (1, 4, 4)}, {}),
    "qk_norm_rope": (
        {"q": HEADS, "k": HEADS, "q_weight": W, "k_weight": W, "cos": (1, 4, 4), "sin": (1, 4, 4)},
        {},
    ),
    "cross_entropy": ({"logits": X, "target": tokens}, {}),
    "linear_cross_entropy": ({"x": X, "weight": (16, 8), "target": tokens}, {}),
    "linear_attention": ({"q": HEADS, "k": HEADS, "v": HEADS}, {}),
    "fake_quantize": ({"x": X}, {"format": "int4", "group_size": 4}),
    "adamw_": ({"param": X, "grad": X, "exp_avg": X, "exp_avg_sq": X}, {"step": 1, "lr": 0.1}),
    "adamw_blockwise_": (
        {
            "param": X,
            "grad": X,
            "exp_avg_codes": codes,
            "exp_avg_absmax": (4, 1),
            "exp_avg_sq_codes": codes,
            "exp_avg_sq_absmax": (4, 1),
            "exp_avg_map": (256,),
            "exp_avg_cells": cells,
            "exp_avg_sq_map": (256,),
            "exp_avg_sq_cells": cells,
        },
        {"block": 256, "step": 1, "lr": 0.1},
    ),
    "normalized_step_": ({"param": X, "update": X}, {"dim": 1, "lr": 0.1}),
    "scaled_step_": ({"param": X, "update": X, "rows": (4,), "columns": W}, {"lr": 0.1}),
    "sinkgd_step_": ({"param": X, "grad": X}, {"lr": 0.1}),
    "low_rank_moments_": (
        {"low": X, "exp_avg": X, "exp_avg_sq": X},
        {"betas": (0.9, 0.99), "eps": 1e-8},
    ),
    "symmetric_product": ({"x": X, "addend": (4, 4)}, {}),
    "newton_schulz": ({"x": X}, {}),
}


def arguments(name: str) -> dict[str, Any]:
    shapes, _ = CALLS[name]
    return {key: shape() if callable(shape) else rand(*shape) for key, shape in shapes.items()}


def call(name: str, tensors: dict[str, Any], **more: Any) -> Any:
    function = getattr(kernels, name)
    names = list(inspect.signature(function).parameters)
    assert set(tensors) <= set(names), f"{name} takes {names}"
    return function(**tensors, **(CALLS[name][1] | more))
