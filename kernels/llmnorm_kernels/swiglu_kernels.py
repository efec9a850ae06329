"""Triton kernels of the gated activations and their launchers: one read of each operand, one write of each
result."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import accumulator, on_device
from .layout import as_rows
from .norms_launch import TRITON_DTYPE

ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1, "relu": 2, "sigmoid": 3}
# Eight elements a thread: one 128-bit load of 16-bit data.
LARGEST_BLOCK = 2048


@triton.jit
def activation(g, CODE: tl.constexpr):
    """(act(g), act'(g))."""
    if CODE == 0:
        sigma = tl.sigmoid(g)
        return g * sigma, sigma * (1.0 + g * (1.0 - sigma))
    elif CODE == 1:
        # tanh(z) = 2 sigmoid(2 z) - 1; the constants are sqrt(2/pi) and the cubic term of the tanh
        # approximation.
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * g * g)
        return 0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * slope
    elif CODE == 2:
        positive = g > 0.0
        return tl.where(positive, g, 0.0), tl.where(positive, 1.0, 0.0)
    else:
        sigma = tl.sigmoid(g)
        return sigma, sigma * (1.0 - sigma)


@triton.jit
def gated_forward(
    GATE, UP, OUT, N, blocks, sg, su, so, CODE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    col = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = col < N
    g = tl.load(GATE + row * sg + col, mask=inside, other=0.0).to(ACC)
    u = tl.load(UP + row * su + col, mask=inside, other=0.0).to(ACC)
    a, _ = activation(g, CODE)
    tl.store(OUT + row * so + col, (a * u).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(
    DOUT, GATE, UP, DGATE, DUP, N, blocks, sd, sg, su, sdg, sdu,
    CODE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    col = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = col < N
    d = tl.load(DOUT + row * sd + col, mask=inside, other=0.0).to(ACC)
    g = tl.load(GATE + row * sg + col, mask=inside, other=0.0).to(ACC)
    u = tl.load(UP + row * su + col, mask=inside, other=0.0).to(ACC)
    a, slope = activation(g, CODE)
    tl.store(DUP + row * sdu + col, (d * a).to(DUP.dtype.element_ty), mask=inside)
    tl.store(DGATE + row * sdg + col, (d * u * slope).to(DGATE.dtype.element_ty), mask=inside)


def _geometry(*matrices: Tensor) -> tuple[list[Tensor], int, int, int, int]:
    """The matrices (as one long row where all are contiguous), rows, columns, block and warps."""
    if all(m.is_contiguous() for m in matrices):
        views = [m.view(1, -1) for m in matrices]
    else:
        views = [as_rows(m) for m in matrices]
    rows, columns = views[0].shape
    block = max(256, min(LARGEST_BLOCK, triton.next_power_of_2(columns)))
    return views, rows, columns, block, max(1, block // 256)


def launch_gated_forward(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    half = gate.shape[-1] // 2
    first, second = (gate, up) if up is not None else (gate[..., :half], gate[..., half:])
    out = first.new_empty(first.shape)
    if out.numel() == 0:
        return out
    (g, u, o), rows, columns, block, warps = _geometry(first, second, out)
    blocks = triton.cdiv(columns, block)
    acc = TRITON_DTYPE[accumulator(gate.dtype)]
    with on_device(gate):
        gated_forward[(rows * blocks,)](
            g, u, o, columns, blocks, g.stride(0), u.stride(0), o.stride(0),
            CODE=ACTIVATION_CODES[activation], ACC=acc, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


def launch_gated_backward(
    dout: Tensor, gate: Tensor, up: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(d gate, d up), or for packed operands (d packed, empty)."""
    half = gate.shape[-1] // 2
    dgate = gate.new_empty(gate.shape)
    dup = gate.new_empty(0) if up is None else up.new_empty(up.shape)
    if gate.numel() == 0:
        return dgate, dup
    if up is None:
        operands = (dout, gate[..., :half], gate[..., half:], dgate[..., :half], dgate[..., half:])
    else:
        operands = (dout, gate, up, dgate, dup)
    (d, g, u, dg, du), rows, columns, block, warps = _geometry(*operands)
    blocks = triton.cdiv(columns, block)
    acc = TRITON_DTYPE[accumulator(gate.dtype)]
    with on_device(gate):
        gated_backward[(rows * blocks,)](
            d, g, u, dg, du, columns, blocks, d.stride(0), g.stride(0), u.stride(0), dg.stride(0),
            du.stride(0), CODE=ACTIVATION_CODES[activation], ACC=acc, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dgate, dup
