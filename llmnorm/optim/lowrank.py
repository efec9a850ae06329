"""Subspaces of gradients: what GaLore, Fira, APOLLO and their kin share.

A matrix G (m x n) is projected on its input side (right) or its output side (left) by a basis B (r x k):

    right  k = n   R = G B^T  (m x r)   back(R) = R B
    left   k = m   R = B G    (r x n)   back(R) = B^T R

The rows of B are orthonormal, but for `random`, whose entries are N(0, 1/r) and which is never stored: it is
drawn again from (seed, name of the parameter, number of the refresh). Everything acts on the last two
dimensions, in fp32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.errors import UserError
from llmnorm.optim.matrix import State
from llmnorm.optim.quantized_state import SMALLEST, Codec, Packed4, pack_int4, unpack_int4
from llmnorm.optim.random_numbers import normal_like, seed_of
from llmnorm.optim.row_shards import rows_of, shape_of
from llmnorm.optim.rules import Hyper, count, wide

# side -> whether an m x n matrix is projected on its right. std: the smaller dimension; reverse_std: the side
# whose state is smaller; right needs no communication where rows are sharded.
SIDES: dict[str, Callable[[int, int], bool]] = {
    "std": lambda m, n: m >= n,
    "auto": lambda m, n: m <= n,
    "right": lambda m, n: True,
}
_OVERSAMPLING = 8
_LAZY_OVERLAPS = 5
_LAZY_THRESHOLD = 0.4


def projects_right(shape: Sequence[int], hyper: Hyper) -> bool:
    """The side, from the shape of the whole matrix; `ties_left` sends square ones to the left."""
    m, n = shape[-2:]
    return not (m == n and hyper.get("ties_left")) and SIDES[hyper["side"]](m, n)


def project(grad: Tensor, basis: Tensor, right: bool) -> Tensor:
    """R, the gradient in the coordinates of the basis."""
    g = wide(grad)
    basis = basis.to(g.dtype)
    return g @ basis.mT if right else basis @ g


def back(low: Tensor, basis: Tensor, right: bool) -> Tensor:
    """R as a matrix of the parameter's shape again."""
    basis = basis.to(low.dtype)
    return low @ basis if right else basis.mT @ low


def canonical(basis: Tensor) -> Tensor:
    """Each row with the sign that makes its entry of largest magnitude positive.

    Singular vectors have no sign of their own, and moments that survive a refresh feel it: without this rule
    two LAPACK builds differ in the second digit of an update.
    """
    largest = basis.gather(-1, basis.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -basis, basis)


def _svd(x: Tensor, rank: int, seed: int, old: Tensor | None) -> Tensor:
    return torch.linalg.svd(x, full_matrices=False)[2][..., :rank, :]


def _gram(x: Tensor, rank: int, seed: int, old: Tensor | None) -> Tensor:
    # Only directions matter; without the scale a small gradient squared would underflow.
    scaled = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return torch.linalg.eigh(scaled.mT @ scaled).eigenvectors.flip(-1)[..., :rank].mT


def _randomized(x: Tensor, rank: int, seed: int, old: Tensor | None) -> Tensor:
    """Range finder with one power iteration (Finding Structure with Randomness, arXiv 0909.4061)."""
    k = min(rank + _OVERSAMPLING, *x.shape[-2:])
    sketch = x @ normal_like(x.new_empty(*x.shape[:-2], x.shape[-1], k), seed)
    sketch = torch.linalg.qr(x @ (x.mT @ torch.linalg.qr(sketch)[0]))[0]
    return torch.linalg.svd(sketch.mT @ x, full_matrices=False)[2][..., :rank, :]


def _power(x: Tensor, rank: int, seed: int, old: Tensor | None) -> Tensor:
    """One power iteration from the basis at hand; the first basis is that of `randomized`."""
    if old is None:
        return _randomized(x, rank, seed, old)
    return torch.linalg.qr(x.mT @ (x @ old.to(x.dtype).mT))[0].mT


# How the right basis of x (rows, k) is found: (x, rank, seed, old basis) -> (rank, k) with orthonormal rows.
FINDERS: dict[str, Callable[[Tensor, int, int, Tensor | None], Tensor]] = {
    "svd": _svd,
    "gram": _gram,
    "randomized": _randomized,
    "power": _power,
}
RANDOM = "random"
PROJECTIONS = (*FINDERS, RANDOM)


def find_basis(grad: Tensor, right: bool, rank: int, hyper: Hyper, seed: int, old: Tensor | None) -> Tensor:
    """B of this gradient, with canonical signs; that of a zero gradient is the old one, if there is one."""
    x = wide(grad) if right else wide(grad).mT
    try:
        basis = canonical(FINDERS[hyper["projection"]](x, rank, seed, old))
    except torch.linalg.LinAlgError as error:
        raise UserError(
            f"{hyper['name']}: no basis of its gradient was found ({error}); gradients that are not finite "
            "must not reach step(): skip such steps, or lower the learning rate"
        ) from error
    if old is None:
        return basis
    return torch.where((grad == 0).all(-1, keepdim=True).all(-2, keepdim=True), old.to(basis.dtype), basis)


def random_basis(grad: Tensor, right: bool, rank: int, seed: int) -> Tensor:
    """Independent N(0, 1/r) entries, the same for every matrix of a stack."""
    k = grad.shape[-1 if right else -2]
    return normal_like(wide(grad.new_empty(0)).new_empty(rank, k), seed) / math.sqrt(rank)


class Subspace(NamedTuple):
    """A basis, its side, and how moments move to it if it is new: C = B_new B_old^T, else None."""

    basis: Tensor
    right: bool
    change: Tensor | None = None

    def project(self, grad: Tensor) -> Tensor:
        return project(grad, self.basis, self.right)

    def back(self, low: Tensor) -> Tensor:
        return back(low, self.basis, self.right)

    def carry(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Moments in the new coordinates: m C^T and v (C*C)^T, which stays positive."""
        if self.change is None:
            return first, second
        c = self.change.to(first.dtype)
        if self.right:
            return first @ c.mT, second @ (c * c).mT
        return c @ first, (c * c) @ second


def rank_of(shape: Sequence[int], hyper: Hyper) -> int:
    return min(hyper["rank"], *shape[-2:])


def turn_of(name: str, gap: int) -> int:
    """By how many steps a parameter of this name refreshes earlier than without `stagger`."""
    return seed_of(name) % gap


def standing_subspace(grad: Tensor, state: State, hyper: Hyper, step: int) -> Subspace | None:
    """The subspace of step `step` (counted from 1) where it needs no gradient: None where it is to be found.

    Bases are found again every `update_proj_gap` steps. With `stagger`, parameters take turns instead of all
    refreshing at once. Of `grad` only the shape and dtype are read.
    """
    shape = shape_of(grad, hyper)
    right, rank = projects_right(shape, hyper), rank_of(shape, hyper)
    gap = hyper["update_proj_gap"]
    turn = turn_of(hyper["name"], gap) if hyper["stagger"] else 0
    if hyper["projection"] == RANDOM:
        seed = seed_of(hyper["seed"], hyper["name"], (step - 1 + turn) // gap)
        basis = random_basis(grad.new_empty(1).expand(*grad.shape[:-2], *shape), right, rank, seed)
        if not right:
            # Of the rows that this process holds; B G is then its part of a sum over all of them.
            basis = basis.narrow(-1, hyper.get("first_row", 0), grad.shape[-2])
        return Subspace(basis, right)
    old = _read_basis(state, grad.shape[-1 if right else -2])
    if old is None:
        return None
    due = step >= int(state["next_refresh"]) if hyper["lazy_refresh"] else (step - 1 + turn) % gap == 0
    return None if due else Subspace(old, right)


def subspace(grad: Tensor, state: State, hyper: Hyper, step: int) -> Subspace:
    """The subspace of step `step`, found from this gradient where it is due.

    With `lazy_refresh`, the gap doubles while the overlap |B_old B_new^T|^2 / r stays at 0.4 or above over
    five refreshes: a rule like Q-GaLore's (arXiv 2407.08296), which looks at the first vector alone and
    mistakes a sign for a change.
    """
    standing = standing_subspace(grad, state, hyper, step)
    if standing is not None:
        return standing
    shape = shape_of(grad, hyper)
    right, rank = projects_right(shape, hyper), rank_of(shape, hyper)
    old = _read_basis(state, grad.shape[-1 if right else -2])
    seed = seed_of(hyper["seed"], hyper["name"], step)
    new = find_basis(grad, right, rank, hyper, seed, old)
    old = None if old is None else old.to(new.dtype)
    if hyper["lazy_refresh"]:
        _plan_refresh(state, hyper, step, old, new)
    new = _write_basis(state, new, hyper["projection_bits"])
    if old is None or hyper["moments"] == "keep":
        return Subspace(new, right)
    change = new @ old.mT if hyper["moments"] == "transport" else new.new_zeros(rank, rank)
    return Subspace(new, right, change)


def _plan_refresh(state: State, hyper: Hyper, step: int, old: Tensor | None, new: Tensor) -> None:
    gap = state.setdefault("refresh_gap", torch.tensor(hyper["update_proj_gap"]))
    overlaps = state.setdefault("overlaps", torch.zeros(_LAZY_OVERLAPS))
    earlier = 0
    if old is None and hyper["stagger"]:
        earlier = turn_of(hyper["name"], hyper["update_proj_gap"])
    elif old is not None:
        overlap = (new @ old.mT).square().sum((-2, -1)).mean() / new.shape[-2]
        overlaps.copy_(torch.cat((overlaps[1:], overlap.reshape(1).to(overlaps))))
        # An overlap is positive, so a zero is a place that no refresh has filled.
        if bool((overlaps > 0).all()) and float(overlaps.mean()) >= _LAZY_THRESHOLD:
            gap.mul_(2)
    state["next_refresh"] = step + gap - earlier


def _read_basis(state: State, columns: int) -> Tensor | None:
    if "basis_codes" in state:
        packed = Packed4(state["basis_codes"], state["basis_scale"], state["basis_zero"])
        return unpack_int4(packed, columns)
    return state.get("basis")


def _write_basis(state: State, basis: Tensor, bits: int) -> Tensor:
    if bits != 4:
        state["basis"] = basis.contiguous()
        return state["basis"]
    packed = pack_int4(basis)
    state["basis_codes"], state["basis_scale"], state["basis_zero"] = packed
    return unpack_int4(packed, basis.shape[-1]).to(basis.dtype)


def _projected(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Subspace, Tensor]:
    """The subspace of this step and R in it: those that `projected_sums` hands over, or the gradient's."""
    if "projected" in hyper:
        space, low = hyper["projected"]
        return space, low
    space = subspace(grad, state, hyper, step)
    return space, space.project(grad)


class LowRankMoments(NamedTuple):
    """R of a gradient and Adam's two averages of it, with both bias corrections 1 - b^t."""

    low: Tensor
    first: Tensor
    second: Tensor
    bias1: float
    bias2: float
    space: Subspace

    @property
    def correction(self) -> float:
        """sqrt(1 - b2^t) / (1 - b1^t), which the released code multiplies the whole update with."""
        return self.bias2**0.5 / self.bias1

    def uncorrected(self, eps: float) -> Tensor:
        """M / (sqrt(V) + eps)."""
        return self.first / (self.second.sqrt() + eps)

    def corrected(self, eps: float) -> Tensor:
        """(M / (1 - b1^t)) / (sqrt(V / (1 - b2^t)) + eps)."""
        return (self.first / self.bias1) / ((self.second / self.bias2).sqrt() + eps)


def low_rank_moments(grad: Tensor, state: State, hyper: Hyper) -> LowRankMoments:
    """R of this step and Adam's averages of it."""
    step = count(state)
    space, low = _projected(grad, state, hyper, step)
    return moments_of(low, grad, state, hyper, space, step)


def moments_of(
    low: Tensor, grad: Tensor, state: State, hyper: Hyper, space: Subspace, step: int
) -> LowRankMoments:
    """M <- b1 M + (1 - b1) R and V <- b2 V + (1 - b2) R^2 of R = `low` in the subspace of this step."""
    codecs = [codec(grad, low, hyper, signed, cut=space.right) for signed in (True, False)]
    first = codecs[0].read(state, "exp_avg", low)
    second = codecs[1].read(state, "exp_avg_sq", low)
    first, second = space.carry(first, second)
    beta1, beta2 = hyper["betas"]
    first = torch.lerp(first, low.to(first.dtype), 1 - beta1)
    second = beta2 * second + (1 - beta2) * low.to(second.dtype).square()
    codecs[0].write(state, "exp_avg", first)
    codecs[1].write(state, "exp_avg_sq", second)
    return LowRankMoments(low, first, second, 1 - beta1**step, 1 - beta2**step, space)


def keeps_plain_moments(hyper: Hyper) -> bool:
    """Whether `fused_moments` serves: moments neither in few bits nor carried to a new basis."""
    return hyper["state_bits"] == 32 and hyper["moments"] == "keep"


class FusedMoments(NamedTuple):
    """N of the step (empty if not asked for), the norms of N and R by channel [m] or [n], both in fp32, the
    subspace, and both bias corrections 1 - b^t. A channel is a row of R (m x r), a column of R (r x n).
    """

    direction: Tensor
    adam_squares: Tensor
    low_squares: Tensor
    space: Subspace
    bias1: float
    bias2: float

    @property
    def correction(self) -> float:
        return self.bias2**0.5 / self.bias1


def fused_moments(
    grad: Tensor, state: State, hyper: Hyper, *, corrected: bool, direction: bool
) -> FusedMoments:
    """`low_rank_moments`, its N and the squares of its channels in one pass over R."""
    step = count(state)
    space, low = _projected(grad, state, hyper, step)
    low = low.contiguous()
    beta1, beta2 = hyper["betas"]
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    dtype = torch.float32 if hyper["state_dtype"] == "fp32" else grad.dtype
    for key in ("exp_avg", "exp_avg_sq"):
        if key not in state:
            state[key] = torch.zeros_like(low, dtype=dtype)
    made = kernels.low_rank_moments_(
        low,
        state["exp_avg"],
        state["exp_avg_sq"],
        betas=(beta1, beta2),
        eps=hyper["eps"],
        bias_corrections=(bias1, bias2) if corrected else (1.0, 1.0),
        dim=1 if space.right else 0,
        direction=direction,
    )
    n, adam_squares, low_squares = made
    return FusedMoments(n, adam_squares, low_squares, space, bias1, bias2)


def add_back_(weight: Tensor, low: Tensor, space: Subspace, *, lr: float, decay: float) -> None:
    """W <- decay W - lr back(low), one product that accumulates into W: nothing of its size is made."""
    low, basis = low.to(weight.dtype), space.basis.to(weight.dtype)
    left, right = (low, basis) if space.right else (basis.mT, low)
    weight.addmm_(left, right, beta=decay, alpha=-lr)


def codec(grad: Tensor, held: Tensor, hyper: Hyper, signed: bool, cut: bool = True) -> Codec:
    """How an average of the size of `held` is kept: in `state_bits` unless it is small. `cut`: where it has
    as many rows as `grad`, they are cut like those."""
    dtype = torch.float32 if hyper["state_dtype"] == "fp32" else grad.dtype
    # An average that is cut by rows counts as a whole one, or shards would keep other bits than it.
    by_rows = cut and held.shape[-2] == grad.shape[-2]
    rows = rows_of(grad, hyper) if by_rows else held.shape[-2]
    small = rows * held.shape[-1] < SMALLEST
    return Codec(32 if small else hyper["state_bits"], dtype, signed)
