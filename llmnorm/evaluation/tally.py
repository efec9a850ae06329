"""Running sums and maxima of a measurement, over batches and over processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# One process's numbers [n] -> those of every process [processes, n].
Gather = Callable[[Tensor], Tensor]


def alone(numbers: Tensor) -> Tensor:
    """The `Gather` of a single process."""
    return numbers[None]


class Tally:
    """Named fp64 tensors; those in `sums` add up, of those in `maxima` the largest counts."""

    def __init__(
        self, device: torch.device, sums: Mapping[str, Sequence[int]], maxima: Mapping[str, Sequence[int]]
    ) -> None:
        """sums, maxima: name -> shape; sums begin at 0, maxima at -inf."""
        double = {"dtype": torch.float64, "device": device}
        self.sums = {name: torch.zeros(*shape, **double) for name, shape in sums.items()}  # type: ignore[call-overload]
        self.maxima = {name: torch.full(tuple(shape), -torch.inf, **double) for name, shape in maxima.items()}  # type: ignore[call-overload]

    def raise_to(self, name: str, index: int, value: Tensor) -> None:
        """maxima[name][index] = max(maxima[name][index], value)."""
        row = self.maxima[name][index]
        torch.maximum(row, value.to(row.dtype), out=row)

    def total(self, gather: Gather = alone) -> dict[str, Tensor]:
        """Every tensor, over all processes, on the CPU. Collective, in one message."""
        held = {**self.sums, **self.maxima}
        table = gather(torch.cat([tensor.flatten() for tensor in held.values()])).cpu()
        parts = table.split([tensor.numel() for tensor in held.values()], dim=1)
        return {
            name: (part.sum(0) if name in self.sums else part.amax(0)).view(tensor.shape)
            for (name, tensor), part in zip(held.items(), parts, strict=True)
        }
