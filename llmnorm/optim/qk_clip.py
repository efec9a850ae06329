"""QK-clip, the second half of MuonClip (Kimi K2, arXiv 2507.20534): attention logits stay below a threshold.

After every step, for each head h whose largest logit S_h of the step's batch exceeded tau:

    gamma_h = tau / S_h        W_q[h] <- sqrt(gamma_h) W_q[h],   W_k[h] <- sqrt(gamma_h) W_k[h]

S_h is the maximum over micro-batches and processes, taken in the forward pass, hence before the step. Where
query heads share a key head (GQA, which the paper does not treat), scaling the shared rows would also change
the logits of heads below tau, so each query head takes its own whole gamma_h and the keys none. Momenta stay
as they are. Heads below tau are multiplied by exactly 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from llmnorm.errors import UserError
from llmnorm.optim.matrix import local, scatter


class QKClip:
    """Clips the attention logits of `model` at `threshold` after every step of the optimizer it follows.

    An attention module takes part if it has `track_max_logits()`, which makes it keep `max_logits` [H];
    `logit_obstacle()`, a sentence that says why its logits cannot be scaled, or None; and
    `logit_factors(gamma)`, the parameters whose rows to multiply, with the factor of each row.

    Nothing needs saving: what is gathered for a step is used in it. Raises `UserError` for a threshold that
    is not above 0, and for a model without such modules or with one that has an obstacle.
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        if not threshold > 0:
            raise UserError(
                f"optimizer.qk_clip={threshold!r} must be greater than 0, or null for no clipping"
            )
        named = [(name, module) for name, module in model.named_modules() if hasattr(module, "logit_factors")]
        if not named:
            raise UserError(
                f"optimizer.qk_clip={threshold} needs attention modules that know their largest logit, and "
                f"{type(model).__name__} has none; use softmax attention of LlmNormForCausalLM, or remove "
                "optimizer.qk_clip"
            )
        self.threshold = threshold
        self.attentions: list[Any] = [module for _, module in named]
        self.largest: Tensor | None = None  # [layers, H] of the last step
        for name, module in named:
            obstacle = module.logit_obstacle()
            if obstacle is not None:
                raise UserError(f"optimizer.qk_clip={threshold} cannot scale {name}: {obstacle}")
        self.forget()

    def follow(self, optimizer: Optimizer) -> None:
        """Clip after each of its steps from now on."""
        optimizer.register_step_post_hook(lambda *_: self.clip())
        optimizer.qk_clip = self  # type: ignore[attr-defined]

    def forget(self) -> None:
        """Start anew: the next step sees the logits of the forward passes from here on."""
        for attention in self.attentions:
            attention.track_max_logits()

    @torch.no_grad()
    def clip(self) -> None:
        """Scale what exceeded the threshold; collective where there are several processes. Does not wait for
        the device.
        """
        largest = torch.stack([attention.max_logits for attention in self.attentions])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        gamma = self.threshold / largest.clamp(min=self.threshold)
        for attention, factors in zip(self.attentions, gamma, strict=True):
            for parameter, rows in attention.logit_factors(factors):
                shaped = rows.to(parameter.device).view(-1, *[1] * (parameter.ndim - 1))
                local(parameter).mul_(local(scatter(shaped, parameter)))
        self.largest = largest
        self.forget()


def qk_clip_of(optimizer: Optimizer) -> QKClip | None:
    """The clip that follows `optimizer`, if any."""
    return getattr(optimizer, "qk_clip", None)
