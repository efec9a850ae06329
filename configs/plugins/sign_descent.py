"""An optimizer of one's own, as an example.

plugins: [configs/plugins/sign_descent.py]
optimizer: {class_path: sign_descent.SignDescent, lr: 1.0e-4, momentum: 0.9}
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class SignDescent(Optimizer):
    """Signum: m <- b m + (1 - b) g, w <- (1 - lr wd) w - lr sign(m) (signSGD, arXiv 1802.04434)."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be at least 0 and below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(state["momentum"].sign(), alpha=-group["lr"])
