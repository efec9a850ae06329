"""AdamW: Decoupled Weight Decay Regularization (arXiv 1711.05101), as `torch.optim.AdamW`.

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2
    w <- (1 - lr wd) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

State: m and v in the dtype of the parameter (fp32 unless the weights themselves are bf16), and the count t.
torch's optimizer makes the step, but for bf16 weights that are rounded stochastically, or whose moments are
fp32: those are `MatrixAdamW`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch.optim import Optimizer

from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.option_ranges import Options
from llmnorm.optim.roles import Role, RoutedParameter
from llmnorm.optim.rules import Rule, adam_direction, fused_adam

# Devices with a fused kernel in every supported torch; elsewhere torch takes its for-each path by itself.
_FUSED_DEVICES = {"cpu", "cuda"}


def adamw_state_bytes(parameter: torch.Tensor) -> int:
    """Bytes of m, v and the step count for one parameter, summed over processes."""
    return 2 * parameter.numel() * parameter.element_size() + torch.float32.itemsize


def adamw_groups(
    parameters: Sequence[RoutedParameter], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """One parameter group per role present, named, with weight decay on everything but vectors."""
    groups = []
    for role in Role:
        members = [(routed.name, routed.parameter) for routed in parameters if routed.role is role]
        if members:
            decay = 0.0 if role is Role.VECTOR else weight_decay
            group = {"params": members, "lr": lr, "weight_decay": decay, "role": str(role), "method": "adamw"}
            groups.append(group)
    return groups


class MatrixAdamW(MatrixOptimizer):
    """AdamW on every parameter with what torch's lacks: `state_dtype` and `stochastic_rounding`."""

    rules: ClassVar[Mapping[str, Rule]] = dict.fromkeys(
        Role, Rule("adamw", adam_direction, elementwise=True, fused=fused_adam)
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **shared: Unpack[Options],
    ):
        super().__init__(params, lr, weight_decay, {"betas": betas, "eps": eps}, shared)


def build_adamw(
    parameters: Sequence[RoutedParameter],
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    state_dtype: Literal["param", "fp32"] = "param",
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> Optimizer:
    """`torch.optim.AdamW` over all parameters, fused where their device has a fused kernel; `MatrixAdamW` for
    stochastic rounding, and for fp32 moments of other weights.
    """
    groups = adamw_groups(parameters, lr, weight_decay)
    wide = all(routed.parameter.dtype == torch.float32 for routed in parameters)
    if stochastic_rounding or (state_dtype == "fp32" and not wide):
        own: Options = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding, "seed": seed}
        return MatrixAdamW(groups, lr, weight_decay, betas=betas, eps=eps, **own)
    fused = all(routed.parameter.device.type in _FUSED_DEVICES for routed in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused or None)
