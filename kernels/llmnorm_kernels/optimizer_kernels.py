"""Triton kernels of optimizer steps and their launchers: AdamW in one pass, and updates scaled by rows and
columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import multiprocessors, on_device
from .norms_kernels import column_sum

STATE_BLOCK = 256
BLOCKS_PER_PROGRAM = 8
CHUNK = 2048


@triton.jit
def mix_bits(x):
    """A bijection of 32-bit words whose every output bit depends on every input bit (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = tl.mul(x, tl.full(x.shape, 0x7FEB352D, tl.uint32), sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(x, tl.full(x.shape, 0x846CA68B, tl.uint32), sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def round_stochastically(x, index, KEY):
    """float32 to bfloat16, up with the probability of the discarded fraction; the noise is a hash of (key,
    index)."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    key = tl.load(KEY).to(tl.uint32)
    noise = mix_bits(mix_bits(low ^ key) ^ high ^ tl.load(KEY + 1).to(tl.uint32)) & 0xFFFF
    bits = x.to(tl.uint32, bitcast=True)
    # Noise added to an infinity would make it NaN.
    finite = (bits & 0x7F800000) != 0x7F800000
    moved = tl.add(bits, noise, sanitize_overflow=False)
    bits = tl.where(finite, moved, bits) >> 16
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def adam_moments(g, m, v, b1, c1, b2, c2):
    """b1 m + c1 g and b2 v + c2 g^2; c = 1 - b comes from the host, as 1 - float32(0.999) is off by 1.3e-5 of
    itself."""
    m = tl.cast(b1, tl.float32) * m + tl.cast(c1, tl.float32) * g
    v = tl.cast(b2, tl.float32) * v + tl.cast(c2, tl.float32) * g * g
    return m, v


@triton.jit
def adam_direction(m, v, eps, bc1, bc2_root):
    """(m / bc1) / (sqrt(v) / bc2_root + eps)."""
    return (m / tl.cast(bc1, tl.float32)) / (
        tl.sqrt(v) / tl.cast(bc2_root, tl.float32) + tl.cast(eps, tl.float32)
    )


@triton.jit
def adamw(
    P, G, M, V, MS, VS, KEY, GRAD_SCALE, N, lr, b1, c1, b2, c2, eps, decay, bc1, bc2_root,
    QUANTIZED: tl.constexpr, STOCHASTIC: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
    NB: tl.constexpr,
):  # fmt: skip
    """NB blocks of BLOCK numbers: moments (8-bit ones with a scale per block), decoupled decay, update,
    rounding."""
    block = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < N
    p = tl.load(P + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(GRAD_SCALE)
    m = tl.load(M + at, mask=inside, other=0).to(tl.float32)
    v = tl.load(V + at, mask=inside, other=0).to(tl.float32)
    whole = block * BLOCK < N
    if QUANTIZED:
        # Square-law codes for m, fourth-power codes for v: small numbers keep relative precision.
        m = m / 127.0
        v = v / 255.0
        m = tl.where(m < 0.0, -m * m, m * m) * tl.load(MS + block, mask=whole, other=0.0)[:, None]
        v = v * v * v * v * tl.load(VS + block, mask=whole, other=0.0)[:, None]
    m, v = adam_moments(g, m, v, b1, c1, b2, c2)
    p *= tl.cast(decay, tl.float32)
    p -= tl.cast(lr, tl.float32) * adam_direction(m, v, eps, bc1, bc2_root)
    if QUANTIZED:
        m_top = tl.max(tl.abs(m), 1)
        v_top = tl.max(v, 1)
        tl.store(MS + block, m_top, mask=whole)
        tl.store(VS + block, v_top, mask=whole)
        m_code = tl.floor(tl.sqrt(tl.abs(m) / tl.maximum(m_top, 1e-38)[:, None]) * 127.0 + 0.5)
        v_code = tl.floor(tl.sqrt(tl.sqrt(v / tl.maximum(v_top, 1e-38)[:, None])) * 255.0 + 0.5)
        # A second moment that is not zero never becomes zero: the next step would divide by eps alone.
        v_code = tl.where(v > 0.0, tl.maximum(v_code, 1.0), v_code)
        tl.store(M + at, tl.where(m < 0.0, -m_code, m_code).to(tl.int8), mask=inside)
        tl.store(V + at, v_code.to(tl.uint8), mask=inside)
    else:
        tl.store(M + at, m.to(M.dtype.element_ty), mask=inside)
        tl.store(V + at, v.to(V.dtype.element_ty), mask=inside)
    if STOCHASTIC:
        tl.store(P + at, round_stochastically(p, at, KEY), mask=inside)
    else:
        tl.store(P + at, p.to(P.dtype.element_ty), mask=inside)


@triton.jit
def scaled_squares(
    G, R, C, PARTIAL, M, N, sg, target, eps,
    ROWS: tl.constexpr, HAS_C: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One half-turn of the balancing: the row factors r (ROWS), then each program's column sums of (r g)^2
    (COLUMNS)."""
    program = tl.program_id(0)
    for tile in range(program, M, tl.num_programs(0)):
        row = tl.cast(tile, tl.int64)
        r = tl.load(R + row)
        if ROWS:
            squares = tl.zeros([CHUNK], tl.float32)
            for start in range(0, N, CHUNK):
                col = start + tl.arange(0, CHUNK)
                g = tl.load(G + row * sg + col, mask=col < N, other=0.0).to(tl.float32)
                if HAS_C:
                    g *= tl.load(C + col, mask=col < N, other=0.0)
                squares += g * g
            r = (
                r
                * tl.cast(target, tl.float32)
                / tl.maximum(r * tl.sqrt(tl.sum(squares, 0)), tl.cast(eps, tl.float32))
            )
            tl.store(R + row, r)
        if COLUMNS:
            for start in range(0, N, CHUNK):
                col = start + tl.arange(0, CHUNK)
                g = r * tl.load(G + row * sg + col, mask=col < N, other=0.0).to(tl.float32)
                at = PARTIAL + program.to(tl.int64) * N + col
                tl.store(at, tl.load(at, mask=col < N, other=0.0) + g * g, mask=col < N)


@triton.jit
def scaled_update(
    P, G, R, C, KEY, N, blocks, sp, sg, lr, decay,
    HAS_R: tl.constexpr, HAS_C: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p = decay * p - lr * r_i g_ij c_j."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < N
    p = tl.load(P + row * sp + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + row * sg + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_R:
        g *= tl.load(R + row)
    if HAS_C:
        g *= tl.load(C + col, mask=inside, other=0.0)
    p = p * tl.cast(decay, tl.float32) - tl.cast(lr, tl.float32) * g
    if STOCHASTIC:
        tl.store(P + row * sp + col, round_stochastically(p, row * N + col, KEY), mask=inside)
    else:
        tl.store(P + row * sp + col, p.to(P.dtype.element_ty), mask=inside)


def launch_adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None, key: Tensor | None, grad_scale: Tensor | None, lr: float, beta1: float,
    beta2: float, eps: float, decay: float, bias_correction1: float, bias_correction2_root: float,
) -> None:  # fmt: skip
    if param.numel() == 0:
        return
    programs = triton.cdiv(param.numel(), STATE_BLOCK * BLOCKS_PER_PROGRAM)
    with on_device(param):
        adamw[(programs,)](
            param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, key, grad_scale, param.numel(),
            lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, decay, bias_correction1, bias_correction2_root,
            QUANTIZED=exp_avg_scale is not None, STOCHASTIC=key is not None, HAS_SCALE=grad_scale is not None,
            BLOCK=STATE_BLOCK, NB=BLOCKS_PER_PROGRAM, num_warps=8,
        )  # fmt: skip


def launch_scaled_squares(
    update: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    target: float,
    eps: float,
    of_rows: bool,
    of_columns: bool,
) -> Tensor:
    """Renews the row factors in place if asked; returns the column sums of squares of rows * update, or an
    empty tensor."""
    count, width = update.shape
    programs = min(count, multiprocessors(update) * 4)
    partial = update.new_zeros(programs, width, dtype=torch.float32) if of_columns else None
    total = update.new_empty(width if of_columns else 0, dtype=torch.float32)
    with on_device(update):
        scaled_squares[(programs,)](
            update, rows, columns, partial, count, width, update.stride(0), target, eps,
            ROWS=of_rows, HAS_C=columns is not None, COLUMNS=of_columns, CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
        if partial is not None:
            column_sum[(triton.cdiv(width, 128),)](
                partial, total, programs, width, BP=32, BC=128, ACC=tl.float32, num_warps=4
            )
    return total


def launch_scaled_update(
    param: Tensor,
    update: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    key: Tensor | None,
    lr: float,
    decay: float,
) -> None:
    count, width = param.shape
    blocks = triton.cdiv(width, CHUNK)
    with on_device(param):
        scaled_update[(count * blocks,)](
            param, update, rows, columns, key, width, blocks, param.stride(0), update.stride(0), lr, decay,
            HAS_R=rows is not None, HAS_C=columns is not None, STOCHASTIC=key is not None, BLOCK=CHUNK,
            num_warps=8,
        )  # fmt: skip
