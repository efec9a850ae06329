"""Bounds on singular values: pure functions W -> f(W) on whole matrices (..., m, n).

Each keeps the singular vectors, W = U S V^T -> U f(S) V^T, and the dtype. Source: Training Transformers with
Enforced Lipschitz Constants (arXiv 2507.13338). Exact ones compute in fp64 on the smaller Gram matrix, never
by power iteration, whose answer is too small and would let a singular value through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from llmnorm.optim.newton_schulz import orthogonalize

# Beyond k = 81/62 of the limit no soft cap is monotone on [0, k]; there p(k) = 62/81 k.
LARGEST_EXCESS = 81 / 62

# x <- a x + b x^3 + c x^5 in turn: min(1, x) to 0.034 on [0, 3.5], and at most OVERSHOOT there.
HARD_CAP = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)
OVERSHOOT = 1.0109
# Above 3.5 the polynomial turns negative, then diverges; larger matrices are scaled down to it first.
HARD_CAP_RANGE = 3.0

STIEFEL_STEPS = 16  # singular values from 1e-6 of the Frobenius norm on arrive at 1 in fp32


def _flat(weight: Tensor) -> tuple[Tensor, bool]:
    """fp64, with no more rows than columns, and whether it was transposed for that."""
    tall = weight.shape[-2] > weight.shape[-1]
    return (weight.mT if tall else weight).double(), tall


def _restored(flat: Tensor, tall: bool, like: Tensor) -> Tensor:
    return (flat.mT if tall else flat).to(like.dtype)


def _rescaled(weight: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """U diag(factor(s)) s V^T, where factor maps the singular values (..., k), ascending, to multipliers."""
    flat, tall = _flat(weight)
    squares, vectors = torch.linalg.eigh(flat @ flat.mT)
    change = factor(squares.clamp_min(0).sqrt()) - 1
    return _restored(flat + (vectors * change.unsqueeze(-2)) @ (vectors.mT @ flat), tall, weight)


def spectral_norm(weight: Tensor) -> Tensor:
    """The largest singular value (...), in fp64, exact to rounding."""
    flat, _ = _flat(weight)
    return torch.linalg.eigvalsh(flat @ flat.mT)[..., -1].clamp_min(0).sqrt()


def spectral_norm_bound(weight: Tensor, doublings: int = 4) -> Tensor:
    """An upper bound ||(W W^T)^p||_F^(1/2p), p = 2^doublings, of the largest singular value (...), in fp64.

    At most rank^(1/4p) times too large, at the cost of `doublings` + 1 products of the smaller side.
    """
    flat, _ = _flat(weight)
    power = flat @ flat.mT
    log = torch.zeros(power.shape[:-2], dtype=torch.float64, device=power.device)
    for doubling in range(doublings + 1):
        norm = torch.linalg.matrix_norm(power)
        log += norm.log() / 2 ** (doubling + 1)
        power = power / norm.clamp_min(torch.finfo(torch.float64).tiny)[..., None, None]
        if doubling < doublings:
            power = power @ power
    return log.exp()


def is_within(weight: Tensor, limit: float) -> bool:
    """Whether every singular value is below `limit`, to rounding in fp64: then, and only then, has
    limit^2 I - W W^T a Cholesky factor, which costs much less than eigenvalues.
    """
    flat, _ = _flat(weight)
    rest = torch.diag_embed(torch.full(flat.shape[:-1], limit**2, dtype=flat.dtype, device=flat.device))
    return not bool(torch.linalg.cholesky_ex(rest - flat @ flat.mT).info.any())


def hard_cap(weight: Tensor, limit: float) -> Tensor:
    """s -> min(s, limit), exactly; `weight` itself where no s is above."""
    if is_within(weight, limit):
        return weight
    return _rescaled(weight, lambda s: limit / s.clamp_min(limit))


def polynomial(weight: Tensor) -> Tensor:
    """The four polynomials of HARD_CAP in turn; right for singular values up to 3.5 only."""
    flat, tall = (weight.mT, True) if weight.shape[-2] > weight.shape[-1] else (weight, False)
    for a, b, c in HARD_CAP:
        gram = flat @ flat.mT
        flat = a * flat + (b * gram + c * gram @ gram) @ flat
    return flat.mT if tall else flat


def polynomial_cap(weight: Tensor, limit: float) -> Tensor:
    """About s -> min(s, limit), never above limit, by matrix products alone.

    Small singular values shrink by 6 % each time, so it suits updates that are large, such as Muon's.
    """
    scaled = weight.float() / limit
    excess = (spectral_norm_bound(scaled) / HARD_CAP_RANGE).clamp_min(1.0).float()
    return (polynomial(scaled / excess[..., None, None]) * (limit / OVERSHOOT)).to(weight.dtype)


@lru_cache(maxsize=4096)
def soft_cap_alpha(reach: float, limit: float) -> float:
    """The least alpha >= 0 whose soft cap p maps `reach` to `limit`; 0 where reach <= limit.

    With u = alpha reach^2, p(reach) / reach = 1 - 3 u^2 + 3 u^3 - u^4, which falls from 1 to 62/81 on
    [0, 1/3], just where p is monotone on [0, reach]. Raises ValueError for reach > 81/62 limit.
    """
    if reach <= limit:
        return 0.0
    if reach > LARGEST_EXCESS * limit:
        raise ValueError(f"no monotone soft cap maps {reach:g} to {limit:g}: {reach:g} > 81/62 of it")
    low, high = 0.0, 1 / 3
    for _ in range(60):
        u = (low + high) / 2
        low, high = (u, high) if 1 - 3 * u**2 + 3 * u**3 - u**4 > limit / reach else (low, u)
    return high / reach**2


def soft_cap(weight: Tensor, alpha: float) -> Tensor:
    """s -> p(s) = y + alpha y^3, y = s - alpha s^3: four products, in fp32 or the weight's fp64."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tall = weight.shape[-2] > weight.shape[-1]
    flat = (weight.mT if tall else weight).to(dtype)
    for sign in (-alpha, alpha):
        flat = flat + sign * (flat @ flat.mT) @ flat
    return _restored(flat, tall, weight)


def normalize(weight: Tensor, limit: float) -> Tensor:
    """W / max(1, s_1 / limit); `weight` itself where no s is above."""
    if is_within(weight, limit):
        return weight
    excess = (spectral_norm(weight) / limit).clamp_min(1.0)
    return (weight.double() / excess[..., None, None]).to(weight.dtype)


def _only_largest(s: Tensor, value: Tensor) -> Tensor:
    """Multipliers that move the last of the ascending s to `value` and no other; a zero matrix stays."""
    factors = torch.ones_like(s)
    largest = s[..., -1]
    factors[..., -1] = torch.where(largest > 0, value / largest.clamp_min(1e-300), 1.0)
    return factors


def hammer(weight: Tensor, limit: float) -> Tensor:
    """W + (limit - s_1) u_1 v_1^T: the largest singular value becomes `limit`, be it above or below."""
    return _rescaled(weight, lambda s: _only_largest(s, torch.full_like(s[..., -1], limit)))


def spectral_decay(weight: Tensor, amount: float) -> Tensor:
    """W - amount s_1 u_1 v_1^T."""
    return _rescaled(weight, lambda s: _only_largest(s, (1 - amount) * s[..., -1]))


def stiefel(weight: Tensor, value: float) -> Tensor:
    """value U V^T, every singular value the same, by Newton-Schulz in fp32."""
    return (value * orthogonalize(weight.float(), "polar_express", STIEFEL_STEPS)).to(weight.dtype)


def cap_rows(weight: Tensor, limit: float) -> Tensor:
    """Each row times min(1, limit / RMS(row)), computed in fp32."""
    rows = weight.float()
    rms = rows.square().mean(dim=-1, keepdim=True).sqrt()
    return (rows * (limit / rms.clamp_min(limit))).to(weight.dtype)
