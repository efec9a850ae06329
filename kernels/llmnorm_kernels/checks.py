"""What a public operator asks of its arguments: a ValueError that names the argument, its value, the rule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floats(**tensors: Tensor | None) -> None:
    """ValueError unless every given tensor is floating point and all live on one device."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_given(**{name: tensor})
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} has dtype {tensor.dtype}; it takes float32, bfloat16, float16 or float64"
            )
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first[0]} is on {first[1].device}; move them together"
            )


def check_given(**tensors: Any) -> None:
    """ValueError unless every argument is a tensor, as `check_floats` asks only of those that are not
    None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")


def check_numbers(**numbers: float) -> None:
    """ValueError unless every number is finite and not negative."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or not (number >= 0.0 and math.isfinite(number)):
            raise ValueError(f"{name}={number!r} must be zero or positive, and finite")


def check_finite(**numbers: float) -> None:
    """ValueError unless every number is finite."""
    for name, number in numbers.items():
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{name}={number!r} must be a finite number")


def check_integers(**numbers: int) -> None:
    """ValueError unless every number is an integer; True and False are none."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{name}={number!r} must be an integer")


def check_betas(betas: tuple[float, float]) -> None:
    """ValueError unless betas are the two decay rates of Adam's moments."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas} must be two numbers, each at least 0 and below 1")


def check_vector(name: str, tensor: Tensor | None, width: int, of: str = "x") -> None:
    """ValueError unless `tensor` is absent or has shape (width,)."""
    if tensor is not None and tuple(tensor.shape) != (width,):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be ({width},), the last dimension of {of}"
        )


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} but {other_name} has {tuple(other.shape)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
