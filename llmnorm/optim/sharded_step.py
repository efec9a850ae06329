"""A step over parameters that several processes share: by rows, or by the owners of whole matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmnorm.optim.matrix import RowLayout, State, local
from llmnorm.optim.moves import (
    Move,
    OwnedSite,
    add_update,
    is_fused,
    moving,
    split_factor,
    take_fused_step,
    updates_of,
)
from llmnorm.optim.owners import Exchange, broadcast_from_owners, in_buckets
from llmnorm.optim.row_shards import ByRows, RowSite, in_lockstep
from llmnorm.optim.rules import wide
from llmnorm.optim.stochastic_rounding import Rounding, next_rounding, rounds

# Elements per process that are in flight at once: a bucket's gradients and updates are held in full beside
# the shards, while more and smaller messages would only wait longer.
BUCKET_ELEMENTS = 2**28

States = MutableMapping[Tensor, State]
Batches = Callable[[Iterable[Move]], Iterator[list[Move]]]


def _buckets(moves: Sequence[Move], processes: int) -> Iterator[list[Move]]:
    """From whole shapes, not local ones: every process must cut alike."""
    return in_buckets(moves, [math.prod(move.shape) // processes for move in moves], BUCKET_ELEMENTS)


def move_by_rows(moves: Sequence[Move], states: States) -> None:
    """Move shards of rows where they are. Every process passes the same moves in the same order."""
    layouts = {id(move): RowLayout.of(move.parameter) for move in moves}
    for bucket in _buckets(
        moves, max((layout.processes for layout in layouts.values() if layout), default=1)
    ):
        joined, sites, parts, groups = [], [], [], []
        moved: list[Tensor] = []
        roundings: list[Rounding | None] = []
        for move in bucket:
            layout, rule = layouts[id(move)], move.rule.update
            assert layout is not None and isinstance(rule, ByRows)
            held = states.get(move.parameter, {})
            site = RowSite(move.parameter, held, rule, move.hyper, layout)  # type: ignore[arg-type]
            first = layout.first_row(move.shape[0])
            hyper = {**move.hyper, "rows": move.shape[0], "first_row": first}
            if is_fused(move.parameter, move.rule, move.hyper):
                # Asks nothing of the other processes, which need not go the same way.
                take_fused_step(move, site.grad, site.state, {**hyper, "noise": {}})
                site.store()
                states[move.parameter] = site.held
                continue
            weight = [site.weight] if move.rule.reads_weight else []
            parts.append(rule.parts(site.grad, site.state, hyper, *weight))
            joined.append(move)
            sites.append(site)
            groups.append(layout.group)
        for move, site, update in zip(joined, sites, in_lockstep(parts, groups), strict=True):
            factor = move.factor
            assert isinstance(factor, float)
            site.store()
            roundings.append(next_rounding(move.name, move.parameter, site.held, move.hyper))
            moved.append(moving(site.weight, roundings[-1]))
            add_update(moved[-1], update, move.rule, move.hyper, factor)
            if site.held:
                states[move.parameter] = site.held
        _project_rows(joined, sites, moved)
        for site, rounding, value in zip(sites, roundings, moved, strict=True):
            if rounding is not None:
                rounding.store(site.weight, value)


def _project_rows(moves: Sequence[Move], sites: Sequence[RowSite], moved: Sequence[Tensor]) -> None:
    """`moved`, the weights after their updates, in place."""
    parts, groups, weights = [], [], []
    for move, site, weight in zip(moves, sites, moved, strict=True):
        if isinstance(move.rule.project, ByRows):
            parts.append(move.rule.project.parts(weight, site.state))
            groups.append(site.layout.group)
            weights.append(weight)
    for weight, projected in zip(weights, in_lockstep(parts, groups), strict=True):
        weight.copy_(projected)


def sends_weight(move: Move) -> bool:
    """Whether the owner needs the weight, too: a decay that follows the update is left to the shards."""
    return move.rule.reads_weight and not move.rule.decay_follows


class OwnedMoves:
    """The moves of one step whose matrices have owners.

    `owner(parameter)` is its rank in the group; `shared` the group of plain tensors (DDP), None where
    parameters are cut by rows.
    """

    def __init__(
        self,
        moves: Sequence[Move],
        states: States,
        owners: Mapping[Tensor, int],
        shared: RowLayout | None,
        batches: Batches,
    ) -> None:
        self.moves = moves
        self.states = states
        self.owners = owners
        self.shared = shared
        self.batches = batches

    def layout(self, parameter: Tensor) -> RowLayout:
        layout = RowLayout.of(parameter) or self.shared
        assert layout is not None
        return layout

    def owned_sites(self) -> Iterator[tuple[Move, OwnedSite]]:
        """Every move that this process owns, with its whole gradient; no updates are sent. Collective."""
        for bucket in self._buckets(lambda move: False):
            sites = self._gather(bucket, weights=False)
            yield from ((move, sites[index]) for index, move in enumerate(bucket) if index in sites)

    def step(self) -> None:
        """Compute at the owners, and move every process's part. Collective."""
        for bucket in self._buckets(sends_weight):
            sites = self._gather(bucket, sends_weight(bucket[0]))
            places = {id(move): index for index, move in enumerate(bucket)}
            results: dict[int, Tensor] = {}
            for batch in self.batches(bucket[index] for index in sites):
                indices = [places[id(move)] for move in batch]
                for index, result in zip(
                    indices, self._compute(batch, [sites[i] for i in indices]), strict=True
                ):
                    results[index] = result
            self._spread(bucket, results)

    def _buckets(self, apart: Callable[[Move], bool]) -> Iterator[list[Move]]:
        alike: dict[Hashable, list[Move]] = {}
        for move in self.moves:
            grad = local(move.parameter.grad)  # type: ignore[arg-type]
            group, cut = self.layout(move.parameter).group, RowLayout.of(move.parameter) is not None
            key = (group.group_name, cut, grad.dtype, result_of(move).dtype, grad.device, move.rule.factors)
            alike.setdefault((*key, apart(move)), []).append(move)
        for moves in alike.values():
            yield from _buckets(moves, self.layout(moves[0].parameter).processes)

    def _exchange(self, bucket: Sequence[Move]) -> Exchange:
        owners = [self.owners[move.parameter] for move in bucket]
        return Exchange.by_rows([move.shape for move in bucket], owners, self.layout(bucket[0].parameter))

    def _gather(self, bucket: Sequence[Move], weights: bool) -> dict[int, OwnedSite]:
        parameters = [move.parameter for move in bucket]
        rank = self.layout(parameters[0]).rank
        mine = [index for index, p in enumerate(parameters) if self.owners[p] == rank]

        def collect(tensors: list[Tensor]) -> dict[int, Tensor]:
            if RowLayout.of(parameters[0]) is None:
                return {index: tensors[index] for index in mine}
            return self._exchange(bucket).to_owners([local(tensor) for tensor in tensors])

        grads = collect([p.grad for p in parameters])  # type: ignore[misc]
        # A rule that reads a weight it was not sent fails on the empty one.
        whole = collect([p.detach() for p in parameters]) if weights else {}
        return {
            index: OwnedSite(
                parameters[index],
                self.states.get(parameters[index], {}),
                grads[index],
                whole.get(index, grads[index].new_empty(0)),
            )
            for index in mine
        }

    def _compute(self, batch: Sequence[Move], sites: Sequence[OwnedSite]) -> list[Tensor]:
        """Updates, with their columns of factors; or the new weights themselves, of a rule that projects."""
        rule, hyper = batch[0].rule, owner_hyper(batch[0])
        if rule.factors is not None:
            return [self._factors(move, site) for move, site in zip(batch, sites, strict=True)]
        results = []
        for move, site, update in zip(batch, sites, updates_of(sites, rule, hyper), strict=True):
            result, factor = split_factor(update, move.factor)
            if rule.project is not None:
                result = site.weight.to(result_of(move).dtype, copy=True)
                add_update(result, update, rule, hyper, factor)
                result = rule.project(result, site.state)
            self._store(site)
            results.append(result)
        return results

    def _factors(self, move: Move, site: OwnedSite) -> Tensor:
        assert move.rule.factors is not None
        factors = move.rule.factors(site.grad, site.state, owner_hyper(move))
        self._store(site)
        return factors

    def _store(self, site: OwnedSite) -> None:
        site.store()
        if site.held:
            self.states[site.parameter] = site.held

    def _spread(self, bucket: Sequence[Move], results: dict[int, Tensor]) -> None:
        parameters = [move.parameter for move in bucket]
        dtype, device = result_of(bucket[0]).dtype, local(parameters[0]).device
        layout = self.layout(parameters[0])
        if bucket[0].rule.factors is not None:
            parts = self._scaled(bucket, results, layout)
        elif RowLayout.of(parameters[0]) is None:
            shapes, owners = [move.shape for move in bucket], [self.owners[p] for p in parameters]
            parts = broadcast_from_owners(results, shapes, owners, layout.group, dtype, device)
        else:
            flat = self._exchange(bucket).to_holders(results, dtype, device)
            parts = [part.view(local(p).shape) for part, p in zip(flat, parameters, strict=True)]
        for move, part in zip(bucket, parts, strict=True):
            self._take(move, part)

    def _scaled(self, bucket: Sequence[Move], results: dict[int, Tensor], layout: RowLayout) -> list[Tensor]:
        """This process's gradients times the factors that their owners found, which all need: one sum of
        zeros and what each owner has."""
        device = local(bucket[0].parameter).device
        likes = [result_of(move) for move in bucket]
        found = [
            results[index] if index in results else torch.zeros(like.shape, dtype=like.dtype, device=device)
            for index, like in enumerate(likes)
        ]
        flat = torch.cat([factors.reshape(-1) for factors in found])
        dist.all_reduce(flat, group=layout.group)
        scaled = []
        for move, like, piece in zip(bucket, likes, flat.split([x.numel() for x in likes]), strict=True):
            grad, factors = wide(local(move.parameter.grad)), piece.view(like.shape)  # type: ignore[arg-type]
            if factors.shape[0] > 1 and RowLayout.of(move.parameter) is not None:
                factors = factors.narrow(0, layout.first_row(move.shape[0]), grad.shape[0])
            scaled.append(factors * grad)
        return scaled

    def _take(self, move: Move, part: Tensor) -> None:
        """Move this process's rows by their part of the update, or to their part of the new weight."""
        weight, rule, hyper, factor = local(move.parameter.detach()), move.rule, move.hyper, move.factor
        held = self.states.get(move.parameter, {})
        rounding = next_rounding(move.name, move.parameter, held, hyper)
        if held:
            self.states[move.parameter] = held
        moved = moving(weight, rounding)
        if rule.project is not None:
            moved.copy_(part)
        else:
            add_update(moved, part, rule, hyper, factor if isinstance(factor, float) else 1.0)
        if rule.decay_follows:
            moved.mul_(1 - hyper["lr"] * hyper["weight_decay"])
        if rounding is not None:
            rounding.store(weight, moved)


def owner_hyper(move: Move) -> Mapping[str, Any]:
    """What the rule reads at the owner, who leaves a decay that follows the update to the shards."""
    return {**move.hyper, "weight_decay": 0.0} if move.rule.decay_follows else move.hyper


_results: dict[Hashable, Tensor] = {}


def result_of(move: Move) -> Tensor:
    """Shape and dtype of what the owner sends back, on the meta device: processes that own nothing must know
    them."""
    rule, parameter, grad = move.rule, move.parameter, move.parameter.grad
    assert grad is not None
    if rule.project is not None:
        dtype = torch.float32 if rounds(parameter, move.hyper) else parameter.dtype
        return torch.empty(move.shape, dtype=dtype, device="meta")
    key = (
        rule,
        move.shape,
        grad.dtype,
        parameter.dtype,
        *(move.hyper.get(k) for k in ("ns_dtype", "state_dtype", "side", "granularity", "rank")),
    )
    if key not in _results:
        like = torch.empty(move.shape, dtype=grad.dtype, device="meta")
        reads = rule.reads_weight and rule.factors is None
        weight = [torch.empty_like(like, dtype=parameter.dtype)] if reads else []
        hyper = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in owner_hyper(move).items()}
        _results[key] = (rule.factors or rule.update)(like, {}, hyper, *weight)
    return _results[key]
