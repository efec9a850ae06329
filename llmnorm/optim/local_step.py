"""A step over parameters whose updates are computed here: whole tensors, and shards element by element."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from llmnorm.int8 import Int8Weight
from llmnorm.optim.matrix import Site, local
from llmnorm.optim.moves import (
    Move,
    Path,
    add_update,
    is_fused,
    moving,
    split_factor,
    take_fused_step,
    updates_of,
)
from llmnorm.optim.random_numbers import seed_of, uniform_like
from llmnorm.optim.rules import Hyper, Rule
from llmnorm.optim.sharded_step import States
from llmnorm.optim.stochastic_rounding import next_rounding, rounds

# Elements of a stack of equal shapes.
STACK_ELEMENTS = 2**25


def batches(moves: Iterable[Move], states: States, stack_devices: Collection[str]) -> Iterator[list[Move]]:
    """Equal shapes together where the rule and the device gain from it."""
    buckets: dict[Any, list[Move]] = {}
    for move in moves:
        parameter = move.parameter
        key: Any = id(move)
        if _moves_with_many(move):
            key = move.group, parameter.device
        elif move.rule.stacks and parameter.device.type in stack_devices:
            kept = tuple(sorted(states.get(parameter, {})))
            shape, dtype, blocks = parameter.shape, parameter.dtype, move.hyper["blocks"]
            key = (move.group, shape, dtype, parameter.device, blocks, kept)
        buckets.setdefault(key, []).append(move)
    for bucket in buckets.values():
        size = max(1, STACK_ELEMENTS // max(1, bucket[0].parameter.numel()))
        if _moves_with_many(bucket[0]):
            size = len(bucket)
        for start in range(0, len(bucket), size):
            yield bucket[start : start + size]


def move_here(moves: Sequence[Move], states: States) -> None:
    """Move one batch of `batches`."""
    rule, hyper = moves[0].rule, moves[0].hyper
    if all(_moves_with_many(move) for move in moves):
        _move_many([move.parameter for move in moves], rule, hyper, states)
    elif all(is_fused(move.parameter, rule, hyper) for move in moves):
        for move in moves:
            _move_fused(move, states)
    else:
        _move(moves, states)


def _move(moves: Sequence[Move], states: States) -> None:
    rule, hyper = moves[0].rule, moves[0].hyper
    sites = [Site(move.parameter, states.get(move.parameter, {}), rule.elementwise) for move in moves]
    factor = moves[0].factor
    updates = updates_of(sites, rule, hyper)
    for move, site, update in zip(moves, sites, updates, strict=True):
        site.store()
        rounding = next_rounding(move.name, site.parameter, site.held, hyper)
        if site.held:
            states[site.parameter] = site.held
        update, number = split_factor(update, factor)
        weight = local(site.parameter.detach())
        moved = moving(weight, rounding)
        add_update(moved, site.shard(update), rule, hyper, number)
        if rule.project is not None:
            moved.copy_(site.shard(rule.project(site.whole(moved), site.state)))
            site.store()
        if isinstance(weight, Int8Weight):
            seed = seed_of("int8", hyper["seed"], move.name, int(site.state["step"]))
            weight.requantize_(moved, uniform_like(moved, seed))
        elif rounding is not None:
            rounding.store(weight, moved)


def _move_fused(move: Move, states: States) -> None:
    hyper, parameter = move.hyper, move.parameter
    held = states.get(parameter, {})
    rounding = next_rounding(move.name, parameter, held, hyper)
    noise = {} if rounding is None else {"seed": rounding.seed, "step": rounding.step}
    site = Site(parameter, held, move.rule.elementwise)
    take_fused_step(move, site.grad, site.state, {**hyper, "noise": noise})
    site.store()
    if site.held:
        states[parameter] = site.held


def _move_many(parameters: list[Tensor], rule: Rule, hyper: Hyper, states: States) -> None:
    assert rule.fused_many is not None
    sites = [Site(p, states.get(p, {}), rule.elementwise) for p in parameters]
    weights = [local(parameter.detach()) for parameter in parameters]
    rule.fused_many(weights, [site.grad for site in sites], [site.state for site in sites], hyper)
    for site in sites:
        site.store()
        states[site.parameter] = site.held


def _moves_with_many(move: Move) -> bool:
    """Whether one launch moves it with others of its group; stochastic rounding is a launch of its own."""
    if move.rule.fused_many is None or move.path is not Path.HERE or rounds(move.parameter, move.hyper):
        return False
    return is_fused(move.parameter, move.rule, move.hyper)
