"""INT8 weights: a tensor that is kept in codes of 8 bits and computes as what they stand for (Q-GaLore,
arXiv 2407.08296).

    s = max(max - min, 1e-5) / 255     z = clamp(-round(min / s), 0, 255)       of a block along a row
    q = clamp(round(w / s) + z, 0, 255)          w' = (q - z) s
    rounded at random: q = clamp(floor(w / s + u) + z, 0, 255), u uniform in [0, 1): right on average

A block's range holds 0, since the zero point of a block of one sign would lie outside the codes. Blocks never
span two rows, the last of a row may be short. `optim` moves such weights, `checkpoint` keeps their parts and
`export` writes w'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

SCALE, ZERO = ".int8_scale", ".int8_zero"  # what a checkpoint appends to a weight's name
BLOCKS = (256, 128)  # sizes of a block: a checkpoint tells them apart by the number of blocks
_TOP = 255


class Parts(NamedTuple):
    """codes uint8 (..., n); scale fp32 and zero, in the dtype that the weight computes in, (..., blocks)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def decode(self, block: int) -> Tensor:
        """w', fp32 (..., n)."""
        columns = self.codes.shape[-1]
        blocks = F.pad(self.codes, (0, -columns % block)).unflatten(-1, (-1, block)).float()
        values = (blocks - self.zero.float().unsqueeze(-1)) * self.scale.unsqueeze(-1)
        return values.flatten(-2)[..., :columns].contiguous()


def block_size(parts: Parts) -> int:
    """Numbers per block, from the shapes; rows that are shorter than either size have one block in both."""
    columns, blocks = parts.codes.shape[-1], parts.scale.shape[-1]
    return next(size for size in BLOCKS if -(-columns // size) == blocks)


def encode(values: Tensor, block: int, dtype: torch.dtype, noise: Tensor | None = None) -> Parts:
    """The codes of `values` (..., n): the nearest, or with `noise` u of their shape those rounded at random.

    `dtype`, a floating one, is that of the zero points, which are integers up to 255 and exact in each.
    """
    columns = values.shape[-1]

    def in_blocks(x: Tensor) -> Tensor:
        # The last element again, so that padding widens no block.
        padding = x[..., -1:].expand(*x.shape[:-1], -columns % block)
        return torch.cat((x, padding), -1).float().unflatten(-1, (-1, block))

    blocks = in_blocks(values)
    low, high = blocks.amin(-1, keepdim=True).clamp_max(0), blocks.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(1e-5) / _TOP
    zero = (-(low / scale).round()).clamp(0, _TOP)
    steps = blocks / scale
    steps = steps.round() if noise is None else (steps + in_blocks(noise)).floor()
    codes = (steps + zero).clamp(0, _TOP).to(torch.uint8).flatten(-2)[..., :columns]
    return Parts(codes.contiguous(), scale.squeeze(-1), zero.squeeze(-1).to(dtype))


class Int8Weight(Tensor):
    """A weight in INT8 that stands for its decoded values in a floating dtype: (out, in), or a stack of such.

    It is a leaf for autograd with a plain gradient of its own shape and dtype. `F.linear` keeps the codes for
    the backward pass and decodes them again; every other operation reads the decoded values. `requantize_`
    and `copy_` write; what else writes in place raises NotImplementedError.
    """

    parts: Parts
    block: int

    @staticmethod
    def __new__(cls, parts: Parts, block: int) -> Int8Weight:
        codes = parts.codes
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=parts.zero.dtype, device=codes.device)

    def __init__(self, parts: Parts, block: int) -> None:
        assert block in BLOCKS
        self.parts = parts
        self.block = block

    @classmethod
    def of(cls, values: Tensor, block: int = 256) -> Int8Weight:
        """The nearest INT8 weight to `values`, in their dtype."""
        return cls(encode(values.detach(), block, values.dtype), block)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, block={self.block})"

    @property
    def stored_bytes(self) -> int:
        """Bytes that the codes, scales and zero points take."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """w' in `dtype`, or in the weight's own."""
        return self.parts.decode(self.block).to(self.dtype).to(dtype or self.dtype)

    @torch.no_grad()
    def requantize_(self, values: Tensor, noise: Tensor | None = None) -> None:
        """Take `values` (fp32); a block none of whose numbers has changed keeps its codes."""
        columns = self.shape[-1]
        changed = F.pad(values != self.decoded(values.dtype), (0, -columns % self.block))
        changed = changed.unflatten(-1, (-1, self.block)).any(-1)
        per_number = changed.repeat_interleave(self.block, -1)[..., :columns]
        new = encode(values, self.block, self.dtype, noise)
        for held, part, where in zip(self.parts, new, (per_number, changed, changed), strict=True):
            held.copy_(torch.where(where, part, held))

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1] if len(args) > 1 else kwargs.get("weight"), cls):
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPERATIONS:
            return _OPERATIONS[func](*args, **kwargs)
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise NotImplementedError(
                f"{func} would write into an INT8 weight in place, which only optimizers with weights=int8 "
                "and copy_ do; read its values with decoded()"
            )
        return func(*_plain(args), **_plain(kwargs))


def _plain(tree: Any) -> Any:
    return pytree.tree_map_only(Int8Weight, Int8Weight.decoded, tree)


def _copy(target: Tensor, source: Tensor, *rest: Any) -> Tensor:
    if isinstance(target, Int8Weight):
        if isinstance(source, Int8Weight) and source.block == target.block:
            for held, part in zip(target.parts, source.parts, strict=True):
                held.copy_(part)
        else:
            target.requantize_(_plain(source).to(target.device, torch.float32).expand(target.shape))
        return target
    return target.copy_(_plain(source), *rest)


def _to(weight: Int8Weight, *, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
    if dtype not in (None, weight.dtype):
        return weight.decoded(dtype).to(device=device)
    return Int8Weight(Parts(*(part.to(device, copy=True) for part in weight.parts)), weight.block)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.detach.default: lambda weight: Int8Weight(weight.parts, weight.block),
    torch.ops.aten.clone.default: lambda weight, **_: Int8Weight(
        Parts(*(part.clone() for part in weight.parts)), weight.block
    ),
    torch.ops.aten.copy_.default: _copy,
    torch.ops.aten._to_copy.default: _to,
}


class _Product(torch.autograd.Function):
    """Y = X W'^T + b with nothing but X and the codes kept; dX = dY W', dW = dY^T X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight.decoded(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (dy,) = grad_outputs
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.decoded(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db


def _linear(input: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    with torch.autocast(kind, enabled=False):
        return _Product.apply(input.to(dtype), weight, bias)


def stored_bytes(parameter: Tensor) -> int:
    """Bytes that a parameter takes as it is kept."""
    if isinstance(parameter, Int8Weight):
        return parameter.stored_bytes
    return parameter.numel() * parameter.element_size()


def stored_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a checkpoint keeps of the tensor `name`: itself, or codes under its name and ranges beside."""
    if not isinstance(tensor, Int8Weight):
        return {name: tensor}
    return {name: tensor.parts.codes, name + SCALE: tensor.parts.scale, name + ZERO: tensor.parts.zero}
