"""One update: forward and backward over micro-batches, the token-exact loss, the clipped gradient, the step.

    loss = (1/n) sum_i -ln p(y_i | x_<=i)      over the n valid targets of ALL micro-batches of ALL processes

n is known before the first forward pass, so every micro-batch contributes its exact share and accumulation,
batch split and process count change nothing but rounding. With `train.loss_reweighting` the gradient is that
of the reweighted loss (`reweighting.py`), which needs every sample's loss first: one more forward pass,
unless the process has a single micro-batch. The loss that is returned is the unweighted one all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from llmnorm.config import LossReweightingSection
from llmnorm.modeling.batch_statistics import commit_statistics, defer_statistics, drop_statistics
from llmnorm.optim import Clipping, Penalty, project_gradients, qk_clip_of, route_parameters
from llmnorm.training.gradient_noise import GradientSquares, gradient_variance
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.reweighting import global_weights

IGNORED = -100  # label of a position that is not scored


class Measured(NamedTuple):
    """What one update's forward and backward found, over all processes.

    grad_norm: None where only `apply` will find it. gradient_variance: Var(g) where it was asked for.
    weight_entropy: of the samples' weights, in [0, 1].
    """

    loss: float
    grad_norm: float | None
    tokens: int
    stop_requested: bool
    gradient_variance: float | None = None
    weight_entropy: float | None = None


class Gradients(NamedTuple):
    """What `Update` knows on the device once the gradients are there: this process's share of the loss, the
    weights' entropy, the norm before clipping, and the sum of squares of the micro-batches' gradients.
    """

    loss: Tensor
    entropy: Tensor
    norm: Tensor | None
    squares: Tensor | None


class Update:
    """Computes gradients for one step's batch, then applies or drops them."""

    def __init__(
        self,
        model: ParallelModel,
        optimizer: Optimizer,
        grad_clip: float | None,
        clipping: Clipping | None = None,
        penalties: Sequence[Penalty] = (),
    ) -> None:
        """`grad_clip` limits the global norm; another kind of clipping comes as `clipping` in its stead. The
        gradients of `penalties` join the loss's; the loss that is told is without them.
        """
        self.penalties = penalties
        self.model = model
        self.optimizer = optimizer
        self.grad_clip = None if clipping else grad_clip
        self.clipping = clipping
        self.qk_clip = qk_clip_of(optimizer)
        self.parameters = route_parameters(model.module)
        defer_statistics(model.module)
        self._squares: GradientSquares | None = None
        self.found_norm: float | None = None  # what `apply` found where `measure` could not

    def measure(
        self,
        micro_batches: list[dict[str, Tensor]],
        wants_to_stop: Callable[[], bool] = lambda: False,
        *,
        reweighting: LossReweightingSection | None = None,
        variance: bool = False,
        see_gradients: Callable[..., None] = lambda *norms: None,
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
        found = self._gradients(batches, tokens, reweighting, variance, see_gradients)
        total, entropy, norm, squares = found
        square = torch.zeros_like(total) if squares is None else squares
        stops = torch.full_like(total, wants_to_stop(), dtype=torch.float64)
        shared = processes.sum(torch.stack([total.double(), stops, square.double()]))
        known = torch.zeros_like(shared[0]) if norm is None else norm.double()
        numbers = torch.cat([shared, torch.stack([known, tokens.double(), entropy])]).tolist()
        loss, stop, square_sum, grad_norm, count, weight_entropy = numbers
        parts = len(batches) * processes.world_size
        return Measured(
            loss,
            None if norm is None else grad_norm,
            int(count),
            stop > 0,
            gradient_variance(square_sum, grad_norm, parts) if variance else None,
            None if reweighting is None else weight_entropy,
        )

    def _gradients(
        self,
        batches: list[dict[str, Tensor]],
        tokens: Tensor,
        reweighting: LossReweightingSection | None,
        variance: bool,
        see_gradients: Callable[..., None],
    ) -> Gradients:
        """Accumulate the gradients of all micro-batches and clip them."""
        squares = self._gradient_squares(variance)
        entropy = torch.ones((), dtype=torch.float64, device=self.model.processes.device)
        if reweighting is None:
            total = self._backward(batches, tokens)
        else:
            total, entropy = self._backward_reweighted(batches, tokens, reweighting)
        square = None if squares is None else squares.stop()
        self.model.sum_whole_gradients()
        self.model.add_penalties(self.penalties)
        project_gradients(self.model.module)
        see_gradients()
        norm = self.model.clip_gradients(self.grad_clip)
        if self.clipping:
            self.clipping.clip(self.parameters, norm)
        return Gradients(total, entropy, norm, square)

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
                objective, total, entropy = self._forward(batches[0], tokens, options)
                self.model.backward(objective)
            return total, entropy
        with torch.no_grad():
            losses = [self._sample_losses(batch) for batch in batches]
        drop_statistics(self.model.module)  # the pass with gradients records them
        shares, entropy = self._shares(losses, batches, options)
        for index, (batch, share) in enumerate(zip(batches, shares, strict=True)):
            with self.model.accumulating(last=index == len(batches) - 1):
                self.model.backward((self._sample_losses(batch) * share).sum() / tokens)
        return torch.cat(losses).sum() / tokens, entropy

    def _forward(
        self, batch: dict[str, Tensor], tokens: Tensor, reweighting: LossReweightingSection | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of an update of one micro-batch: what to differentiate, the unweighted loss, and the entropy."""
        if reweighting is None:
            loss = self._loss(batch, tokens)
            return loss, loss.detach().float(), torch.ones_like(loss.detach(), dtype=torch.float64)
        samples = self._sample_losses(batch)
        (share,), entropy = self._shares([samples.detach()], [batch], reweighting)
        return (samples * share).sum() / tokens, samples.detach().sum() / tokens, entropy

    def _shares(
        self, losses: list[Tensor], batches: list[dict[str, Tensor]], options: LossReweightingSection
    ) -> tuple[list[Tensor], Tensor]:
        """What multiplies each sample's loss, micro-batch by micro-batch, and the weights' entropy."""
        counts = torch.cat([(batch["labels"] != IGNORED).sum(dim=-1) for batch in batches])
        multipliers, entropy = global_weights(torch.cat(losses), counts, options, self.model.processes)
        return list(multipliers.float().split([len(loss) for loss in losses])), entropy

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
        self.set_rates(lr_multiplier)
        seconds = self._timed_step(timed)
        self.settle()
        return seconds

    def set_rates(self, lr_multiplier: float) -> None:
        """Each group's learning rate, from its peak."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier

    def settle(self) -> None:
        """What follows the optimizer's step: weights that must obey something, running statistics."""
        self.model.project(self.optimizer)
        commit_statistics(self.model.module)
        self.drop()

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
