"""Triton kernel of AdamW between block-wise quantized moments, and its launcher."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .blockwise import CODE_BITS
from .dispatch import on_device
from .optimizer_kernels import adam_direction, adam_moments, round_stochastically

TILE = 2048


@triton.jit
def decode_codes(CODES, at, inside, MAP, scale, PACKED: tl.constexpr):
    """map[code] a; what lies behind the end of a row decodes to anything."""
    code = tl.load(CODES + at, mask=inside, other=0).to(tl.int32)
    if PACKED:
        code = tl.interleave(code & 15, code >> 4)
    return tl.load(MAP + code) * scale[:, None]


@triton.jit
def encode_codes(
    x, CODES, at, inside, ABSMAX, block, whole, CELLS, PACKED: tl.constexpr, NB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """absmax and the codes of the nearest values, exactly.

    One gather finds a code, where a binary search would be eight that wait for each other. The cells of
    magnitudes from 1e-3 to 1, 10 KB for both signs, fit in L1.
    """
    # As integers, magnitudes keep their order and a NaN is the largest.
    top = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    top = tl.where(top < 1e-12, 1e-12, top)
    tl.store(ABSMAX + block, top, mask=whole)
    order = tl.div_rn(x, tl.broadcast_to(top[:, None], [NB, BLOCK])).to(tl.int32, bitcast=True)
    order = order ^ ((order >> 31) & 0x7FFFFFFF)
    code = (tl.load(CELLS + ((order >> 16) + 32768)) + (order & 0xFFFF)) >> 16
    if PACKED:
        low, high = tl.split(tl.reshape(code, [NB, BLOCK // 2, 2]))
        code = low | (high << 4)
    tl.store(CODES + at, code.to(tl.uint8), mask=inside)


@triton.jit
def adamw_blockwise(
    P, G, M, M_ABSMAX, V, V_ABSMAX, M_MAP, M_CELLS, V_MAP, V_CELLS, KEY, N, WIDTH, BLOCKS, COUNT, lr, b1, c1,
    b2, c2, eps, decay, bc1, bc2_root, PACKED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
    NB: tl.constexpr,
):  # fmt: skip
    """NB of COUNT blocks, BLOCKS to a row of N numbers and of WIDTH bytes of codes."""
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    whole = block < COUNT
    row = (block // BLOCKS).to(tl.int64)[:, None]
    start = (block % BLOCKS)[:, None] * BLOCK
    column = start + tl.arange(0, BLOCK)[None, :]
    inside = whole[:, None] & (column < N)
    at = row * N + column
    code_at = at
    code_inside = inside
    if PACKED:
        byte = start // 2 + tl.arange(0, BLOCK // 2)[None, :]
        code_at = row * WIDTH + byte
        code_inside = whole[:, None] & (byte < WIDTH)
    p = tl.load(P + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    m_scale = tl.load(M_ABSMAX + block, mask=whole, other=0.0)
    v_scale = tl.load(V_ABSMAX + block, mask=whole, other=0.0)
    m = decode_codes(M, code_at, code_inside, M_MAP, m_scale, PACKED)
    v = decode_codes(V, code_at, code_inside, V_MAP, v_scale, PACKED)
    m, v = adam_moments(g, m, v, b1, c1, b2, c2)
    p *= tl.cast(decay, tl.float32)
    p -= tl.cast(lr, tl.float32) * adam_direction(m, v, eps, bc1, bc2_root)
    m = tl.where(inside, m, 0.0)
    v = tl.where(inside, v, 0.0)
    encode_codes(m, M, code_at, code_inside, M_ABSMAX, block, whole, M_CELLS, PACKED, NB, BLOCK)
    encode_codes(v, V, code_at, code_inside, V_ABSMAX, block, whole, V_CELLS, PACKED, NB, BLOCK)
    if STOCHASTIC:
        tl.store(P + at, round_stochastically(p, at, KEY), mask=inside)
    else:
        tl.store(P + at, p.to(P.dtype.element_ty), mask=inside)


def launch_adamw_blockwise(
    param: Tensor, grad: Tensor, exp_avg_codes: Tensor, exp_avg_absmax: Tensor, exp_avg_sq_codes: Tensor,
    exp_avg_sq_absmax: Tensor, exp_avg_map: Tensor, exp_avg_cells: Tensor, exp_avg_sq_map: Tensor,
    exp_avg_sq_cells: Tensor, key: Tensor | None, block: int, lr: float, beta1: float, beta2: float,
    eps: float, decay: float, bias_correction1: float, bias_correction2_root: float,
) -> None:  # fmt: skip
    count, many = exp_avg_absmax.numel(), TILE // block
    with on_device(param):
        adamw_blockwise[(triton.cdiv(count, many),)](
            param, grad, exp_avg_codes, exp_avg_absmax, exp_avg_sq_codes, exp_avg_sq_absmax, exp_avg_map,
            exp_avg_cells, exp_avg_sq_map, exp_avg_sq_cells, key, param.shape[1], exp_avg_codes.shape[1],
            exp_avg_absmax.shape[1], count, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, decay,
            bias_correction1, bias_correction2_root, PACKED=CODE_BITS[len(exp_avg_map)] == 4,
            STOCHASTIC=key is not None, BLOCK=block, NB=many, num_warps=8,
        )  # fmt: skip
