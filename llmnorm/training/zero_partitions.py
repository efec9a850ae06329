"""Where ZeRO keeps a parameter: the one place that knows how DeepSpeed lays its partitions out.

DeepSpeed cuts the flattened parameters of a group into equal flat partitions, one per process, with no regard
for rows. Its public accessors assemble whole weights and gradients, but know neither a process's own part
(stages 1 and 2) nor sizes that the number of processes does not divide (`safe_set_full_grad` of stage 3
raises for a parameter of 17 elements on two processes). Those two are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """Elements [start, start + numel) of a flattened parameter, which lie at flat[offset : offset + numel].

    `flat` is this process's fp32 partition; numel is 0 where none of the parameter is in it.
    """

    flat: Tensor
    offset: int
    start: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        """This part of a tensor laid out like the partition: a view."""
        return flat.detach().narrow(0, self.offset, self.numel)

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a whole tensor: a view."""
        return whole.detach().reshape(-1).narrow(0, self.start, self.numel)


class Partitions:
    """The parts of all parameters under an engine of stage 1, 2 or 3."""

    def __init__(self, engine: Any, stage: int) -> None:
        self.stage = stage
        optimizer = engine.optimizer
        find = self._part_of_stage_3 if stage == 3 else self._part_of_stages_1_and_2
        groups = optimizer.fp16_groups if stage == 3 else optimizer.bit16_groups
        self.parts: dict[nn.Parameter, Part] = {
            parameter: find(optimizer, number, parameter)
            for number, group in enumerate(groups)
            for parameter in group
        }
        self.sizes = self._sizes()

    def _sizes(self) -> dict[nn.Parameter, list[int]]:
        """How many elements of each parameter every process holds; collective."""
        own = torch.tensor([part.numel for part in self.parts.values()])
        own = own.to(next(iter(self.parts.values())).flat.device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        return dict(zip(self.parts, torch.stack(everyone, dim=1).tolist(), strict=True))

    @staticmethod
    def _part_of_stages_1_and_2(optimizer: Any, group: int, parameter: Any) -> Part:
        flat, mapping = optimizer.single_partition_of_fp32_groups[group], parameter._hp_mapping
        if mapping is None:
            return Part(flat, 0, 0, 0)
        inside, own = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        return Part(flat, own.start, inside.start, inside.numel)

    @staticmethod
    def _part_of_stage_3(optimizer: Any, group: int, parameter: Any) -> Part:
        number, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = min(size * dist.get_rank(), parameter.ds_numel)
        # The last parts are padded, and may be nothing but padding.
        return Part(
            optimizer.fp32_partitioned_groups_flat[number],
            offset,
            start,
            min(size, parameter.ds_numel - start),
        )

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The whole shape, of which stage 3 leaves nothing in the parameter itself."""
        return torch.Size(parameter.ds_shape) if self.stage == 3 else parameter.shape  # type: ignore[attr-defined]

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """This process's part of the weight: a view of its fp32 partition."""
        part = self.parts[parameter]
        return part.of(part.flat)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """This process's part of the summed gradient, [numel], between backward and step.

        Under stages 1 and 2 it is the gradient itself and no copy.
        """
        part = self.parts[parameter]
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_grad

            return safe_get_local_grad(parameter).reshape(-1).narrow(0, 0, part.numel)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return torch.zeros(0, device=part.flat.device)
        fragment = mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
        return fragment.detach().reshape(-1)

    def set_gradient(self, parameter: nn.Parameter, own: Tensor) -> None:
        """Replace this process's part of the summed gradient, [numel]."""
        if self.stage == 3:
            self._set_local_gradient(parameter, own)
        else:
            self.gradient(parameter).copy_(own)

    def _set_local_gradient(self, parameter: nn.Parameter, own: Tensor) -> None:
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        padded = torch.zeros(safe_get_local_grad(parameter).numel(), dtype=own.dtype, device=own.device)
        padded[: own.numel()] = own
        safe_set_local_grad(parameter, padded)

    def add_to_gradient(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Add to the summed gradient; every process takes its part of `whole`."""
        self.set_gradient(parameter, self.gradient(parameter) + self.parts[parameter].cut(whole))

    def whole_weight(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 weight on every process; collective under stage 3, and a fresh tensor there."""
        if self.stage == 3:
            from deepspeed.utils import safe_get_full_fp32_param

            return safe_get_full_fp32_param(parameter)
        return parameter.detach()

    @torch.no_grad()
    def set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Replace the weight: the fp32 partition, and what the forward pass reads."""
        part = self.parts[parameter]
        part.of(part.flat).copy_(part.cut(whole))
        if self.stage == 3:
            parameter.ds_tensor.data[: part.numel].copy_(part.cut(whole))  # type: ignore[attr-defined]
        if parameter.data.shape == whole.shape:  # stage 3 leaves small ones gathered
            parameter.data.copy_(whole)

    def gather(self, parameter: nn.Parameter, flat: Tensor) -> Tensor:
        """The whole of what `flat`, laid out like the parameter's partition, holds for it; collective."""
        part = self.parts[parameter]
        whole = torch.zeros(self.shape(parameter), dtype=flat.dtype, device=flat.device)
        part.cut(whole).copy_(part.of(flat))
        dist.all_reduce(whole)
        return whole
