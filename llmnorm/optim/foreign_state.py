"""What a state_dict must be to be loaded: saved by the same method, for parameters of the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llmnorm.errors import UserError

if TYPE_CHECKING:
    from llmnorm.optim.matrix_optimizer import MatrixOptimizer


def check_methods(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise `UserError` where a group of `state_dict` was saved by another method than it would go to."""
    for number, (own, saved) in enumerate(
        zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    ):
        theirs = saved.get("method", "an optimizer that names no method")
        if theirs != own["method"]:
            raise UserError(
                f"this state_dict was saved by {theirs}, and this optimizer is {own['method']} (group "
                f"{number}, role {own['role']}); create the method that saved it, or start with fresh state"
            )


def check_shapes(optimizer: MatrixOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first state that a parameter of this shape does not keep like that.

    Options come from `state_dict`, as torch loads them. Sharded parameters are left to whoever cut them.
    """
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        options = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
        names = own.get("param_names") or [f"parameter {number}" for number in range(len(own["params"]))]
        for name, parameter, index in zip(names, own["params"], saved["params"], strict=False):
            held = state_dict["state"].get(index)
            if not held or isinstance(parameter, DTensor):
                continue
            for key, expected in optimizer.planned_state({**own, **options}, parameter).items():
                if key in held and _sizes(held[key]) == _sizes(expected):
                    continue
                found = f"has shape {tuple(held[key].shape)}" if key in held else "is absent"
                raise UserError(
                    f"the state {key} of {name} {found} in this state_dict, and {tuple(expected.shape)} "
                    f"belongs to its shape {tuple(parameter.shape)}; load the state of the same model, or "
                    "start with fresh state"
                )


def _sizes(state: Tensor) -> list[int]:
    """Its shape without ones, which a stack of equal matrices may have more of."""
    return [size for size in state.shape if size != 1]
