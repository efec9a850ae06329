"""The optimizer that was asked for, under ZeRO: on its flat partitions, or on whole matrices at their owners.

AdamW looks at one element at a time, so it runs on the flat partitions as they are. Every other method gets
what it was written for. After the backward passes

    owner of W:   G = whole gradient,  W' = W after the optimizer's own step on (W, G),   D = W - W'
    everyone:     the gradient of ZeRO becomes D, and its step is the plain one, W <- W - D

so what the method computes is what it computes in one process. Each parameter has one owner, which alone
keeps its state; owners are chosen so that their shares are about equal. Parts of G (and of W, under stage 3)
go to owners and parts of D come back by the all-to-alls of `optim/owners.py`. Where W' is within a factor of
two of W the subtractions are exact (Sterbenz); elsewhere they round once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.owners import Exchange, in_buckets
from llmnorm.optim.sharded_step import BUCKET_ELEMENTS
from llmnorm.training.zero_partitions import Partitions


def runs_on_partitions(optimizer: Optimizer) -> bool:
    """Whether the optimizer may see flat partitions: its update and all its state are element by element."""
    return type(optimizer) is torch.optim.AdamW


class PartitionStep(Optimizer):
    """What DeepSpeed holds as its optimizer: `asked` on flat partitions, or the plain step W <- W - g.

    DeepSpeed replaces `params` of these groups by its partitions and leaves those of `asked` alone. It rests
    unless `armed`: then a step of the engine only forgets the gradients.
    """

    def __init__(self, asked: Optimizer) -> None:
        self.asked = asked
        self.on_partitions = runs_on_partitions(asked)
        self.armed = False
        self.factor: Tensor | None = None
        groups = [
            {"params": list(group["params"]), "number": number}
            for number, group in enumerate(asked.param_groups)
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the partitions that DeepSpeed shows, by the gradients it gave them."""
        if not self.armed:
            return
        for group in self.param_groups:
            for flat in group["params"]:
                assert flat.ndim == 1 and flat.grad is not None, (flat.shape, flat.grad)
                if not self.on_partitions:
                    flat.sub_(flat.grad)
                    continue
                if self.factor is not None:
                    flat.grad.mul_(self.factor)
                self._step_asked(group["number"], flat)

    def _step_asked(self, number: int, flat: Tensor) -> None:
        groups = self.asked.param_groups
        self.asked.param_groups = [{**groups[number], "params": [flat]}]
        try:
            self.asked.step()
        finally:
            self.asked.param_groups = groups


class WholeMatrixStep:
    """Moves whole parameters at their owners and leaves D = W - W' as ZeRO's gradient."""

    def __init__(
        self, optimizer: Optimizer, partitions: Partitions, owners: Mapping[nn.Parameter, int]
    ) -> None:
        self.optimizer = optimizer
        self.partitions = partitions
        self.owners = owners
        if isinstance(optimizer, MatrixOptimizer):
            optimizer.gradients_lie_apart({p: partitions.shape(p) for p in owners})
        own = [partitions.shape(parameter).numel() // dist.get_world_size() for parameter in owners]
        self.buckets = list(in_buckets(list(owners), own, BUCKET_ELEMENTS))

    @torch.no_grad()
    def run(self, factor: Tensor | None) -> None:
        """One step of the optimizer with gradients times `factor`; collective, between backward and step."""
        # What the module holds in place of the whole weight, to be put back: a view of DeepSpeed's buffers.
        held: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        for bucket in self.buckets:
            for parameter, (gradient, weight) in self._gather(bucket).items():
                held[parameter] = parameter.data, weight
                parameter.data = weight.clone()
                parameter.grad = gradient if factor is None else gradient.mul_(factor)
        self.optimizer.step()
        for bucket in self.buckets:
            differences = {}
            for index, parameter in enumerate(bucket):
                if parameter in held:
                    view, weight = held.pop(parameter)
                    differences[index] = weight - parameter.data
                    parameter.grad, parameter.data = None, view
            device = self.partitions.weight(bucket[0]).device
            parts = self._exchange(bucket).to_holders(differences, torch.float32, device)
            for parameter, part in zip(bucket, parts, strict=True):
                self.partitions.set_gradient(parameter, part)

    def _exchange(self, bucket: Sequence[nn.Parameter]) -> Exchange:
        shapes = [self.partitions.shape(parameter) for parameter in bucket]
        sizes = [self.partitions.sizes[parameter] for parameter in bucket]
        return Exchange(shapes, [self.owners[parameter] for parameter in bucket], sizes)

    def _gather(self, bucket: Sequence[nn.Parameter]) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Whole gradient and weight of every parameter of the bucket that this process owns."""
        exchange, partitions = self._exchange(bucket), self.partitions
        gradients = exchange.to_owners([partitions.gradient(parameter) for parameter in bucket])
        if partitions.stage == 3:
            weights = exchange.to_owners([partitions.weight(parameter) for parameter in bucket])
        else:
            weights = {index: bucket[index].detach() for index in gradients}
        return {bucket[index]: (gradients[index], weights[index]) for index in gradients}
