"""Bytes that an optimizer step sends, from shapes alone, for parameters that FSDP2 cuts by rows.

A process sends, with P processes and the algorithms that move least (ring, direct):

    all-gather to S bytes, reduce-scatter from S     (P - 1) / P S
    all-reduce of S                                  2 (P - 1) / P S
    all-to-all                                       what it has for others

The backend's own bytes, with b those of an element: weights gathered in the forward and backward pass of
every micro-batch, gradients scattered once, 2 b_w + b_g per element. What a method adds is found from its own
rules, run on the meta device: what they ask to be summed (`row_shards.py`), or the gradients and updates that
travel to and from owners (`owners.py`). Numbers are means over processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmnorm.optim.matrix import rows_by_process
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.moves import Move, Path, sharded_path
from llmnorm.optim.owners import assign_owners, matrix_cost
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import ByRows, Parts
from llmnorm.optim.sharded_step import result_of, sends_weight


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one process sends in one optimizer step, by what they are for."""

    sums: float = 0.0  # of rules that work by rows, and factors that owners found for all
    to_owners: float = 0.0  # gradients, and weights that a rule reads
    to_holders: float = 0.0  # updates
    messages: int = 0  # collectives, one after the other

    @property
    def total(self) -> float:
        return self.sums + self.to_owners + self.to_holders


def optimizer_bytes(optimizer: torch.optim.Optimizer, processes: int) -> StepBytes:
    """What a step of `optimizer`, over plain tensors (the meta device will do), would send if FSDP2 cut its
    parameters over `processes`. Vectors stay whole there and cost nothing."""
    if not isinstance(optimizer, MatrixOptimizer):
        return StepBytes()
    matrices = [move for move in _moves(optimizer) if move.hyper["role"] != Role.VECTOR]
    known: dict[Any, list[int]] = {}  # a model has hundreds of matrices and a handful of shapes
    asked = []
    for move in matrices:
        if move.path is Path.ROWS:
            key = (move.rule, move.shape, move.group)
            known[key] = known.get(key) or _requested(move)
            asked.append(known[key])
    sums = 2 * (processes - 1) / processes * sum(sum(rounds) for rounds in asked)
    messages = max((len(rounds) for rounds in asked), default=0)
    to_owners = to_holders = 0.0
    owned = _owned(optimizer, processes)
    for move, owner in owned:
        elements = math.prod(move.shape)
        kept = rows_by_process(move.shape[0], processes)[owner] * (elements // move.shape[0])
        sent = (elements - kept) / processes
        trips = optimizer.gradient_trips + sends_weight(move)
        to_owners += trips * move.parameter.element_size() * sent
        back = result_of(move)
        if move.rule.factors is not None:
            sums += 2 * (processes - 1) / processes * back.numel() * back.element_size()
        else:
            to_holders += back.element_size() * sent
    if owned:
        messages += optimizer.gradient_trips + 1
    return StepBytes(sums, to_owners, to_holders, messages)


def owner_load(optimizer: torch.optim.Optimizer, processes: int) -> float:
    """Floating-point operations of the matrix products of the busiest owner's updates in one step.

    Decompositions are not products and not counted.
    """
    if not isinstance(optimizer, MatrixOptimizer):
        return 0.0
    loads = [0.0] * processes
    known: dict[Any, int] = {}
    for move, owner in _owned(optimizer, processes):
        key = (move.rule, move.shape)
        if key not in known:
            weight = [move.parameter.detach()] if move.rule.reads_weight else []
            with FlopCounterMode(display=False) as counter:
                move.rule.update(move.parameter.grad, {}, move.hyper, *weight)
            known[key] = counter.get_total_flops()
        loads[owner] += known[key]
    return max(loads)


def _owned(optimizer: MatrixOptimizer, processes: int) -> list[tuple[Move, int]]:
    """Every matrix that has an owner, and its owner."""
    moves = [
        move for move in _moves(optimizer) if move.path is Path.OWNER and move.hyper["role"] != Role.VECTOR
    ]
    return list(zip(moves, assign_owners([matrix_cost(m.shape) for m in moves], processes), strict=True))


def backend_bytes(
    parameters: Iterable[tuple[Sequence[int], bool]],
    processes: int,
    *,
    weight_bytes: int = 2,
    gradient_bytes: int = 4,
    micro_batches: int = 1,
) -> dict[str, float]:
    """What FSDP2 itself sends in one step: `weights` and `gradients`.

    `parameters`: (shape, whether it belongs to a block) of every matrix. Blocks gather their weights in
    `weight_bytes` twice per micro-batch; embedding and head in fp32 once, as they stay gathered until the
    backward pass. Rows are padded to a multiple of the process count.
    """
    weights = gradients = 0.0
    for shape, in_block in parameters:
        padded = -(-shape[0] // processes) * processes * math.prod(shape[1:])
        weights += micro_batches * padded * (2 * weight_bytes if in_block else 4)
        gradients += padded * gradient_bytes
    share = (processes - 1) / processes
    return {"weights": share * weights, "gradients": share * gradients}


def _moves(optimizer: MatrixOptimizer) -> list[Move]:
    moves = []
    for number, group in enumerate(optimizer.param_groups):
        rule = optimizer.rule(group)
        hyper = {**group, **optimizer.context({**group, "params": []}), "blocks": None}
        for index, parameter in enumerate(group["params"]):
            stand_in = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta", requires_grad=True)
            stand_in.grad = torch.empty_like(stand_in)
            path = sharded_path(parameter.shape, rule, hyper)
            moves.append(Move(f"{number}/{index}", stand_in, rule, {**hyper, "name": ""}, path, number))
    return moves


def _requested(move: Move) -> list[int]:
    """Bytes that this matrix's rule asks for, round by round of a step."""
    state: dict[str, Tensor] = {}
    rule, weight = move.rule, [move.parameter.detach()] if move.rule.reads_weight else []
    assert isinstance(rule.update, ByRows)
    rounds = _rounds(rule.update.parts(move.parameter.grad, state, move.hyper, *weight))
    if isinstance(rule.project, ByRows):
        rounds += _rounds(rule.project.parts(move.parameter.detach(), state))
    return rounds


def _rounds(parts: Parts) -> list[int]:
    answer: Any = None
    rounds = []
    try:
        while True:
            answer = parts.send(answer).values
            rounds.append(sum(value.numel() * value.element_size() for value in answer))
    except StopIteration:
        return rounds
