"""SwiGLU and its relatives: an activated gate times a linear branch, in one pass each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_choice, check_floats, check_given, check_same_shape
from .dispatch import accumulator, operator, register, runs_triton

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def swiglu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up in the accumulator dtype, rounded once."""
    acc = accumulator(gate.dtype)
    return (ACTIVATIONS[activation](gate.to(acc)) * up.to(acc)).to(gate.dtype)


def _fake_forward(gate, up, activation):
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _fake_backward(dout, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty(0) if up is None else up.new_empty(up.shape)


register(
    "gated_forward(Tensor gate, Tensor? up, str activation) -> Tensor",
    "swiglu_kernels:launch_gated_forward",
    _fake_forward,
)
register(
    "gated_backward(Tensor dout, Tensor gate, Tensor? up, str activation) -> (Tensor, Tensor)",
    "swiglu_kernels:launch_gated_backward",
    _fake_backward,
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return torch.ops.llmnorm_kernels.gated_forward(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.ops.llmnorm_kernels.gated_backward(dout, gate, up, ctx.activation)
        return dgate, None if up is None else dup, None


@operator
def swiglu(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """y = act(gate) * up, computed in float32 and rounded once (Shazeer, GLU Variants, arXiv 2002.05202).

    gate, up: (..., width) of one dtype; or gate alone: (..., 2 width),
    the output of one matrix product that holds [gate | up], whose gradient then comes back as one tensor
    without a concatenation. activation: silu (SwiGLU), gelu_tanh (GeGLU), relu (ReGLU), sigmoid (GLU). Bytes
    moved, E elements of B bytes in y: 3 E B forward, 5 E B backward. Raises ValueError for unequal shapes or
    dtypes, an odd packed width, an unknown activation.
    """
    check_given(gate=gate)
    check_floats(gate=gate, up=up)
    check_choice("activation", activation, tuple(ACTIVATIONS))
    if gate.dim() and gate.shape[-1] == 0:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; its last dimension, the width, must not be zero"
        )
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(
                f"gate has shape {tuple(gate.shape)}; packed [gate | up] needs an even last dimension"
            )
    else:
        check_same_shape("up", up, "gate", gate)
        if up.dtype != gate.dtype:
            raise ValueError(f"up has dtype {up.dtype} but gate has {gate.dtype}; cast one of them")
    if runs_triton(gate):
        return _Gated.apply(gate, up, activation)
    first, second = gate.chunk(2, -1) if up is None else (gate, up)
    return swiglu_reference(first, second, activation)
