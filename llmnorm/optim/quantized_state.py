"""Optimizer state in 8 or 4 bits: block-wise dynamic quantization (arXiv 2110.02861).

    a = max |x| of a block,   code = index of the nearest entry of a sorted map to x / a,   x' = map[code] a

Blocks run along the last dimension, the last of a row may be short, and none spans two rows: cutting a matrix
into shards of rows moves no block, so a state does not depend on the number of processes. 4-bit codes are two
to a byte.

The dynamic map has one run of equidistant values per decade below a; the signed one holds no -1, so that -a
decodes to -0.993 a. The unsigned 4-bit map is linear without a zero, which keeps a second moment positive.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llmnorm.optim.matrix import State
from llmnorm_kernels.blockwise import SMALLEST_ABSMAX, ordered_bits

BLOCK = {8: 256, 4: 128}
# Below this size the state stays in 32 bits: it weighs little, and the blocks of a short row say little.
SMALLEST = 4096


@functools.cache
def dynamic_map(bits: int, signed: bool) -> Tensor:
    """The 2^bits values of the map, ascending, fp32 on the CPU."""
    if bits == 4 and not signed:
        return torch.arange(1, 17, dtype=torch.float32, device="cpu") / 16
    decades = bits - 1
    values = [0.0, 1.0]
    for exponent in range(decades):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1.0, count + 1, dtype=torch.float64)
        middles = 10.0 ** (exponent - decades + 1) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    assert len(values) == 2**bits
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


@functools.cache
def _placed_map(bits: int, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The map and the borders between its values, on a device."""
    values = dynamic_map(bits, signed)
    if device.type == "meta":
        return values.to(device), values[1:].to(device)
    return values.to(device), ((values[1:] + values[:-1]) / 2).to(device)


@functools.cache
def _cells(bits: int, signed: bool) -> Tensor:
    """For each upper half of a float's bits, in order, its first code and how far its border is away.

    No cell holds two borders, so that adding the lower half carries over to the next code behind the border.
    """
    _, borders = _placed_map(bits, signed, torch.device("cpu"))
    firsts = torch.arange(-(2**15), 2**15, dtype=torch.int32, device="cpu") << 16
    table = torch.bucketize(ordered_bits(firsts).view(torch.float32), borders).int() << 16
    places = ordered_bits(borders.view(torch.int32))
    cells = (places >> 16) + 2**15
    assert (cells.diff() > 0).all()
    table[cells] += 0xFFFF - (places & 0xFFFF)
    return table


@functools.cache
def codebook(bits: int, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The map and the cells that find its codes, on a device, as `llmnorm_kernels.adamw_blockwise_` takes
    them."""
    return _placed_map(bits, signed, device)[0], _cells(bits, signed).to(device)


def nearest(x: Tensor, bits: int, signed: bool) -> Tensor:
    """The codes, uint8, of x in [-1, 1], fp32."""
    if x.device.type != "cpu":
        return torch.bucketize(x.contiguous(), _placed_map(bits, signed, x.device)[1]).to(torch.uint8)
    # A processor mispredicts half the branches of a binary search: this takes a tenth of its time.
    order = ordered_bits(x.contiguous().view(torch.int32).flatten())
    codes = _cells(bits, signed).index_select(0, (order >> 16).add_(2**15))
    return codes.add_(order.bitwise_and_(0xFFFF)).bitwise_right_shift_(16).to(torch.uint8).view(x.shape)


class Quantized(NamedTuple):
    """codes uint8 (..., columns, or half of them in 4 bits); absmax fp32 (..., blocks)."""

    codes: Tensor
    absmax: Tensor


def _pack(codes: Tensor, bits: int, columns: int) -> Tensor:
    """The codes of real columns, two to a byte in 4 bits."""
    if bits == 8:
        return codes[..., :columns].clone()
    even = codes[..., : columns + columns % 2]
    return even[..., 0::2] | even[..., 1::2] << 4


def _unpack(codes: Tensor, bits: int, block: int, columns: int) -> Tensor:
    """The codes of whole blocks (..., blocks, block), int32."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return _filled(codes, -(-columns // block) * block).unflatten(-1, (-1, block)).int()


def _filled(x: Tensor, columns: int) -> Tensor:
    """x with zeros up to `columns`, or x itself, which F.pad would copy."""
    return x if x.shape[-1] == columns else F.pad(x, (0, columns - x.shape[-1]))


def quantize(x: Tensor, bits: int, signed: bool) -> Quantized:
    """The nearest codes of x (..., columns) and the largest magnitude of each block."""
    columns = x.shape[-1]
    blocks = _filled(x.float(), columns + -columns % BLOCK[bits]).unflatten(-1, (-1, BLOCK[bits]))
    absmax = blocks.abs().amax(-1).clamp_min(SMALLEST_ABSMAX)
    codes = nearest(blocks / absmax.unsqueeze(-1), bits, signed)
    return Quantized(_pack(codes.flatten(-2), bits, columns), absmax)


def quantized_zeros(like: Tensor, bits: int) -> Quantized:
    """What `dequantize` reads as zeros of the shape of `like`: absmax 0, as some maps lack a code for 0."""
    *rows, columns = like.shape
    codes = torch.zeros(
        *rows, columns if bits == 8 else -(-columns // 2), dtype=torch.uint8, device=like.device
    )
    return Quantized(codes, torch.zeros(*rows, -(-columns // BLOCK[bits]), device=like.device))


def dequantize(packed: Quantized, bits: int, signed: bool, columns: int) -> Tensor:
    """The values (..., columns), fp32."""
    values, _ = _placed_map(bits, signed, packed.codes.device)
    codes = _unpack(packed.codes, bits, BLOCK[bits], columns)
    decoded = values.index_select(0, codes.flatten()).view(codes.shape)
    return decoded.mul_(packed.absmax.unsqueeze(-1)).flatten(-2)[..., :columns]


class Codec(NamedTuple):
    """How a running average is kept between steps: `bits` of 8 or 4, or plain in `dtype`."""

    bits: int
    dtype: torch.dtype
    signed: bool

    def read(self, state: State, key: str, like: Tensor) -> Tensor:
        """The average `key`, zeros of the shape of `like` at first; at least fp32."""
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.bits not in BLOCK:
            held = state.get(key)
            return torch.zeros_like(like, dtype=wide) if held is None else held.to(wide)
        if f"{key}_codes" not in state:
            return torch.zeros_like(like, dtype=torch.float32)
        packed = Quantized(state[f"{key}_codes"], state[f"{key}_absmax"])
        return dequantize(packed, self.bits, self.signed, like.shape[-1])

    def write(self, state: State, key: str, value: Tensor) -> None:
        """Keep `value` as the average `key`."""
        if self.bits not in BLOCK:
            state[key] = value.to(self.dtype)
        else:
            packed = quantize(value, self.bits, self.signed)
            state[f"{key}_codes"], state[f"{key}_absmax"] = packed


class Packed4(NamedTuple):
    """A matrix in asymmetric INT4: two codes to a byte, fp32 scale and uint8 zero point per block of 256."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


INT4_BLOCK = 256


def pack_int4(x: Tensor) -> Packed4:
    """q = clamp(round(x / s) + z, 0, 15), s = max(max - min, 1e-5) / 15, z = clamp(-round(min / s))."""
    columns = x.shape[-1]
    short = -columns % INT4_BLOCK
    # The last element again, so that padding widens no block.
    blocks = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], short)), -1).float()
    blocks = blocks.unflatten(-1, (-1, INT4_BLOCK))
    # The range holds 0: the zero point of a block of one sign would lie outside the codes.
    low, high = blocks.amin(-1, keepdim=True).clamp_max(0), blocks.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(1e-5) / 15
    zero = (-(low / scale).round()).clamp(0, 15)
    codes = ((blocks / scale).round() + zero).clamp(0, 15).to(torch.uint8)
    return Packed4(_pack(codes.flatten(-2), 4, columns), scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8))


def unpack_int4(packed: Packed4, columns: int) -> Tensor:
    """(q - z) s, fp32 (..., columns)."""
    codes = _unpack(packed.codes, 4, INT4_BLOCK, columns) - packed.zero.unsqueeze(-1)
    return (codes * packed.scale.unsqueeze(-1)).flatten(-2)[..., :columns]
