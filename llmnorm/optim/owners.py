"""Whole-matrix rules among several processes: every matrix has one owner, who computes its update and keeps
its state.

    cut (FSDP2, ZeRO)   parts of gradients -> owner -> parts of updates -> their processes: two all-to-alls
    whole (DDP)         every process has the gradient; owners broadcast the updates

A process sends and receives 2 (P - 1) / P^2 of all elements, against (P - 1) / P for one gather of everything
by everyone, and computes 1 / P of the updates. Splits are the true sizes: nothing is padded, and parts may be
short or empty. Owners follow from shapes and order alone, so no process needs to tell another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmnorm.optim.matrix import RowLayout, rows_by_process

_Item = TypeVar("_Item")


def matrix_cost(shape: Sequence[int]) -> float:
    """m n min(m, n), the order of a product with the Gram matrix; of every matrix of a stack."""
    if len(shape) < 2:
        return float(math.prod(shape))
    return float(math.prod(shape) * min(shape[-2:]))


def assign_owners(costs: Sequence[float], processes: int) -> list[int]:
    """The owner of each matrix: the costliest first, each to the process with the least work so far.

    The largest load is at most 4/3 - 1 / (3 P) of the best possible one (Graham 1969, longest processing time
    first). Ties go to the earlier matrix and the lower rank, so every process finds the same owners.
    """
    loads = [0.0] * processes
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = min(range(processes), key=lambda rank: (loads[rank], rank))
        loads[owners[index]] += costs[index]
    return owners


def in_buckets(items: Sequence[_Item], sizes: Sequence[int], limit: int) -> Iterator[list[_Item]]:
    """`items` in order, cut where the sizes of one bucket would exceed `limit`; at least one item each."""
    bucket: list[_Item] = []
    held = 0
    for item, size in zip(items, sizes, strict=True):
        if bucket and held + size > limit:
            yield bucket
            bucket, held = [], 0
        bucket.append(item)
        held += size
    if bucket:
        yield bucket


class Exchange:
    """The two all-to-alls for some tensors of one dtype and device, of which each process holds a part.

    shapes: the whole shapes; owners: the rank in `group` that owns each; sizes: of each tensor, the elements
    that every rank holds. The parts of rank 0, 1, ... one after another are the flattened tensor.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        owners: Sequence[int],
        sizes: Sequence[Sequence[int]],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.shapes = shapes
        self.sizes = sizes
        self.group = group
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self.owned: list[list[int]] = [[] for _ in range(self.processes)]  # by owner
        for index, owner in enumerate(owners):
            self.owned[owner].append(index)

    @classmethod
    def by_rows(cls, shapes: Sequence[torch.Size], owners: Sequence[int], layout: RowLayout) -> Exchange:
        """For tensors that are all cut by rows, in one layout."""
        sizes = [
            [rows * math.prod(shape[1:]) for rows in rows_by_process(shape[0], layout.processes)]
            for shape in shapes
        ]
        return cls(shapes, owners, sizes, layout.group)

    def _splits(self) -> tuple[list[int], list[int]]:
        """Elements between this process and each other: (of what it holds, by owner), (of what it owns, by
        holder)."""
        ranks = range(self.processes)
        held = [sum(self.sizes[index][self.rank] for index in self.owned[owner]) for owner in ranks]
        owned = [sum(self.sizes[index][holder] for index in self.owned[self.rank]) for holder in ranks]
        return held, owned

    def to_owners(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """This process's part of every tensor to its owner; returns the whole tensors that this one owns."""
        held, owned = self._splits()
        outgoing = torch.cat([parts[index].reshape(-1) for members in self.owned for index in members])
        incoming = outgoing.new_empty(sum(owned))
        dist.all_to_all_single(incoming, outgoing, owned, held, group=self.group)
        mine = self.owned[self.rank]
        pieces: dict[int, list[Tensor]] = {index: [] for index in mine}
        for holder, message in enumerate(incoming.split(owned)):
            sizes = [self.sizes[index][holder] for index in mine]
            for index, piece in zip(mine, message.split(sizes), strict=True):
                pieces[index].append(piece)
        return {index: torch.cat(found).view(self.shapes[index]) for index, found in pieces.items()}

    def to_holders(self, wholes: dict[int, Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Parts of the whole tensors, from their owners to the processes that hold them; returns this
        process's part of every tensor, flat."""
        held, owned = self._splits()
        mine = self.owned[self.rank]
        cut = {index: wholes[index].to(dtype).reshape(-1).split(list(self.sizes[index])) for index in mine}
        parts = [cut[index][holder] for holder in range(self.processes) for index in mine]
        outgoing = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)
        incoming = torch.empty(sum(held), dtype=dtype, device=device)
        dist.all_to_all_single(incoming, outgoing, held, owned, group=self.group)
        order = [index for members in self.owned for index in members]
        pieces: list[Tensor] = [incoming] * len(self.shapes)
        for index, piece in zip(
            order, incoming.split([self.sizes[index][self.rank] for index in order]), strict=True
        ):
            pieces[index] = piece
        return pieces


def broadcast_from_owners(
    wholes: dict[int, Tensor],
    shapes: Sequence[torch.Size],
    owners: Sequence[int],
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """Every owner's tensors on every process: one broadcast per owner, without padding, all in flight."""
    rank, processes = dist.get_rank(group), dist.get_world_size(group)
    owned = [[i for i, owner in enumerate(owners) if owner == process] for process in range(processes)]
    messages, works = [], []
    for process, indices in enumerate(owned):
        if process == rank and indices:
            message = torch.cat([wholes[index].to(dtype).reshape(-1) for index in indices])
        else:
            size = sum(shapes[index].numel() for index in indices)
            message = torch.empty(size, dtype=dtype, device=device)
        messages.append(message)
        if indices:
            source = dist.get_global_rank(group, process)
            works.append(dist.broadcast(message, source, group=group, async_op=True))
    for work in works:
        work.wait()
    results: list[Tensor] = [torch.empty(0)] * len(shapes)
    for indices, message in zip(owned, messages, strict=True):
        pieces = message.split([shapes[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            results[index] = piece.view(shapes[index])
    return results
