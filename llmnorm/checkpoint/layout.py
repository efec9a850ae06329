"""Which part of a logical tensor this process holds.

A checkpoint names logical tensors by their global shape. A process holds one *box* of each: the whole of a
plain tensor, or the local shard of a DTensor, given as `(offset, shape)` with one entry per dimension. Boxes
make the file independent of the process count: a reader copies the intersections of the saved boxes with its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Box:
    """The half-open block `[offset, offset + shape)` of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return 0 in self.shape

    def intersect(self, other: Box) -> Box:
        """The common block; an empty one where the two are disjoint."""
        low = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        high = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        return Box(low, tuple(max(0, h - lo) for lo, h in zip(low, high, strict=True)))

    def slices(self, origin: Box) -> tuple[slice, ...]:
        """Index of this block inside a tensor that holds `origin`."""
        return tuple(
            slice(start - base, start - base + size)
            for start, size, base in zip(self.offset, self.shape, origin.offset, strict=True)
        )


def local_tensor(tensor: Tensor) -> Tensor:
    """The memory this process holds, sharing storage with `tensor`."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def local_box(tensor: Tensor) -> Box | None:
    """The block this process holds, or None where the process is not in the tensor's mesh.

    A `Shard(d)` over n processes splits the rows into chunks of ceil(size / n), as `torch.chunk` does, so the
    last chunks can be short or empty; several shards of one dimension split in mesh order. Raises
    NotImplementedError for placements that hold no block of the tensor (partial sums, strided shards).
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    for index, processes, placement in zip(
        coordinate, tensor.device_mesh.shape, tensor.placements, strict=True
    ):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard):
            raise NotImplementedError(f"a tensor placed as {placement} has no block that could be saved")
        dim = placement.dim % tensor.ndim
        chunk = -(-shape[dim] // processes)
        start = min(chunk * index, shape[dim])
        offset[dim] += start
        shape[dim] = min(chunk, shape[dim] - start)
    box = Box(tuple(offset), tuple(shape))
    assert tuple(local_tensor(tensor).shape) == box.shape, (
        tensor.placements,
        box,
        local_tensor(tensor).shape,
    )
    return box


def placement_names(tensor: Tensor) -> list[str] | None:
    """`["shard:0", "replicate"]` for a DTensor, one entry per mesh dimension; None for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return None
    return [f"shard:{p.dim}" if isinstance(p, Shard) else "replicate" for p in tensor.placements]


def placements_from_names(names: list[str]) -> list[Placement]:
    return [Replicate() if name == "replicate" else Shard(int(name.removeprefix("shard:"))) for name in names]


class HostBuffers:
    """Host memory that keeps a copy of the tensors while training goes on.

    The memory stays allocated between saves: pinning it costs more than copying into it. Pinned memory lets
    the copies from a CUDA device run at the full speed of the bus, all in flight at once.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of local `tensors` that later in-place updates cannot reach; valid until the next call."""
        buffers: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(
                    tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
                )
            buffer.copy_(tensor, non_blocking=tensor.is_cuda)
            buffers[name] = buffer
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        self._buffers = buffers
        return buffers
