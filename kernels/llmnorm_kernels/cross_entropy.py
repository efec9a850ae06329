"""Cross entropy of logits in one read each way, with z-loss, soft cap, ignored targets and token weights.

l = softcap * tanh(logits / softcap)  (or the logits)      lse = log sum_v exp(l_v)
loss_t = w_t (lse - l_target + z_loss lse^2)               z-loss: PaLM, arXiv 2204.02311; cap: Gemma 2, arXiv
2408.00118
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_choice, check_floats, check_given, check_numbers
from .dispatch import accumulator, operator, register, runs_triton

REDUCTIONS = ("mean", "sum", "none")
INTEGERS = (torch.int64, torch.int32)


def token_losses_reference(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float
) -> Tensor:
    """(rows,) losses in the accumulator dtype, zero where ignored: the specification."""
    capped = logits.to(accumulator(logits.dtype))
    if softcap > 0.0:
        capped = softcap * torch.tanh(capped / softcap)
    keep = target != ignore_index
    lse = torch.logsumexp(capped, -1)
    picked = capped.gather(-1, torch.where(keep, target, 0).long().unsqueeze(-1)).squeeze(-1)
    return torch.where(keep, lse - picked + z_loss * lse * lse, 0.0)


def reduce_losses(losses: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """mean divides by the number of targets that are not ignored, also where tokens are weighted."""
    if reduction == "none":
        return losses.view(target.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


def _fake_forward(logits, target, ignore_index, softcap, z_loss):
    rows = logits.shape[0]
    acc = accumulator(logits.dtype)
    return logits.new_empty(rows, dtype=acc), logits.new_empty(rows, dtype=acc)


def _fake_backward(up, logits, target, lse, ignore_index, softcap, z_loss):
    return logits.new_empty(logits.shape)


register(
    "cross_entropy_forward(Tensor logits, Tensor target, int ignore_index, float softcap, float z_loss) "
    "-> (Tensor, Tensor)",
    "cross_entropy_kernels:launch_cross_entropy",
    _fake_forward,
)
register(
    "cross_entropy_backward(Tensor up, Tensor logits, Tensor target, Tensor lse, int ignore_index, "
    "float softcap, float z_loss) -> Tensor",
    "cross_entropy_kernels:launch_cross_entropy_backward",
    _fake_backward,
)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, softcap: float, z_loss: float
    ) -> Tensor:
        losses, lse = torch.ops.llmnorm_kernels.cross_entropy_forward(
            logits, target, ignore_index, softcap, z_loss
        )
        ctx.save_for_backward(logits, target, lse)
        ctx.options = (ignore_index, softcap, z_loss)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up: Tensor) -> Any:
        logits, target, lse = ctx.saved_tensors
        dlogits = torch.ops.llmnorm_kernels.cross_entropy_backward(up, logits, target, lse, *ctx.options)
        return dlogits, None, None, None, None


def check_targets(
    target: Tensor,
    rows: torch.Size,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    weights: Tensor | None,
    reduction: str,
) -> None:
    """The rules that both cross entropies share; `rows` is the shape that the targets must have."""
    if target.dtype not in INTEGERS:
        raise ValueError(f"target has dtype {target.dtype}; it takes int64 or int32 token ids")
    if target.shape != rows:
        raise ValueError(f"target has shape {tuple(target.shape)}; it must be {tuple(rows)}, one id per row")
    if softcap is not None and not (isinstance(softcap, (int, float)) and softcap > 0.0):
        raise ValueError(f"softcap={softcap!r} must be positive, or None for no cap")
    check_numbers(z_loss=z_loss)
    if not isinstance(ignore_index, int):
        raise ValueError(
            f"ignore_index={ignore_index!r} must be an integer, the id that stands for no target"
        )
    if weights is not None and weights.shape != rows:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; it must be {tuple(rows)}, one per target"
        )
    if weights is not None and weights.requires_grad:
        raise ValueError("weights requires a gradient, which is not computed; pass weights.detach()")
    check_choice("reduction", reduction, REDUCTIONS)


@operator
def cross_entropy(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, softcap: float | None = None,
    z_loss: float = 0.0, weights: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The module's loss over `target`: weighted negative log-likelihood plus z-loss, in float32.

    logits: (..., vocabulary); target: (...) ids, `ignore_index` where there is none; weights: (...) or None.
    reduction: "sum", "mean" (over the targets not ignored, whatever their weights) or "none" (shape of
    target). A target outside the vocabulary gives NaN on the kernel path and an index error in the reference.
    Bytes moved, T x V logits of B bytes: T V B forward, 2 T V B backward. Raises ValueError for shapes,
    dtypes, devices, softcap, z_loss or reduction out of range.
    """
    check_given(logits=logits, target=target)
    check_floats(logits=logits, weights=weights)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; its last dimension is the vocabulary")
    check_targets(target, logits.shape[:-1], ignore_index, softcap, z_loss, weights, reduction)
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device} but logits is on {logits.device}; move them together")
    rows = logits.reshape(-1, logits.shape[-1])
    given = (rows, target.reshape(-1), ignore_index, softcap or 0.0, float(z_loss))
    losses = _TokenLosses.apply(*given) if runs_triton(logits) else token_losses_reference(*given)
    if weights is not None:
        losses = losses * weights.reshape(-1)
    return reduce_losses(losses, target, ignore_index, reduction)
