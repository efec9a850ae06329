"""muP's learning rates: what multiplies each role's rate when the model is m times as wide as its base.

A matrix must move by an operator of norm O(1), whatever the width (A Spectral Condition for Feature Learning,
arXiv 2310.17813). An update of RMS u has the norm

    u d        where it is aligned with the activations, as gradients and their signs or normalized rows are
    u sqrt(d)  where it is orthogonal, all singular values equal

and u itself falls as d^-r: r = 1/2 for Muon's own factor and in `lr_mode: keller` and `rms_to_rms`, 0 for
Adam and in `adam_rms`. So the rate of hidden matrices is multiplied by m^-(a - r) with a = 1 or 1/2, and
weight decay by the inverse, so that lr wd stays. Embeddings, vectors and the head, whose input the model
multiplies by 1/m, keep an update of constant RMS (Tensor Programs V, arXiv 2203.03466). Under `adam_rms`
Muon's rate therefore scales by 1/sqrt(m), unlike Adam's, with which it agrees at one width only. An update
that is orthogonal and then brought to a fixed RMS (SWAN, NorMuon's paper) has no such rule: its norm depends
on the rank of the gradient, hence on the tokens in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from llmnorm.errors import UserError
from llmnorm.optim.roles import Role

Hyper = Mapping[str, Any]


@dataclass(frozen=True)
class Transfer:
    """How a method's update grows: its alignment a, r in `lr_mode: paper`, whether it treats the head, and
    the variants of it that have no rule.
    """

    alignment: float
    decay: Callable[[Hyper], float] = lambda options: 0.0
    treats_head: bool = False
    refused_variants: tuple[str, ...] = ()

    def exponents(self, options: Hyper) -> dict[str, float]:
        """role -> e, its rate being multiplied by m^-e; a role that is absent keeps its own."""
        mode = options.get("lr_mode", "paper")
        decay = self.decay(options) if mode == "paper" else 0.0 if mode == "adam_rms" else 0.5
        exponents = {str(Role.HIDDEN_MATRIX): self.alignment - decay}
        if self.treats_head:
            exponents[str(Role.LM_HEAD)] = -decay
        return exponents


def _in_paper(options: Hyper) -> float:
    return 0.5 if options.get("variant") == "paper" else 0.0


# The others' updates have a size that depends on the data or on the weights, and nothing is shown of them.
TRANSFERS: dict[str, Transfer] = {
    "adamw": Transfer(alignment=1.0),
    "adamp": Transfer(alignment=1.0),
    "muon": Transfer(alignment=0.5, decay=lambda options: 0.5),
    "normuon": Transfer(alignment=0.5, decay=lambda options: 0.5, refused_variants=("paper",)),
    "scale": Transfer(alignment=1.0, decay=_in_paper, treats_head=True),
    "sinkgd": Transfer(alignment=1.0),
}


def lr_multipliers(method: str, options: Hyper, width_multiplier: float) -> dict[str, float]:
    """role -> what multiplies its learning rate; roles that keep theirs are absent.

    Raises `UserError` for a method for which muP is not known to hold.
    """
    if method not in TRANSFERS:
        raise UserError(
            f"optimizer.name={method} has no known rule for model.mup: how its updates grow with the "
            f"width is not established; use {', '.join(TRANSFERS)}, or remove model.mup"
        )
    transfer = TRANSFERS[method]
    if options.get("variant") in transfer.refused_variants:
        raise UserError(
            f"optimizer.variant={options['variant']} of {method} has no rule for model.mup: it fixes the RMS "
            "of an orthogonal update, whose norm then depends on the batch; use variant: released"
        )
    exponents = transfer.exponents(options)
    return {role: width_multiplier**-exponent for role, exponent in exponents.items() if exponent}


def model_width_multiplier(model: nn.Module) -> float | None:
    """m of a model whose config says `mup`, else None; DDP's wrapper is looked through."""
    config: Any = getattr(getattr(model, "module", model), "config", None)
    mup = getattr(config, "mup", None)
    return config.hidden_size / mup["base_hidden_size"] if mup else None


def apply_mup(optimizer: Optimizer, method: str, options: Hyper, model: nn.Module) -> None:
    """Multiply the groups' learning rates, and divide their weight decay, as the model's `mup` asks."""
    multiplier = model_width_multiplier(model)
    if multiplier is None:
        return
    multipliers = lr_multipliers(method, {**optimizer.defaults, **options}, multiplier)
    for group in optimizer.param_groups:
        factor = multipliers.get(group["role"], 1.0)
        group["lr"] *= factor
        group["weight_decay"] /= factor
