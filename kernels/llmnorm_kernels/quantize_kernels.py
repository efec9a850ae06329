"""Triton kernel of 4-bit fake quantization: one read, one write, a group per row of the tile."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import on_device
from .layout import as_rows
from .optimizer_kernels import mix_bits

FORMAT_CODES = {"int4": 0, "int4_asymmetric": 1, "fp4": 2, "nvfp4": 3, "mxfp4": 4, "uniform9": 5}
TILE = 2048


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, without libdevice (which the interpreter lacks)."""
    low = tl.floor(x)
    rest = x - low
    odd = (low - 2.0 * tl.floor(low * 0.5)) > 0.5
    return low + tl.where((rest > 0.5) | ((rest == 0.5) & odd), 1.0, 0.0)


@triton.jit
def rounded(x, noise, STOCHASTIC: tl.constexpr):
    """To an integer: the nearest, or at random with the noise in [0, 1)."""
    if STOCHASTIC:
        return tl.floor(x + noise)
    else:
        return round_even(x)


@triton.jit
def round_e2m1(a, noise, STOCHASTIC: tl.constexpr):
    """a >= 0 to the grid 0, .5, 1, 1.5, 2, 3, 4, 6, ties to the even code, saturating."""
    step = tl.where(a < 2.0, 0.5, tl.where(a < 4.0, 1.0, 2.0))
    return tl.minimum(rounded(a / step, noise, STOCHASTIC) * step, 6.0)


@triton.jit
def uniform_noise(index, KEY):
    """In [0, 1), a hash of (key, index)."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    word = mix_bits(mix_bits(low ^ tl.load(KEY).to(tl.uint32)) ^ high ^ tl.load(KEY + 1).to(tl.uint32))
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def round_e4m3(a):
    """a >= 0 to float8 e4m3: three mantissa bits, smallest step 2^-9, saturating at 448."""
    a = tl.minimum(a, 448.0)
    exponent = tl.maximum((a.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 127, -6)
    step = ((exponent - 3 + 127) << 23).to(tl.float32, bitcast=True)
    return tl.minimum(round_even(a / step) * step, 448.0)


@triton.jit
def quantize_groups(
    X, Y, TOP, KEY, rows, N, groups, sx, sy, GROUP: tl.constexpr, CODE: tl.constexpr,
    OUTLIERS: tl.constexpr, STOCHASTIC: tl.constexpr, NB: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Each of the NB groups of a program: its scale from its largest magnitude, its numbers to the grid and
    back."""
    group = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)
    row = group // groups
    inner = tl.arange(0, BG)
    col = (group % groups)[:, None] * GROUP + inner[None, :]
    inside = (row < rows)[:, None] & (inner < GROUP)[None, :] & (col < N)
    x = tl.load(X + row[:, None] * sx + col, mask=inside, other=0.0).to(tl.float32)
    kept = tl.zeros([NB, BG], tl.float32)
    body = x
    for _ in tl.static_range(OUTLIERS):
        largest = tl.argmax(tl.abs(body), 1)
        here = inner[None, :] == largest[:, None]
        kept = tl.where(here, kept + body, kept)
        body = tl.where(here, 0.0, body)
    noise = body
    if STOCHASTIC:
        noise = uniform_noise(row[:, None] * N + col, KEY)
    a = tl.abs(body)
    top = tl.max(a, 1)[:, None]
    sign = tl.where(body < 0.0, -1.0, 1.0)
    if CODE == 0:
        scale = tl.div_rn(top, tl.full([NB, 1], 7.0, tl.float32))
        safe = tl.where(scale > 0.0, scale, 1.0)
        level = rounded(tl.div_rn(a, tl.broadcast_to(safe, [NB, BG])), noise, STOCHASTIC)
        y = tl.minimum(level, 7.0) * scale * sign
    elif CODE == 1:
        low = tl.min(tl.where(inside, body, float("inf")), 1)[:, None]
        high = tl.max(tl.where(inside, body, float("-inf")), 1)[:, None]
        scale = tl.div_rn(tl.maximum(high - low, 1e-5), tl.full([NB, 1], 15.0, tl.float32))
        zero = tl.minimum(tl.maximum(-round_even(tl.div_rn(low, scale)), 0.0), 15.0)
        level = rounded(tl.div_rn(body, tl.broadcast_to(scale, [NB, BG])), noise, STOCHASTIC) + zero
        y = (tl.minimum(tl.maximum(level, 0.0), 15.0) - zero) * scale
    elif CODE == 5:
        top = tl.maximum(top, 1e-6)
        level = rounded(tl.div_rn(4.0 * a, tl.broadcast_to(top, [NB, BG])), noise, STOCHASTIC)
        y = tl.minimum(level, 4.0) * (top * 0.25) * sign
    else:
        if CODE == 2:
            scale = tl.div_rn(top, tl.full([NB, 1], 6.0, tl.float32))
        elif CODE == 3:
            # The tensor's largest number maps to 448 * 6, the largest product of scale and element.
            largest = tl.load(TOP + tl.arange(0, 1))[:, None]
            stretch = tl.div_rn(tl.full([1, 1], 2688.0, tl.float32), tl.where(largest > 0.0, largest, 1.0))
            sixth = tl.div_rn(top, tl.full([NB, 1], 6.0, tl.float32))
            scale = tl.div_rn(round_e4m3(sixth * stretch), tl.broadcast_to(stretch, [NB, 1]))
        else:
            # e8m0: the power of two of the largest element, less the two exponent steps of 4 in e2m1.
            exponent = (top.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) - 2
            scale = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
        safe = tl.where(scale > 0.0, scale, 1.0)
        y = round_e2m1(tl.div_rn(a, tl.broadcast_to(safe, [NB, BG])), noise, STOCHASTIC) * scale * sign
    y = tl.where(kept != 0.0, kept, y)
    tl.store(Y + row[:, None] * sy + col, y.to(Y.dtype.element_ty), mask=inside)


def launch_quantize(
    x: Tensor, format: str, group_size: int, outliers: int, key: Tensor | None = None
) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    top = x.abs().amax().float().reshape(1) if format == "nvfp4" else None
    x2, y2 = as_rows(x), as_rows(y)
    rows, width = x2.shape
    groups = triton.cdiv(width, group_size)
    block = max(16, triton.next_power_of_2(group_size))
    many = max(1, TILE // block)
    with on_device(x):
        quantize_groups[(triton.cdiv(rows * groups, many),)](
            x2, y2, top, key, rows, width, groups, x2.stride(0), y2.stride(0), GROUP=group_size,
            CODE=FORMAT_CODES[format], OUTLIERS=outliers, STOCHASTIC=key is not None, NB=many, BG=block,
            num_warps=8 if many * block >= 2048 else 4,
        )  # fmt: skip
    return y
