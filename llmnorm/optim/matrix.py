"""The whole-matrix adapter: update rules see whole logical matrices, whatever holds the parameter.

    what a rule looks at               parameter cut by rows (FSDP2, HSDP)       elsewhere
    one element                        each process its shard                    each process all
    rows, columns, sums of a matrix    its shard; sums joined (`row_shards.py`)  each process all
    the whole matrix                   its owner; gradient there, update back    each process all, or owners
                                       (`owners.py`)                             (DDP, on request)

Plain tensors pass through untouched. A DTensor of any other layout is gathered for the update and its result
is cut back to the local shard, which is right for every rule and mesh, and costs a gather of gradient and
state per matrix.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llmnorm.int8 import Int8Weight

State = MutableMapping[str, Any]


def rows_by_process(rows: int, processes: int) -> list[int]:
    """How many of `rows` each process of a `Shard(0)` holds: chunks of ceil(rows / processes), the last ones
    short or empty, as `torch.chunk` cuts."""
    chunk = -(-rows // processes)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(processes)]


@dataclass(frozen=True)
class RowLayout:
    """A tensor cut by its first dimension over the processes of `group`; `rank` is this one's place there."""

    group: dist.ProcessGroup
    rank: int
    processes: int

    @staticmethod
    def of(tensor: Tensor) -> RowLayout | None:
        """The layout of a DTensor that is cut by rows once and by nothing else, such as FSDP2's and HSDP's
        (which repeats the rows over replicas); None for every other tensor."""
        if not isinstance(tensor, DTensor):
            return None
        cut = [index for index, placement in enumerate(tensor.placements) if placement == Shard(0)]
        if len(cut) != 1 or any(
            not isinstance(placement, Replicate)
            for index, placement in enumerate(tensor.placements)
            if index != cut[0]
        ):
            return None
        mesh = tensor.device_mesh
        return RowLayout(mesh.get_group(cut[0]), mesh.get_local_rank(cut[0]), mesh.size(cut[0]))

    def first_row(self, rows: int) -> int:
        """The first of this process's rows, of `rows` altogether."""
        return sum(rows_by_process(rows, self.processes)[: self.rank])

    def distributed(self, rows: Tensor, like: DTensor) -> DTensor:
        """The DTensor of which `rows` are this process's, cut as `like` is."""
        shape = torch.Size((like.shape[0], *rows.shape[1:]))
        return DTensor.from_local(
            rows,
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )


def gather(tensor: Tensor) -> Tensor:
    """The whole logical tensor; for a DTensor a collective that every process of its mesh must join."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """`whole` laid out like `like`, without communication: every process already has all of it."""
    if not isinstance(like, DTensor):
        return whole
    # A copy, because a shard would otherwise be a view that keeps the whole matrix alive.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).clone()


class Site:
    """One parameter on its way through a step: what its rule reads, and where the results go.

    `state` is a dictionary that the rule may read, write in place and extend; `store` puts it back. State of
    the parameter's shape is laid out like the parameter, everything else is the same on every process.
    """

    def __init__(self, parameter: Tensor, held: State, elementwise: bool):
        assert parameter.grad is not None
        view = local if elementwise else gather
        self.parameter = parameter
        self.held = held
        self.elementwise = elementwise
        self.grad = view(parameter.grad)
        self.state: dict[str, Tensor] = {key: view(value) for key, value in held.items()}
        self._view = view

    @property
    def weight(self) -> Tensor:
        weight = self._view(self.parameter.detach())
        return weight.decoded(torch.float32) if isinstance(weight, Int8Weight) else weight

    def whole(self, part: Tensor) -> Tensor:
        """What `weight` would be if this process held `part` of the parameter, in the dtype of `part`."""
        parameter = self.parameter
        if self.elementwise or not isinstance(parameter, DTensor):
            return part
        return self._like_parameter(part).full_tensor()

    def store(self) -> None:
        """Write the state back into `held`."""
        for key, value in self.state.items():
            held = self.held.get(key)
            if held is None:
                self.held[key] = self._laid_out(value)
            elif local(held).data_ptr() != value.data_ptr():
                local(held).copy_(local(self._laid_out(value)))

    def shard(self, update: Tensor) -> Tensor:
        """The part of a whole update that belongs to this process's part of the parameter."""
        return update if self.elementwise else local(scatter(update, self.parameter))

    def _laid_out(self, value: Tensor) -> Tensor:
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return value
        if self.elementwise and value.shape == parameter.to_local().shape and value.ndim:
            return self._like_parameter(value)
        return scatter(value, parameter) if value.shape == parameter.shape else value

    def _like_parameter(self, part: Tensor) -> DTensor:
        parameter = self.parameter
        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            part,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
