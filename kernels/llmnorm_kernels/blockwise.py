"""AdamW whose moments are block-wise quantized, decoded, moved and encoded again in one pass
(8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861).

    a = max |x| of a block,   code = index of the nearest entry of a sorted map to x / a,   x' = map[code] a

The caller owns the map and hands it over twice: `map`, the values by code, and `cells`, which finds a code
from the bits of a number. For each upper half of a float32's bits, in the order of the floats, `cells` holds
(first code << 16) + 0xFFFF - (lower half of the border in this cell), or first code << 16 where none is, so
that adding the lower half carries over to the next code just behind the border.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_betas, check_given
from .dispatch import operator, register, runs_triton
from .optimizer_steps import check_matrix, check_step, key_tensor, round_stochastically

CELLS = 1 << 16
SMALLEST_ABSMAX = 1e-12  # of a block of zeros, by which it is divided too
CODE_BITS = {256: 8, 16: 4}  # by the length of the map
BLOCKS = (32, 64, 128, 256, 512, 1024)


def ordered_bits(bits: Tensor) -> Tensor:
    """int32 numbers in the order of the floats whose bits these are, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def decode_blocks(codes: Tensor, absmax: Tensor, map: Tensor, block: int, columns: int) -> Tensor:
    """map[code] a, float32 (rows, columns); 4-bit codes are two to a byte, the even column's below."""
    if CODE_BITS[len(map)] == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    scale = absmax.repeat_interleave(block, 1)[:, :columns]
    return map[codes[:, :columns].int()] * scale


def encode_blocks_(codes: Tensor, absmax: Tensor, x: Tensor, map: Tensor, cells: Tensor, block: int) -> None:
    """The inverse of `decode_blocks` into codes and absmax, to the nearest code; a NaN spreads over its
    block."""
    blocks = F.pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    absmax.copy_(blocks.abs().amax(-1).clamp_min(SMALLEST_ABSMAX))
    order = ordered_bits((blocks / absmax.unsqueeze(-1)).view(torch.int32))
    found = (cells[(order >> 16) + CELLS // 2] + (order & 0xFFFF)) >> 16
    found = found.flatten(1).to(torch.uint8)
    if CODE_BITS[len(map)] == 4:
        found = found[:, 0::2] | found[:, 1::2] << 4
    codes.copy_(found[:, : codes.shape[1]])


def blockwise_reference(
    param: Tensor, grad: Tensor, m_codes: Tensor, m_absmax: Tensor, v_codes: Tensor, v_absmax: Tensor,
    m_map: Tensor, m_cells: Tensor, v_map: Tensor, v_cells: Tensor, key: Tensor | None, block: int,
    lr: float, beta1: float, beta2: float, eps: float, decay: float, bc1: float, bc2_root: float,
) -> None:  # fmt: skip
    g, columns = grad.float(), param.shape[1]
    m = beta1 * decode_blocks(m_codes, m_absmax, m_map, block, columns) + (1.0 - beta1) * g
    v = beta2 * decode_blocks(v_codes, v_absmax, v_map, block, columns) + (1.0 - beta2) * g * g
    p = param.float() * decay - lr * ((m / bc1) / (v.sqrt() / bc2_root + eps))
    encode_blocks_(m_codes, m_absmax, m, m_map, m_cells, block)
    encode_blocks_(v_codes, v_absmax, v, v_map, v_cells, block)
    param.copy_(p if key is None else round_stochastically(p, key))


register(
    "adamw_blockwise_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg_codes, Tensor(c!) exp_avg_absmax, "
    "Tensor(d!) exp_avg_sq_codes, Tensor(e!) exp_avg_sq_absmax, Tensor exp_avg_map, Tensor exp_avg_cells, "
    "Tensor exp_avg_sq_map, Tensor exp_avg_sq_cells, Tensor? key, int block, float lr, float beta1, "
    "float beta2, float eps, float decay, float bias_correction1, float bias_correction2_root) -> ()",
    "blockwise_kernels:launch_adamw_blockwise",
    lambda *args: None,
)


def _check_moment(
    name: str, param: Tensor, bits: int, block: int, codes: Tensor, absmax: Tensor, map: Tensor, cells: Tensor
) -> None:
    rows, columns = param.shape
    expected = {
        "codes": (codes, torch.uint8, (rows, columns if bits == 8 else -(-columns // 2))),
        "absmax": (absmax, torch.float32, (rows, -(-columns // block))),
        "map": (map, torch.float32, (2**bits,)),
        "cells": (cells, torch.int32, (CELLS,)),
    }
    for part, (tensor, dtype, shape) in expected.items():
        right = tensor.dtype == dtype and tensor.shape == shape and tensor.device == param.device
        if not (right and tensor.is_contiguous()):
            raise ValueError(
                f"{name}_{part} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on "
                f"{tensor.device}; beside a param of shape {rows, columns} and {bits} bits it must be "
                f"contiguous, {dtype} of shape {shape}, on {param.device}"
            )


@operator
@torch.no_grad()
def adamw_blockwise_(
    param: Tensor, grad: Tensor, exp_avg_codes: Tensor, exp_avg_absmax: Tensor, exp_avg_sq_codes: Tensor,
    exp_avg_sq_absmax: Tensor, exp_avg_map: Tensor, exp_avg_cells: Tensor, exp_avg_sq_map: Tensor,
    exp_avg_sq_cells: Tensor, *, block: int, step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, weight_decay: float = 0.0, seed: int | None = None,
) -> None:  # fmt: skip
    """One step of AdamW (arXiv 1711.05101) in place, in float32, between moments in 8 or 4 bits.

    M = map[code] a;  M = b1 M + (1 - b1) g, likewise V;  p = (1 - lr wd) p - lr (M / (1 - b1^t)) / (sqrt(V /
    (1 - b2^t)) + eps);  a = max |M| of each block, code = that of the nearest map[code] to M / a

    param, grad: (m, n), contiguous, float32 or 16-bit; step t counts from 1. Codes: uint8 (m, n), or (m,
    ceil(n / 2)) in 4 bits; absmax: float32 (m, ceil(n / block)): blocks run along rows, the last of a row may
    be short, and absmax 0 decodes to zeros whatever the codes. map: float32, 256 or 16 values, ascending, the
    same number for both moments; cells: int32 (65536,), as the module says. seed: round a bfloat16 param
    stochastically, as `adamw_`. The kernel's codes are those of the reference bit for bit, but where a
    compiler contracts b M + (1 - b) g and a moment falls on the other side of a border. Bytes moved per
    element: read and write p and two codes, read g: 10 with bfloat16 and 8 bits, 8 in 4. Raises ValueError
    for shapes, dtypes, layouts and values out of range.
    """
    check_given(
        exp_avg_codes=exp_avg_codes, exp_avg_absmax=exp_avg_absmax, exp_avg_sq_codes=exp_avg_sq_codes,
        exp_avg_sq_absmax=exp_avg_sq_absmax, exp_avg_map=exp_avg_map, exp_avg_cells=exp_avg_cells,
        exp_avg_sq_map=exp_avg_sq_map, exp_avg_sq_cells=exp_avg_sq_cells,
    )  # fmt: skip
    check_step(param, grad, lr, weight_decay, eps, seed)
    check_matrix(param)
    if step < 1:
        raise ValueError(f"step={step} must count from 1")
    check_betas(betas)
    if block not in BLOCKS:
        raise ValueError(f"block={block} must be one of {', '.join(map(str, BLOCKS))}")
    bits = CODE_BITS.get(exp_avg_map.numel())
    if bits is None:
        raise ValueError(f"exp_avg_map has {exp_avg_map.numel()} values; 8 bits have 256, 4 bits 16")
    first = exp_avg_codes, exp_avg_absmax, exp_avg_map, exp_avg_cells
    second = exp_avg_sq_codes, exp_avg_sq_absmax, exp_avg_sq_map, exp_avg_sq_cells
    _check_moment("exp_avg", param, bits, block, *first)
    _check_moment("exp_avg_sq", param, bits, block, *second)
    given = (
        param, grad, *first[:2], *second[:2], *first[2:], *second[2:], key_tensor(param, seed, step), block,
        float(lr), float(betas[0]), float(betas[1]), float(eps), 1.0 - lr * weight_decay,
        1.0 - betas[0] ** step, math.sqrt(1.0 - betas[1] ** step),
    )  # fmt: skip
    if runs_triton(param):
        torch.ops.llmnorm_kernels.adamw_blockwise_(*given)
    else:
        blockwise_reference(*given)
