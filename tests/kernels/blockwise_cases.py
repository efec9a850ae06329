"""The state of the block-wise quantized AdamW at its beginning, and a few of its steps."""

from __future__ import annotations

from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.optim.quantized_state import BLOCK, codebook, quantized_zeros


def beginning(param: Tensor, bits: int) -> list[Tensor]:
    """Codes and absmax of both moments."""
    return [part for _ in range(2) for part in quantized_zeros(param, bits)]


def move(param: Tensor, grad: Tensor, states: list[Tensor], bits: int, step: int, **options) -> None:
    tables = [table for signed in (True, False) for table in codebook(bits, signed, param.device)]
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    kernels.adamw_blockwise_(param, grad, *states, *tables, block=BLOCK[bits], step=step, **options)
