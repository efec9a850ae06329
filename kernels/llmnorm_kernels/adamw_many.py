"""AdamW on many tensors in one launch: norm gains and biases are hundreds of tensors of a few kilobytes, each
of which a launch of its own would cost more than its bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_betas
from .dispatch import operator, register, runs_triton
from .optimizer_steps import adamw_reference, check_grad_scale, check_moments, check_step

register(
    "adamw_many_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor? grad_scale, float lr, float beta1, float beta2, float eps, float decay, "
    "float bias_correction1, float bias_correction2_root) -> ()",
    "adamw_many_kernels:launch_adamw_many",
    lambda *args: None,
)


@operator
@torch.no_grad()
def adamw_many_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], *, step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, weight_decay: float = 0.0, grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """`adamw_` on each of `params`, in one launch for each combination of dtypes, with floating moments.

    All tensors are on one device; they share step, learning rate and decay. The kernel finds them through a
    table of addresses, which is made again only when one of them changes. Bytes moved: as `adamw_`. Raises
    ValueError for lists of unequal length, for tensors on several devices, and as `adamw_`.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, given in lists.items():
        if len(given) != len(params):
            raise ValueError(f"{name} has {len(given)} tensors but params has {len(params)}")
    if step < 1:
        raise ValueError(f"step={step} must count from 1")
    check_betas(betas)
    check_grad_scale(grad_scale, params[0] if params else None)
    alike: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = {}
    for four in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        check_step(four[0], four[1], lr, weight_decay, eps, None)
        check_moments(four[0], four[2], four[3], None)
        if four[0].device != params[0].device:
            raise ValueError(
                f"params are on {params[0].device} and {four[0].device}; call once for each device"
            )
        if four[2].dtype != four[3].dtype or four[2].dtype == torch.float64:
            raise ValueError(
                f"exp_avgs and exp_avg_sqs have dtypes {four[2].dtype}, {four[3].dtype}; give one of float32 "
                "or 16 bits"
            )
        alike.setdefault(tuple(x.dtype for x in four), []).append(four)
    numbers = (
        float(lr), *map(float, betas), float(eps), 1.0 - lr * weight_decay, 1.0 - betas[0] ** step,
        math.sqrt(1.0 - betas[1] ** step),
    )  # fmt: skip
    for members in alike.values():
        if runs_triton(members[0][0]):
            columns = [list(column) for column in zip(*members, strict=True)]
            torch.ops.llmnorm_kernels.adamw_many_(*columns, grad_scale, *numbers)
            continue
        for param, grad, m, v in members:
            adamw_reference(param, grad, m, v, None, None, None, grad_scale, *numbers)
