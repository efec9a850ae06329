"""One update: forward and backward over micro-batches, the token-exact loss, the clipped gradient, the step.

    loss = (1/n) sum_i -ln p(y_i | x_<=i)      over the n valid targets of ALL micro-batches of ALL processes

n is known before the first forward pass, so every micro-batch contributes its exact share and accumulation,
batch split and process count change nothing but rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmnorm.modeling.batch_statistics import commit_statistics, defer_statistics, drop_statistics
from llmnorm.optim import Clipping, project_weights, qk_clip_of, route_parameters
from llmnorm.training.parallel import ParallelModel

IGNORED = -100  # label of a position that is not scored


class Measured(NamedTuple):
    """What one update's forward and backward found, over all processes."""

    loss: float
    grad_norm: float
    tokens: int
    stop_requested: bool


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

    def measure(
        self, micro_batches: list[dict[str, Tensor]], wants_to_stop: Callable[[], bool] = lambda: False
    ) -> Measured:
        """Leave the clipped gradient in `p.grad`; return loss and gradient norm (before clipping).

        Reading them is the step's one synchronization with the device. `wants_to_stop` is asked at the end,
        and one process's yes stops all.
        """
        if self.qk_clip:
            self.qk_clip.forget()  # a dropped update leaves its logits behind
        processes = self.model.processes
        device = processes.device
        valid = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        # A filled scalar and not a copied one: a copy from pageable memory would wait for the device.
        tokens = processes.sum(torch.full((), valid, dtype=torch.int64, device=device))
        total = torch.zeros((), dtype=torch.float32, device=device)
        for index, batch in enumerate(micro_batches):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with self.model.accumulating(last=index == len(micro_batches) - 1):
                loss = self._loss(batch, tokens)
                loss.backward()
            total += loss.detach()
        self.model.sum_whole_gradients()
        norm = self.model.clip_gradients(self.grad_clip)
        if self.clipping:
            self.clipping.clip(self.parameters, norm)
        shared = torch.stack([total.double(), torch.full_like(total, wants_to_stop(), dtype=torch.float64)])
        numbers = torch.cat([processes.sum(shared), torch.stack([norm.double(), tokens.double()])]).tolist()
        return Measured(numbers[0], numbers[2], int(numbers[3]), numbers[1] > 0)

    def _loss(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        """This micro-batch's sum of negative log-likelihoods over the step's `tokens`."""
        labels = batch["labels"]
        more: dict[str, Any] = {}
        if "position_ids" in batch:
            more["position_ids"] = batch["position_ids"]
        with self.model.autocast():
            output = self.model(
                input_ids=batch["input_ids"],
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=tokens,
                use_cache=False,
                return_logits=False,
                **more,
            )
        return output.loss

    def apply(self, lr_multiplier: float, timed: bool = False) -> float | None:
        """Move the weights, then make them obey what their modules ask for (`optim/constraints.py`); each
        group's rate is its own peak times the schedule's multiplier. Then running statistics move.

        Returns the seconds that the optimizer took: always on a CPU, where nothing has to be waited for, and
        on other devices where `timed` asks for them.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier
        seconds = self._timed_step(timed)
        project_weights(self.model.module)
        commit_statistics(self.model.module)
        self.drop()
        return seconds

    def _timed_step(self, timed: bool) -> float | None:
        device = self.model.processes.device
        if device.type != "cpu" and not timed:
            self.optimizer.step()
            return None
        # The device is idle here, as `measure` has read its numbers, so only the end must be waited for.
        began = time.perf_counter()
        self.optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - began

    def drop(self) -> None:
        """Forget the gradients, and what running statistics would have taken from this step."""
        drop_statistics(self.model.module)
        self.optimizer.zero_grad(set_to_none=True)
