"""One update without a gradient buffer: `optimizer.fused_backward`.

Each parameter moves during the backward pass and its gradient is freed (`optim/fused_backward.py`). What has
to be known before the first parameter moves decides how many passes there are:

    grad_clip_mode             passes    known before a weight moves
    global, zclip              two       loss, gradient norm: clipping and guards are those of a plain update
    per_parameter, agc, null   one       loss; each parameter's gradient when it arrives

Two passes: the first frees every gradient once its norm is taken, the second, with the same random numbers,
scales each gradient by the factor that follows and applies it (LOMO, arXiv 2306.09782). The weights are those
of a plain update to the last bit, for twice the arithmetic. One pass: where the loss is finite and a gradient
is not, that parameter and all that come after it in the backward pass rest, while those before it have
moved; the update is logged as skipped and counts towards `guards.non_finite_limit`.

Several micro-batches (galore only) are summed in the coordinates of its subspaces (`optim/projected_sums.py`)
and move the weights after the last of them, so that loss and norm are known before. The norm, by which they
are clipped, is that of what is summed: within the subspaces, and whole for embedding, head and vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmnorm.config import LossReweightingSection, RunConfig, check_batch, planned_stages
from llmnorm.errors import UserError
from llmnorm.modeling.batch_statistics import drop_statistics
from llmnorm.optim import (
    Clipping,
    RoutedParameter,
    fused_backward_of,
    mean_free_parameters,
    project_gradient,
)
from llmnorm.optim.clipping import ZClip
from llmnorm.optim.projected_sums import ProjectedSums
from llmnorm.optim.registry import sums_projections
from llmnorm.training.parallel import ParallelModel, clip_factor, tensor_norms
from llmnorm.training.update import Gradients, Update

# Modes of clipping that treat each parameter by itself, so that one pass is enough.
ONE_PASS = ("per_parameter", "agc")


def check_fused_backward(config: RunConfig, strategy: str, processes: int) -> None:
    """Raise `UserError` for what an update inside the backward pass cannot honor."""
    if not config.optimizer.fused_backward:
        return
    if strategy != "none":
        raise UserError(
            f"optimizer.fused_backward=true does not work with parallel.strategy={strategy}: a gradient that "
            "arrives in the backward pass is not yet summed over processes, or is a shard; train with one "
            "process, or remove it"
        )
    for stage in planned_stages(config):
        batch = check_batch(config, processes, stage.global_batch_size)
        if batch.accumulation_steps > 1:
            _check_accumulation(config, batch.accumulation_steps, batch.micro_batch_size)


def _check_accumulation(config: RunConfig, micro_batches: int, size: int) -> None:
    method, train = config.optimizer.method, config.train
    if not sums_projections(method):
        raise UserError(
            "optimizer.fused_backward=true moves the weights in every backward pass, so it cannot "
            f"accumulate the {micro_batches} micro-batches of train.micro_batch_size={size}: {method} needs "
            "whole gradients, and only galore's projections can be summed; lower train.global_batch_size to "
            "train.micro_batch_size, choose optimizer.name: galore, or remove it"
        )
    if train.grad_clip is not None and train.grad_clip_mode in ONE_PASS:
        raise UserError(
            f"train.grad_clip_mode={train.grad_clip_mode} reads whole gradients, and "
            f"optimizer.fused_backward=true with {micro_batches} micro-batches per update holds projected "
            "ones; set train.grad_clip_mode: global, or train.grad_clip: null"
        )
    if train.batch_schedule is not None and train.batch_schedule.name == "norm_test":
        raise UserError(
            "train.batch_schedule.name=norm_test compares whole gradients of micro-batches, which "
            "optimizer.fused_backward=true does not hold; remove the one or the other"
        )


class _Batch(NamedTuple):
    """What both passes of an update read."""

    batch: dict[str, Tensor]
    tokens: Tensor
    reweighting: LossReweightingSection | None
    see_gradients: Callable[..., None]


class FusedUpdate(Update):
    """`Update` for an optimizer with `fused_backward`: `measure` moves nothing, `apply` makes the pass that
    does.
    """

    def __init__(
        self,
        model: ParallelModel,
        optimizer: Optimizer,
        grad_clip: float | None,
        clipping: Clipping | None = None,
        mode: str = "global",
    ) -> None:
        super().__init__(model, optimizer, grad_clip, clipping)
        fused = fused_backward_of(optimizer)
        assert fused is not None
        self.fused = fused
        self.two_passes = grad_clip is not None and mode not in ONE_PASS
        self.sums: ProjectedSums | None = None  # of the update at hand, where it has several micro-batches
        self.routed: dict[Tensor, RoutedParameter] = {routed.parameter: routed for routed in self.parameters}
        self.mean_free = mean_free_parameters(model.module)
        self._norms: dict[Tensor, Tensor] = {}
        self._batch: _Batch | None = None
        self._objective: Tensor | None = None
        self._factor: Tensor | None = None
        self._random: list[Tensor] = []
        self._broken = False

    def _gradients(
        self,
        batches: list[dict[str, Tensor]],
        tokens: Tensor,
        reweighting: LossReweightingSection | None,
        variance: bool,
        see_gradients: Callable[..., None],
    ) -> Gradients:
        """The loss, and in two passes the gradient's norm; every gradient is gone again."""
        assert not variance, "refused by check_fused_backward"
        if len(batches) > 1:
            return self._summed(batches, tokens, reweighting, see_gradients)
        self._batch = _Batch(batches[0], tokens, reweighting, see_gradients)
        if not self.two_passes:
            self._objective, total, entropy = self._forward(batches[0], tokens, reweighting)
            return Gradients(total, entropy, None, None)
        self._random = _random_state(self.model.processes.device)
        objective, total, entropy = self._forward(batches[0], tokens, reweighting)
        with self.fused.receiving(self._note):
            objective.backward()
        del objective
        drop_statistics(self.model.module)  # the second pass records them
        norm = self._take_norms(see_gradients)
        self._factor = self._whole_factor(norm)
        return Gradients(total, entropy, norm, None)

    def _summed(
        self,
        batches: list[dict[str, Tensor]],
        tokens: Tensor,
        reweighting: LossReweightingSection | None,
        see_gradients: Callable[..., None],
    ) -> Gradients:
        """The sums of several micro-batches, clipped by their norm, left in `sums`."""
        self.sums = ProjectedSums(self.fused)
        with self.fused.receiving(self._add):
            if reweighting is None:
                total = self._backward(batches, tokens)
                entropy = torch.ones_like(total, dtype=torch.float64)
            else:
                total, entropy = self._backward_reweighted(batches, tokens, reweighting)
        totals = self.sums.totals
        self._norms = dict(zip(totals, tensor_norms(list(totals.values())), strict=True))
        norm = self._take_norms(see_gradients)
        if self.two_passes:
            factor = self._whole_factor(norm)
            for held in totals.values():
                held.mul_(factor)
        return Gradients(total, entropy, norm, None)

    @torch.no_grad()
    def _add(self, parameter: Tensor) -> None:
        assert parameter.grad is not None and self.sums is not None
        if parameter in self.mean_free:
            project_gradient(parameter.grad)
        self.sums.add(parameter)

    def _whole_factor(self, norm: Tensor) -> Tensor:
        """What every gradient is multiplied by, for a gradient of this norm."""
        if isinstance(self.clipping, ZClip):
            return self.clipping.factor(norm).to(self.parameters[0].parameter.dtype)
        assert self.grad_clip is not None
        return clip_factor(norm, self.grad_clip)

    def apply(self, lr_multiplier: float, timed: bool = False) -> float | None:
        """The backward pass that moves the weights, and what follows a step.

        `found_norm` is then the gradient's norm where only this pass has found it; the update was broken off
        (see the module) if that is not finite. The optimizer's time is not apart from the backward pass's.
        """
        self.set_rates(lr_multiplier)
        if self.sums is not None:
            self.sums.move()
            self.found_norm = None
            self.optimizer.step()
            self.settle()
            return None
        assert self._batch is not None, "measured before"
        if self.two_passes:
            _restore_random_state(self._random, self.model.processes.device)
            objective, _, _ = self._forward(*self._batch[:3])
        else:
            assert self._objective is not None
            objective, self._objective = self._objective, None
        self._broken = False
        with self.fused.receiving(self._clip_and_move):
            objective.backward()
        see_gradients = self._batch.see_gradients
        self.found_norm = None if self.two_passes else float(self._take_norms(see_gradients))
        self.optimizer.step()
        self.settle()
        return None

    def drop(self) -> None:
        """Forget what `measure` has left for `apply`."""
        super().drop()
        self._batch = self._objective = self._factor = self.sums = None
        self._norms.clear()

    @torch.no_grad()
    def _note(self, parameter: Tensor) -> None:
        """The norm of a gradient before clipping."""
        assert parameter.grad is not None
        if parameter in self.mean_free:
            project_gradient(parameter.grad)
        (self._norms[parameter],) = tensor_norms([parameter.grad])

    def _take_norms(self, see_gradients: Callable[..., None]) -> Tensor:
        """||g|| of the pass that has just ended, summed in the order of a plain update."""
        see_gradients(self._norms)
        ordered = [self._norms[p] for p in self.model.module.parameters() if p in self._norms]
        self._norms = {}
        return torch.linalg.vector_norm(torch.stack(ordered))

    @torch.no_grad()
    def _clip_and_move(self, parameter: Tensor) -> None:
        if not self.two_passes:
            self._note(parameter)
            self._broken = self._broken or not bool(self._norms[parameter].isfinite())
            if self._broken:
                return
            if self.clipping is not None:
                self.clipping.clip([self.routed[parameter]], self._norms[parameter])
        else:
            assert parameter.grad is not None and self._factor is not None
            if parameter in self.mean_free:
                project_gradient(parameter.grad)
            parameter.grad.mul_(self._factor)
        self.fused.move(parameter)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _restore_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
