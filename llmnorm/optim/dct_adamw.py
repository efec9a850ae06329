"""DCT-AdamW: Adam in the r strongest cosines of the gradient, no SVD (arXiv 2505.17967).

    D the orthonormal DCT-II matrix, D[i, j] = sqrt(2/k) cos(pi i (2j + 1) / (2k)), row 0 over sqrt(2)
    A = G + E                                       E: what the projection dropped, fed back (error_feedback)
    S = A D^T (right) or D A (left)                 k: the smaller dimension
    idx = the r frequencies of largest sum |S|, ascending
    R = S at idx,  E <- A - back(R)
    moments move with their frequency; those of new frequencies start at 0 (`moments: transport`)
    W <- (1 - lr wd) W - lr back(Adam(R))

The basis is shared by all matrices of a width and computed, not stored: 2 max(m, n) r elements and r indices
per matrix, beside E in 8 or 4 bits or whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.optim.lowrank import codec, projects_right, rank_of
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer, SubspaceOptions
from llmnorm.optim.matrix import State
from llmnorm.optim.quantized_state import SMALLEST, Codec
from llmnorm.optim.roles import Role
from llmnorm.optim.rules import ADAMW_ELSEWHERE, Hyper, Rule, count, wide


@functools.cache
def _dct(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    i, j = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * i * (2 * j + 1) / (2 * size))
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """D (size, size) in at least fp32; rows are frequencies."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if like.is_meta:
        return torch.empty(size, size, dtype=dtype, device="meta")
    return _dct(size, dtype, like.device)


def strongest(spectrum: Tensor, rank: int, right: bool) -> Tensor:
    """The indices (..., r), ascending, of the r frequencies of largest l1 norm in S."""
    scores = spectrum.abs().sum(-2 if right else -1)
    return scores.topk(rank, dim=-1).indices.sort(-1).values


def _take(x: Tensor, index: Tensor, right: bool) -> Tensor:
    """The columns (right) or rows (left) of x at `index` (..., r)."""
    if right:
        return x.gather(-1, index.unsqueeze(-2).expand(*x.shape[:-1], index.shape[-1]))
    return x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def _moved(moment: Tensor, old: Tensor, new: Tensor, right: bool) -> Tensor:
    """The average with each kept frequency in its new place and zeros for those that came."""
    place = torch.searchsorted(old, new).clamp_max(old.shape[-1] - 1)
    kept = old.gather(-1, place) == new
    return _take(moment, place, right) * kept.unsqueeze(-2 if right else -1)


def dct_adamw_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """back(Adam(R)), eps after the bias correction."""
    step = count(state)
    right, rank = projects_right(grad.shape, hyper), rank_of(grad.shape, hyper)
    accumulated, feedback = wide(grad), _feedback_codec(grad, hyper)
    if feedback is not None:
        accumulated = accumulated + feedback.read(state, "error", grad)
    basis = dct_matrix(grad.shape[-1 if right else -2], grad)
    spectrum = accumulated @ basis.mT if right else basis @ accumulated

    old = state.get("frequencies")
    index = old.long() if old is not None else None
    if index is None or (step - 1) % hyper["update_proj_gap"] == 0:
        index = strongest(spectrum, rank, right)
        state["frequencies"] = index.int()
    low = _take(spectrum, index, right)
    rows = basis[index]

    def back(x: Tensor) -> Tensor:
        return x @ rows.to(x.dtype) if right else rows.mT.to(x.dtype) @ x

    if feedback is not None:
        feedback.write(state, "error", accumulated - back(low))
    codecs = [codec(grad, low, hyper, signed) for signed in (True, False)]
    first, second = codecs[0].read(state, "exp_avg", low), codecs[1].read(state, "exp_avg_sq", low)
    if old is not None and hyper["moments"] == "transport":
        first, second = (_moved(x, old.long(), index, right) for x in (first, second))
    beta1, beta2 = hyper["betas"]
    first = torch.lerp(first, low.to(first.dtype), 1 - beta1)
    second = beta2 * second + (1 - beta2) * low.to(second.dtype).square()
    codecs[0].write(state, "exp_avg", first)
    codecs[1].write(state, "exp_avg_sq", second)
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    return back((first / bias1) / ((second / bias2).sqrt() + hyper["eps"]))


def _feedback_codec(grad: Tensor, hyper: Hyper) -> Codec | None:
    bits = hyper["error_feedback"]
    if bits == 0:
        return None
    return Codec(32 if grad.shape[-2] * grad.shape[-1] < SMALLEST else bits, grad.dtype, signed=True)


DCT_ADAMW = Rule("dct_adamw", dct_adamw_update)


class DCTAdamW(LowRankOptimizer):
    """DCT-AdamW on hidden matrices, AdamW on the rest.

    `update_proj_gap`: steps between choices of frequencies, 1 as released. `error_feedback`: bits of E, 0 for
    none, 32 for the gradient's dtype.
    """

    subspace_defaults: ClassVar[SubspaceOptions] = SubspaceOptions(
        side="std", moments="transport", state_bits=32
    )
    rules: ClassVar[Mapping[str, Rule]] = {Role.HIDDEN_MATRIX: DCT_ADAMW, **ADAMW_ELSEWHERE}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 1,
        error_feedback: Literal[0, 32, 8, 4] = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **shared: Unpack[SubspaceOptions],
    ):
        options = {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "error_feedback": error_feedback,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, lr, weight_decay, options, shared)

    def _check_group(self, group: Hyper) -> None:
        super()._check_group(group)
        if group["moments"] == "reset":
            raise UserError(
                "optimizer.moments=reset would empty the moments of dct_adamw whenever its cosines "
                "change; choose transport or keep"
            )
