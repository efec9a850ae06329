"""NorMuon: Muon with one second moment per neuron (arXiv 2510.05491).

    M <- M + (1 - mu)(G - M)        O = orth(U),  U = the (Nesterov) momentum
    v <- b2 v + (1 - b2) mean_row(O^2)                    one number per row, no bias correction: it cancels
    P = O / (sqrt(v) + eps)
    paper:      W <- (1 - lr wd) W - lr 0.2 sqrt(mn) P / ||P||_F                      U = M
    released:   W <- (1 - lr wd) W - lr sqrt(max(1, m/n)) P ||O||_F / ||P||_F         U with Nesterov

Norms are taken over the whole matrix, so the result does not depend on the number of processes. Learning
rates of the two variants are not interchangeable: RMS 0.2 in one, about 1/sqrt(n) in the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from llmnorm.optim.matrix import State
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.muon import JORDAN, keller_scale, momentum_direction, orth, orthogonal_to_unit
from llmnorm.optim.newton_schulz import Coefficients, NewtonSchulzMethod, Preconditioner, coefficient_set
from llmnorm.optim.normalization import rms, to_unit_rms
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import ADAMW_ELSEWHERE, Hyper, Rule, wide
from llmnorm.optim.update_size import ADAM_RMS, LrMode, RowBlocks, Size, one

# Of the RMS of the roots. Rows of orthogonal matrices have like norms, but Newton-Schulz multiplies rounding
# error, 1e-7 of a gradient, by its slope at 0: up to 1e3.
ROW_FLOOR = 1e-3


def normalize_neurons(o: Tensor, state: State, hyper: Hyper) -> Tensor:
    """O / (sqrt(v) + eps), v the running row mean of O^2, kept in fp32 (bf16 would stall)."""
    o = wide(o)
    row = o.square().mean(dim=-1, keepdim=True)
    if "second_moment" not in state:
        state["second_moment"] = torch.zeros_like(row)
    v = state["second_moment"].lerp_(row, 1 - hyper["beta2"])
    root = v.sqrt()
    return o / (torch.maximum(root, ROW_FLOOR * rms(root, (-2, -1))) + hyper["normalizer_eps"])


def paper_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """The normalized neurons at RMS 1."""
    o = orth(momentum_direction(grad, state, {**hyper, "nesterov": False}), hyper)
    return to_unit_rms(normalize_neurons(o, state, hyper))


def released_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """The normalized neurons with the Frobenius norm that O had."""
    o = orth(momentum_direction(grad, state, {**hyper, "nesterov": True}), hyper)
    return to_unit_rms(normalize_neurons(o, state, hyper)) * rms(o, (-2, -1))


PAPER = Rule("normuon", paper_update, Size(lambda m, n, hyper: ADAM_RMS, one), stacks=True)
RELEASED = Rule("normuon", released_update, Size(keller_scale, orthogonal_to_unit), stacks=True)


class NorMuon(MatrixOptimizer):
    """NorMuon on hidden matrices, AdamW on the rest; engine options as in `Muon`.

    The authors' learning rates: 0.02 with `variant: released`, 4e-4 with `variant: paper`.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Rule]]] = {
        "released": {Role.HIDDEN_MATRIX: RELEASED, **ADAMW_ELSEWHERE},
        "paper": {Role.HIDDEN_MATRIX: PAPER, **ADAMW_ELSEWHERE},
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        ns_coefficients: Coefficients = JORDAN,
        ns_steps: int = 5,
        eps: float = 1e-7,
        normalizer_eps: float = 1e-10,
        ns_dtype: Literal["bf16", "fp32"] = "bf16",
        ns_method: NewtonSchulzMethod = "standard",
        ns_preconditioner: Preconditioner = "none",
        variant: Literal["released", "paper"] = "released",
        lr_mode: LrMode = "paper",
        row_blocks: RowBlocks | None = None,
        **shared: Unpack[Options],
    ):
        coefficient_set(ns_coefficients, ns_steps, ns_preconditioner)
        options = {
            "momentum": momentum,
            "beta2": beta2,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "eps": eps,
            "normalizer_eps": normalizer_eps,
            "ns_dtype": ns_dtype,
            "ns_method": ns_method,
            "ns_preconditioner": ns_preconditioner,
            "variant": variant,
            "lr_mode": lr_mode,
            "row_blocks": row_blocks,
        }
        super().__init__(params, lr, weight_decay, options, shared)
