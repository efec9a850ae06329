"""Triton kernels of the cross entropy of given logits, and their launchers.

One program per row: an online log-sum-exp over blocks of the vocabulary. The gradient is a second kernel over
(row, block), or the same program's second pass when it may overwrite the logits with their gradient (linear
cross entropy owns them).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .dispatch import accumulator, on_device
from .layout import as_rows
from .norms_launch import TRITON_DTYPE

LARGEST_BLOCK = 4096


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap); tanh from the sigmoid, which the interpreter has."""
    return cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)


@triton.jit
def row_loss(
    base, target, V, cap, z_loss, HAS_CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(loss, log-sum-exp) of one row; a target outside the vocabulary makes the loss NaN, not a wrong
    number."""
    top = tl.full([1], float("-inf"), ACC)
    total = tl.zeros([1], ACC)
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(base + col, mask=col < V, other=float("-inf")).to(ACC)
        if HAS_CAP:
            x = tl.where(col < V, soft_cap(x, cap), float("-inf"))
        new = tl.maximum(top, tl.max(x, 0))
        # A row that is -inf so far has no finite maximum to subtract.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = new
    lse = top + tl.log(total)
    known = (target >= 0) & (target < V)
    picked = tl.load(base + tl.where(known, target, 0) + tl.arange(0, 1)).to(ACC)
    if HAS_CAP:
        picked = soft_cap(picked, cap)
    loss = tl.where(known, lse - picked + z_loss * lse * lse, float("nan"))
    return loss, lse


@triton.jit
def gradient_block(
    x, col, target, lse, up, cap, z_loss, HAS_CAP: tl.constexpr
):  # fmt: skip
    """up * d loss / d logits: up * (p (1 + 2 z lse) - onehot), through the cap's derivative 1 - tanh^2."""
    if HAS_CAP:
        x = soft_cap(x, cap)
    g = tl.exp(x - lse) * (1.0 + 2.0 * z_loss * lse) - tl.where(col == target, 1.0, 0.0)
    if HAS_CAP:
        g *= 1.0 - (x / cap) * (x / cap)
    return g * up


@triton.jit
def cross_entropy_forward(
    LOGITS, TARGET, LOSS, LSE, V, sl, ignore, cap, z_loss,
    HAS_CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGET + row)
    one = tl.arange(0, 1)
    if target == ignore:
        tl.store(LOSS + row + one, tl.zeros([1], ACC))
        tl.store(LSE + row + one, tl.zeros([1], ACC))
    else:
        loss, lse = row_loss(
            LOGITS + row * sl, target, V, tl.cast(cap, ACC), tl.cast(z_loss, ACC), HAS_CAP, ACC, BLOCK
        )
        tl.store(LOSS + row + one, loss)
        tl.store(LSE + row + one, lse)


@triton.jit
def cross_entropy_backward(
    UP, LOGITS, TARGET, LSE, DLOGITS, V, blocks, sl, sd, ignore, cap, z_loss,
    HAS_CAP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < V
    target = tl.load(TARGET + row)
    if target == ignore:
        g = tl.zeros([BLOCK], ACC)
    else:
        x = tl.load(LOGITS + row * sl + col, mask=inside, other=0.0).to(ACC)
        g = gradient_block(
            x,
            col,
            target,
            tl.load(LSE + row),
            tl.load(UP + row),
            tl.cast(cap, ACC),
            tl.cast(z_loss, ACC),
            HAS_CAP,
        )
    tl.store(DLOGITS + row * sd + col, g.to(DLOGITS.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_in_place(
    LOGITS, TARGET, WEIGHT, LOSS, V, sl, ignore, cap, z_loss,
    HAS_CAP: tl.constexpr, HAS_WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The weighted loss of each row; with GRADIENT the logits are overwritten by weight * d loss / d
    logits."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGET + row)
    base = LOGITS + row * sl
    cap = tl.cast(cap, ACC)
    z_loss = tl.cast(z_loss, ACC)
    one = tl.arange(0, 1)
    if target == ignore:
        tl.store(LOSS + row + one, tl.zeros([1], ACC))
        if GRADIENT:
            for start in range(0, V, BLOCK):
                col = start + tl.arange(0, BLOCK)
                tl.store(base + col, tl.zeros([BLOCK], ACC).to(LOGITS.dtype.element_ty), mask=col < V)
    else:
        loss, lse = row_loss(base, target, V, cap, z_loss, HAS_CAP, ACC, BLOCK)
        weight = tl.full([1], 1.0, ACC)
        if HAS_WEIGHT:
            weight = tl.load(WEIGHT + row + one).to(ACC)
        tl.store(LOSS + row + one, loss * weight)
        if GRADIENT:
            # Every thread has read the row before any overwrites it.
            tl.debug_barrier()
            for start in range(0, V, BLOCK):
                col = start + tl.arange(0, BLOCK)
                x = tl.load(base + col, mask=col < V, other=0.0).to(ACC)
                g = gradient_block(x, col, target, lse, weight, cap, z_loss, HAS_CAP)
                tl.store(base + col, g.to(LOGITS.dtype.element_ty), mask=col < V)


def _block(vocabulary: int) -> tuple[int, int]:
    block = max(256, min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary)))
    return block, max(1, min(8, block // 256))


def launch_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(loss, log-sum-exp) of every row."""
    rows, vocabulary = logits.shape
    acc = accumulator(logits.dtype)
    loss, lse = (logits.new_empty(rows, dtype=acc) for _ in range(2))
    if rows == 0:
        return loss, lse
    logits, target = as_rows(logits), target.contiguous()
    block, warps = _block(vocabulary)
    with on_device(logits):
        cross_entropy_forward[(rows,)](
            logits, target, loss, lse, vocabulary, logits.stride(0), ignore_index, softcap, z_loss,
            HAS_CAP=softcap > 0.0, ACC=TRITON_DTYPE[acc], BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss, lse


def launch_cross_entropy_backward(
    up: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, softcap: float, z_loss: float
) -> Tensor:
    rows, vocabulary = logits.shape
    dlogits = logits.new_empty(logits.shape)
    if rows == 0:
        return dlogits
    logits, target, up = as_rows(logits), target.contiguous(), up.contiguous()
    block, warps = _block(vocabulary)
    blocks = triton.cdiv(vocabulary, block)
    with on_device(logits):
        cross_entropy_backward[(rows * blocks,)](
            up, logits, target, lse, dlogits, vocabulary, blocks, logits.stride(0), dlogits.stride(0),
            ignore_index, softcap, z_loss, HAS_CAP=softcap > 0.0, ACC=TRITON_DTYPE[lse.dtype], BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
    return dlogits


def loss_and_gradient_in_place(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    gradient: bool,
) -> Tensor:
    """The weighted loss of every row of a matrix with contiguous columns, which then holds its gradient if
    asked."""
    rows, vocabulary = logits.shape
    acc = accumulator(logits.dtype)
    loss = logits.new_empty(rows, dtype=acc)
    block, warps = _block(vocabulary)
    with on_device(logits):
        cross_entropy_in_place[(rows,)](
            logits, target, weight, loss, vocabulary, logits.stride(0), ignore_index, softcap, z_loss,
            HAS_CAP=softcap > 0.0, HAS_WEIGHT=weight is not None, GRADIENT=gradient, ACC=TRITON_DTYPE[acc],
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss
