"""Weights in bf16 without a master copy: every update is rounded stochastically.

    w <- SR(w - lr u)        SR(x) = the bf16 neighbor above x with probability (x - below) / (above - below),
                             else the one below: E[SR(x)] = x

Rounding to nearest loses every update below half the spacing of bf16, 2^-9 to 2^-8 of a weight, and a run
stalls where its learning rate is small. The noise is a hash of (seed, parameter name, step, element), so that
a resumed run, another number of processes, another order of parameters draw the same. The rounding itself is
that of the fused kernels (`llmnorm_kernels.optimizer_steps`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import llmnorm_kernels as kernels
from llmnorm.errors import UserError
from llmnorm.int8 import Int8Weight
from llmnorm.optim.matrix import RowLayout, State
from llmnorm.optim.random_numbers import seed_of
from llmnorm.optim.rules import Hyper

# One counter for every method, as not every method counts its steps.
COUNTER = "rounding_step"


class Rounding(NamedTuple):
    """What decides the noise of one update of one parameter: seed, step and the first element held here."""

    seed: int
    step: int
    first: int = 0

    def store(self, weight: Tensor, value: Tensor) -> None:
        """weight = SR(value), both local parts; value fp32."""
        kernels.round_into_(weight, value.contiguous(), seed=self.seed, step=self.step, first=self.first)


def rounds(parameter: Tensor, hyper: Hyper) -> bool:
    """Whether the option has this parameter rounded: those that are not bf16 move as ever, and INT8 weights
    round by themselves."""
    plain = parameter.dtype == torch.bfloat16 and not isinstance(parameter, Int8Weight)
    return bool(hyper["stochastic_rounding"]) and plain


def next_rounding(name: str, parameter: Tensor, state: State, hyper: Hyper) -> Rounding | None:
    """The rounding of this update, whose number is advanced in `state`; None where nothing is rounded so."""
    if not rounds(parameter, hyper):
        return None
    step = state.setdefault(COUNTER, torch.zeros((), dtype=torch.int64, device="cpu"))
    step += 1
    return Rounding(
        seed_of(hyper["seed"], "rounding", name) & 0xFFFFFFFF, int(step.item()), _first(name, parameter)
    )


def _first(name: str, parameter: Tensor) -> int:
    """Index of the first element that this process holds, in the whole parameter."""
    if not isinstance(parameter, DTensor) or all(place.is_replicate() for place in parameter.placements):
        return 0
    layout = RowLayout.of(parameter)
    if layout is None:
        raise UserError(
            "optimizer.stochastic_rounding=true needs parameters sharded by rows over one mesh dimension, "
            f"and {name} has placements {parameter.placements}; set optimizer.stochastic_rounding: false"
        )
    rows = parameter.shape[0]
    start = min(-(-rows // layout.processes) * layout.rank, rows)
    return start * (parameter.numel() // rows)
