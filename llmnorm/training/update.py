"""One update: forward and backward over micro-batches, the token-exact loss, the clipped gradient, the step.

    loss = (1/n) sum_i -ln p(y_i | x_<=i)      over the n valid targets of ALL micro-batches of ALL processes

n is known before the first forward pass, so every micro-batch contributes its exact share and accumulation,
batch split and process count change nothing but rounding. With `train.loss_reweighting` the gradient is that
of the reweighted loss (`reweighting.py`), which needs every sample's loss first: one more forward pass,
unless the process has a single micro-batch. The loss that is returned is the unweighted one all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from llmnorm.config import LossReweightingSection
from llmnorm.modeling.batch_statistics import commit_statistics, defer_statistics, drop_statistics
from llmnorm.optim import Clipping, project_gradients, qk_clip_of, route_parameters
from llmnorm.training.gradient_noise import GradientSquares, gradient_variance
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.reweighting import global_weights

IGNORED = -100  # label of a position that is not scored


class Measured(NamedTuple):
    """What one update's forward and backward found, over all processes.

    gradient_variance: Var(g) where it was asked for. weight_entropy: of the samples' weights, in [0, 1].
    """

    loss: float
    grad_norm: float
    tokens: int
    stop_requested: bool
    gradient_variance: float | None = None
    weight_entropy: float | None = None


class Update:
    """Computes gradients for one step's batch, then applies or drops them."""

    def __init__(
        self,
        model: ParallelModel,
        optimizer: Optimizer,
        grad_clip: float | None,
        clipping: Clipping | None = None,
    ) -> None:
        """`grad_clip` limits the global norm; another kind of clipping comes as `clipping` in its stead."""
        self.model = model
        self.optimizer = optimizer
        self.grad_clip = None if clipping else grad_clip
        self.clipping = clipping
        self.qk_clip = qk_clip_of(optimizer)
        self.parameters = route_parameters(model.module)
        defer_statistics(model.module)
        self._squares: GradientSquares | None = None

    def measure(
        self,
        micro_batches: list[dict[str, Tensor]],
        wants_to_stop: Callable[[], bool] = lambda: False,
        *,
        reweighting: LossReweightingSection | None = None,
        variance: bool = False,
        see_gradients: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Leave the clipped gradient in `p.grad`; return loss and gradient norm (before clipping).

        Reading them is the step's one synchronization with the device. `wants_to_stop` is asked at the end,
        and one process's yes stops all. `variance` asks for the gradient's, which takes two micro-batches or
        more over all processes and not FSDP2. `see_gradients` is called once the gradients are summed over
        micro-batches and processes, before they are clipped.
        """
        if self.qk_clip:
            self.qk_clip.forget()  # a dropped update leaves its logits behind
        processes = self.model.processes
        device = processes.device
        valid = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        # A filled scalar and not a copied one: a copy from pageable memory would wait for the device.
        tokens = processes.sum(torch.full((), valid, dtype=torch.int64, device=device))
        batches = [
            {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            for batch in micro_batches
        ]
        squares = self._gradient_squares(variance)
        entropy = torch.ones((), dtype=torch.float64, device=device)
        if reweighting is None:
            total = self._backward(batches, tokens)
        else:
            total, entropy = self._backward_reweighted(batches, tokens, reweighting)
        square = torch.zeros_like(total) if squares is None else squares.stop()
        self.model.sum_whole_gradients()
        project_gradients(self.model.module)
        see_gradients()
        norm = self.model.clip_gradients(self.grad_clip)
        if self.clipping:
            self.clipping.clip(self.parameters, norm)
        stops = torch.full_like(total, wants_to_stop(), dtype=torch.float64)
        shared = processes.sum(torch.stack([total.double(), stops, square.double()]))
        numbers = torch.cat([shared, torch.stack([norm.double(), tokens.double(), entropy])]).tolist()
        loss, stop, square_sum, grad_norm, count, weight_entropy = numbers
        parts = len(batches) * processes.world_size
        return Measured(
            loss,
            grad_norm,
            int(count),
            stop > 0,
            gradient_variance(square_sum, grad_norm, parts) if variance else None,
            None if reweighting is None else weight_entropy,
        )

    def _gradient_squares(self, wanted: bool) -> GradientSquares | None:
        if not wanted:
            return None
        if self._squares is None:
            parameters = self.model.module.parameters()
            self._squares = GradientSquares(parameters, self.model.processes.device)
        self._squares.start()
        return self._squares

    def _backward(self, batches: list[dict[str, Tensor]], tokens: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss; returns this process's share of the loss."""
        total = torch.zeros((), dtype=torch.float32, device=self.model.processes.device)
        for index, batch in enumerate(batches):
            with self.model.accumulating(last=index == len(batches) - 1):
                loss = self._loss(batch, tokens)
                self.model.backward(loss)
            total += loss.detach()
        return total

    def _backward_reweighted(
        self, batches: list[dict[str, Tensor]], tokens: Tensor, options: LossReweightingSection
    ) -> tuple[Tensor, Tensor]:
        """Accumulate the reweighted gradient; returns the share of the unweighted loss, and the entropy."""
        if len(batches) == 1:
            with self.model.accumulating(last=True):
                losses = [self._sample_losses(batches[0])]
        else:
            with torch.no_grad():
                losses = [self._sample_losses(batch) for batch in batches]
            drop_statistics(self.model.module)  # the pass with gradients records them
        found = torch.cat([loss.detach() for loss in losses])
        counts = torch.cat([(batch["labels"] != IGNORED).sum(dim=-1) for batch in batches])
        multipliers, entropy = global_weights(found, counts, options, self.model.processes)
        shares = multipliers.float().split([len(loss) for loss in losses])
        for index, (batch, share) in enumerate(zip(batches, shares, strict=True)):
            with self.model.accumulating(last=index == len(batches) - 1):
                samples = losses[0] if len(batches) == 1 else self._sample_losses(batch)
                self.model.backward((samples * share).sum() / tokens)
        return found.sum() / tokens, entropy

    def _loss(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """This micro-batch's sum of negative log-likelihoods over the step's `tokens`."""
        labels = batch["labels"]
        with self.model.autocast():
            output = self.model(
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=tokens,
                return_logits=False,
                **_inputs(batch),
            )
        return output.loss

    def _sample_losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Each row's sum of negative log-likelihoods: float32 [B]."""
        with self.model.autocast():
            logits = self.model(**_inputs(batch)).logits
        labels = batch["labels"]
        scores = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return scores.view_as(labels).sum(dim=-1)

    def apply(self, lr_multiplier: float, timed: bool = False) -> float | None:
        """Move the weights, then make them obey what their modules ask for (`optim/constraints.py`); each
        group's rate is its own peak times the schedule's multiplier. Then running statistics move.

        Returns the seconds that the optimizer took: always on a CPU, where nothing has to be waited for, and
        on other devices where `timed` asks for them.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
        seconds = self._timed_step(timed)
        self.model.project(self.optimizer)
        commit_statistics(self.model.module)
        self.drop()
        return seconds

    def _timed_step(self, timed: bool) -> float | None:
        device = self.model.processes.device
        if device.type != "cpu" and not timed:
            self.model.step(self.optimizer)
            return None
        # The device is idle here, as `measure` has read its numbers, so only the end must be waited for.
        began = time.perf_counter()
        self.model.step(self.optimizer)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began

    def drop(self) -> None:
        """Forget the gradients, and what running statistics would have taken from this step."""
        drop_statistics(self.model.module)
        self.model.drop_gradients(self.optimizer)


def _inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the model reads of a micro-batch, without its labels."""
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    return {**inputs, "use_cache": False}
