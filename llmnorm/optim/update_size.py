"""How large an update is, and the one language of learning rates that follows from it.

RMS(dW) per unit of learning rate, for an m x n matrix (m outputs, n inputs), is what `lr_mode` fixes:

    paper       the method's own factor
    adam_rms    0.2             what AdamW makes in mid-training, so its lr and weight decay carry over
    keller      1 / sqrt(n)     Muon's first scale, sqrt(max(1, m/n)) / sqrt(max(m, n))
    rms_to_rms  sqrt(m/n) / sqrt(max(m, n))    spectral norm sqrt(m/n): transfers across widths

A mode other than `paper` needs a method whose update has a known RMS; AdamW on other roles is left alone. An
embedding reads one row per token, a fan-in of 1, and gets 1 where the target depends on the shape.
Methods that divide by a running average have no size of their own, but a usual one: an average of noise with
decay b has the RMS sqrt((1 - b) / (1 + b)) of the noise, 0.23 at b = 0.9 and 0.16 at 0.95, "0.2" for short.
A learning rate converts as lr' = lr target / target': 0.02 in `keller` at n = 768 is 3.6e-3 in `adam_rms`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.optim.roles import Role

Hyper = Mapping[str, Any]
ShapeFunction = Callable[[int, int, Hyper], float]
# Rows per block for every matrix whose name has this part, or the heights of its blocks from the top.
RowBlocks = Mapping[str, int | Sequence[int]]
LrMode = Literal["paper", "adam_rms", "keller", "rms_to_rms"]

ADAM_RMS = 0.2
# mode -> RMS of the update per unit of learning rate, of a matrix with m outputs and n inputs
TARGETS: dict[str, Callable[[int, int], float]] = {
    "adam_rms": lambda m, n: ADAM_RMS,
    "keller": lambda m, n: 1 / math.sqrt(n),
    "rms_to_rms": lambda m, n: math.sqrt(m / n) / math.sqrt(max(m, n)),
}
LR_MODES = ("paper", *TARGETS)


def one(m: int, n: int, hyper: Hyper) -> float:
    """No factor, or an update of RMS 1."""
    return 1.0


@dataclass(frozen=True)
class Size:
    """The size of a rule's update: `paper` is its own factor c(m, n); `to_unit` is 1 / RMS of the bare
    update, None where that depends on the data; `usual` is what the RMS is then, per unit of learning rate,
    once gradients are mostly noise, None where nothing is known."""

    paper: ShapeFunction = one
    to_unit: ShapeFunction | None = None
    usual: ShapeFunction | None = None


PLAIN = Size()
ADAM_LIKE = Size(usual=lambda m, n, hyper: ADAM_RMS)


def blocks_of(name: str, shape: Sequence[int], row_blocks: RowBlocks | None) -> tuple[int, ...] | None:
    """Heights of the row blocks of the parameter `name`, or None where it stays whole.

    A key of `row_blocks` is one part of a dotted name (`q_proj`). Raises `UserError` where the heights do not
    add up to the rows.
    """
    parts = set(name.split("."))
    for key, blocks in (row_blocks or {}).items():
        if key not in parts:
            continue
        rows = shape[-2]
        if isinstance(blocks, int):
            heights = (blocks,) * (rows // blocks) if blocks > 0 else ()
        else:
            heights = tuple(blocks)
        if sum(heights) != rows:
            raise UserError(
                f"optimizer.row_blocks.{key}={blocks} does not add up to the {rows} rows of {name}; give "
                "the head dimension, or the heights of all blocks"
            )
        return heights
    return None


def _factor(size: Size, m: int, n: int, hyper: Hyper) -> float:
    mode = hyper.get("lr_mode", "paper")
    if mode == "paper" or size.to_unit is None:
        return size.paper(m, n, hyper)
    if hyper["role"] == Role.EMBEDDING and mode != "adam_rms":
        return size.to_unit(m, n, hyper)
    return TARGETS[mode](m, n) * size.to_unit(m, n, hyper)


def shape_factor(size: Size, shape: Sequence[int], hyper: Hyper) -> float | Tensor:
    """c(m, n) in the mode of the group; a column of factors where row blocks differ in height."""
    if len(shape) < 2:
        return 1.0
    m, n = shape[-2:]
    blocks = hyper.get("blocks")
    if not blocks:
        return _factor(size, m, n, hyper)
    if len(set(blocks)) == 1:
        return _factor(size, blocks[0], n, hyper)
    return torch.cat([torch.full((height, 1), _factor(size, height, n, hyper)) for height in blocks])


def update_rms(size: Size, shape: Sequence[int], hyper: Hyper) -> float | None:
    """RMS of dW per unit of learning rate, None where it depends on the data (about 0.2 for Adam)."""
    if size.to_unit is None:
        return None
    if len(shape) < 2:
        return 1 / size.to_unit(1, shape[-1], hyper)
    m, n = shape[-2:]
    heights = hyper.get("blocks") or (m,)
    squares = [
        height * (_factor(size, height, n, hyper) / size.to_unit(height, n, hyper)) ** 2 for height in heights
    ]
    return math.sqrt(sum(squares) / m)


def usual_rms(size: Size, shape: Sequence[int], hyper: Hyper) -> float | None:
    """The RMS of dW per unit of learning rate that noise gives, None where nothing is known."""
    m, n = shape[-2:] if len(shape) >= 2 else (1, shape[-1])
    return size.usual(m, n, hyper) if size.usual is not None else None
