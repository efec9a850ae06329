"""AdamW with block-wise quantized moments (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861).

    M, V decoded from 8 (or 4) bits -> one step of AdamW in fp32 -> encoded again with new block maxima

The format is that of `quantized_state.py`: blocks never span two rows, so the state does not depend on how a
matrix is sharded. Embeddings and vectors keep plain moments: a row of an embedding that is seldom seen has
second moments far below its block's maximum, which would round to zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.errors import UserError
from llmnorm.optim.lowrank import codec
from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.quantized_state import BLOCK, codebook, quantized_zeros
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import Parts, by_rows
from llmnorm.optim.rules import Hyper, Rule, adam_direction, count, fused_adam, wide
from llmnorm.optim.update_size import ADAM_LIKE


@by_rows()
def adamw8bit_update(grad: Tensor, state: State, hyper: Hyper) -> Parts:
    """(M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps) of the decoded moments, as torch.optim.AdamW's."""
    step, g = count(state), wide(grad)
    beta1, beta2 = hyper["betas"]
    codecs = [codec(grad, grad, hyper, signed) for signed in (True, False)]
    first = codecs[0].read(state, "exp_avg", g)
    g = g.to(first.dtype)  # fp64 gradients beside moments in fp32
    first = first.lerp(g, 1 - beta1)
    second = beta2 * codecs[1].read(state, "exp_avg_sq", g) + (1 - beta2) * g.square()
    codecs[0].write(state, "exp_avg", first)
    codecs[1].write(state, "exp_avg_sq", second)
    yield from ()  # blocks lie within rows, so nothing is asked of the others
    return (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + hyper["eps"])


def fused_adamw8bit(
    weight: Tensor, grad: Tensor, state: State, hyper: Hyper, lr: float, weight_decay: float
) -> None:
    """`adamw8bit_update` and its step in one pass over memory; the state is that of the torch path."""
    bits = codec(grad, grad, hyper, True).bits
    if bits not in BLOCK:
        fused_adam(weight, grad, state, hyper, lr, weight_decay)
        return
    step = count(state)
    moments: dict[str, Tensor] = {}
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        if f"{key}_codes" not in state:
            state[f"{key}_codes"], state[f"{key}_absmax"] = quantized_zeros(grad, bits)
        values, cells = codebook(bits, signed, grad.device)
        held = {part: state[f"{key}_{part}"] for part in ("codes", "absmax")}
        moments |= {f"{key}_{part}": x for part, x in {**held, "map": values, "cells": cells}.items()}
    options = {"betas": tuple(hyper["betas"]), "eps": hyper["eps"], "seed": hyper["noise"].get("seed")}
    kernels.adamw_blockwise_(
        weight, grad, **moments, block=BLOCK[bits], step=step, lr=lr, weight_decay=weight_decay, **options
    )


PLAIN = Rule("adamw", adam_direction, ADAM_LIKE, elementwise=True, fused=fused_adam)
QUANTIZED = Rule("adamw8bit", adamw8bit_update, ADAM_LIKE, fused=fused_adamw8bit, fuses_rows=True)


class AdamW8bit(MatrixOptimizer):
    """AdamW whose moments of hidden matrices take 8 bits, or 4; those below 4,096 elements keep plain ones.

    state_bits: 8 or 4. quantize_embeddings: embedding and head too.

    Raises `UserError` for state_bits 32, which would be AdamW.
    """

    rules: ClassVar[Mapping[str, Rule]] = {
        Role.HIDDEN_MATRIX: QUANTIZED,
        Role.EMBEDDING: PLAIN,
        Role.LM_HEAD: PLAIN,
        Role.VECTOR: PLAIN,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        state_bits: Literal[8, 4] = 8,
        quantize_embeddings: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **shared: Unpack[Options],
    ):
        options = {
            "state_bits": state_bits,
            "quantize_embeddings": quantize_embeddings,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, lr, weight_decay, options, shared)

    def rule(self, group: Hyper) -> Rule:
        table = group["role"] in (Role.EMBEDDING, Role.LM_HEAD) and group["quantize_embeddings"]
        return QUANTIZED if table else super().rule(group)

    def _check_group(self, group: Hyper) -> None:
        super()._check_group(group)
        if group["state_bits"] == 32:
            raise UserError(
                "optimizer.state_bits=32 must be 8 or 4 here: with plain moments adamw8bit is AdamW; choose "
                "optimizer.name adamw for that"
            )
