"""Orthogonalization by matrix products: the polar factor U V^T of a matrix U S V^T, without an SVD.

    X <- G / (f ||G||_F)                                   f: safety factor of the coefficient set
    X <- a X + (b A + c A A) X,   A = X X^T                once per (a, b, c)

so that every singular value follows s -> a s + b s^3 + c s^5 towards 1. With `preconditioner="aol"` the first
line is

    X <- diag(d) G / f,   d_i = (sum_j |G G^T|_ij)^(-1/2)      over the shorter side of G

which bounds ||f X||_2 by 1 as well (diagonal dominance), but leaves singular values several times larger and
closer to each other, so that an iteration can be saved; the result is the polar factor of diag(d) G.
Sources: Muon (Keller Jordan, 2024), Polar Express (arXiv 2505.16932), CANS (arXiv 2506.10935), Gram
Newton-Schulz (Zhang, Amsel, Chen, Dao, 2026), Turbo-Muon for AOL (arXiv 2512.04632).
All functions act on the last two dimensions and never write to their input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import llmnorm_kernels as kernels
from llmnorm.errors import UserError

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class CoefficientSet:
    """Coefficients (a, b, c) of successive iterations; the last one repeats for as long as it is asked."""

    triples: tuple[Triple, ...]
    safety: float = 1.0
    # Shrinks the argument of every iteration but the last, so that rounding cannot push a singular value
    # beyond the interval on which the next iteration was fitted; after the last there is no next.
    cushion: float = 1.0

    def schedule(self, steps: int) -> list[Triple]:
        """The coefficients of `steps` iterations."""
        triples = [self.triples[min(index, len(self.triples) - 1)] for index in range(steps)]
        cushioned = [
            (a / self.cushion, b / self.cushion**3, c / self.cushion**5)
            if index < len(self.triples) - 1
            else (a, b, c)
            for index, (a, b, c) in enumerate(triples[:-1])
        ]
        return cushioned + triples[-1:]


COEFFICIENT_SETS: dict[str, CoefficientSet] = {
    "jordan": CoefficientSet(((3.4445, -4.7750, 2.0315),)),
    "you": CoefficientSet(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "polar_express": CoefficientSet(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            (1.875, -1.25, 0.375),
        ),
        safety=1.01,
        cushion=1.01,
    ),
    "cans": CoefficientSet(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        )
    ),
    # Fitted to what the preconditioner leaves of Gaussian matrices. The first polynomial is negative for
    # s > 0.884, and s = 1 is what the preconditioner leaves of a rank-one or an orthogonal gradient: as
    # published the update climbs there. 1.2 keeps s below 0.834.
    "aol": CoefficientSet(
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        safety=1.2,
    ),
}
Coefficients = str | Sequence[float]
Preconditioner = Literal["none", "aol"]


def coefficient_set(
    coefficients: Coefficients, steps: int, preconditioner: Preconditioner = "none"
) -> CoefficientSet:
    """The set of that name, or the one triple (a, b, c) for every iteration.

    Raises `UserError` for an unknown name, for the AOL coefficients without their preconditioner, which would
    meet singular values that they were not fitted to, for something that is not a triple, and for triples
    whose iterations turn a singular value in (0, 1] negative: the update would climb.
    """
    if preconditioner not in PRECONDITIONERS:
        raise UserError(
            f"optimizer.ns_preconditioner={preconditioner!r} is not known; choose one of "
            f"{', '.join(PRECONDITIONERS)}"
        )
    if isinstance(coefficients, str):
        if coefficients == "aol" and preconditioner != "aol":
            raise UserError(
                f"optimizer.ns_coefficients='aol' with optimizer.ns_preconditioner={preconditioner!r}: these "
                "coefficients were fitted to matrices that the AOL preconditioner has scaled, and turn large "
                "singular values of others negative; set optimizer.ns_preconditioner: aol, or "
                "optimizer.ns_coefficients: polar_express"
            )
        if coefficients not in COEFFICIENT_SETS:
            raise UserError(
                f"optimizer.ns_coefficients={coefficients!r} is not a known set; choose one of "
                f"{', '.join(COEFFICIENT_SETS)} or give three numbers (a, b, c)"
            )
        return COEFFICIENT_SETS[coefficients]
    if len(coefficients) != 3:
        raise UserError(
            f"optimizer.ns_coefficients={tuple(coefficients)} must be three numbers (a, b, c) or one of "
            f"{', '.join(COEFFICIENT_SETS)}"
        )
    a, b, c = (float(value) for value in coefficients)
    values = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:]
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
        if not bool((values > 0).all()):
            raise UserError(
                f"optimizer.ns_coefficients={(a, b, c)} turns singular values negative, so that the update "
                "would climb; use coefficients that stay positive on (0, 1], such as "
                f"{COEFFICIENT_SETS['jordan'].triples[0]}"
            )
    return CoefficientSet(((a, b, c),))


def _multiply_add(addend: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """beta addend + alpha left right, in one pass, for one matrix or a batch."""
    product = torch.addmm if addend.ndim == 2 else torch.baddbmm
    return product(addend, left, right, beta=beta, alpha=alpha)


# Below it a product of 16-bit matrices is a handful of tiles, and computing half of them saves nothing.
SYMMETRIC_SIDE = 256


def _has_symmetric_kernel(x: Tensor) -> bool:
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and x.shape[-2] >= SYMMETRIC_SIDE and kernels.runs_triton(x)


def _gram_of(x: Tensor) -> Tensor:
    """X X^T; it is symmetric, so that a kernel computes half of its tiles."""
    return kernels.symmetric_product(x) if _has_symmetric_kernel(x) else x @ x.mT


def _norm(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)


def _frobenius(x: Tensor, safety: float, eps: float, dtype: torch.dtype) -> tuple[Tensor, None]:
    # Division makes a new tensor: `Tensor.to` hands back the same storage when the dtype is right already,
    # and a write in place would then reach the momentum (torch.optim.Muon without Nesterov on bf16 weights).
    return (x / (_norm(x, eps) * safety)).to(dtype), None


# Of the mean square norm of the rows: a row that is only rounding next to the others would otherwise be
# raised to their size. Smaller factors d_i than the equation's keep the bound.
AOL_FLOOR = 1e-4


def _aol(x: Tensor, safety: float, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # d does not depend on the scale of G; rows of norm 1 keep the entries of G G^T within the range of fp16.
    x = (x * (math.sqrt(x.shape[-2]) / _norm(x, eps))).to(dtype)
    gram = _gram_of(x)
    statistics = torch.promote_types(dtype, torch.float32)
    sums = gram.abs().sum(dim=-1, keepdim=True, dtype=statistics)
    d = (sums.clamp(min=AOL_FLOOR).rsqrt() / safety).to(dtype)
    return d * x, d * gram * d.mT


# name -> (matrix on its shorter side, f, eps, working dtype) -> X in that dtype, and X X^T where it is known.
PRECONDITIONERS: dict[str, Callable[[Tensor, float, float, torch.dtype], tuple[Tensor, Tensor | None]]] = {
    "none": _frobenius,
    "aol": _aol,
}


def _standard(x: Tensor, schedule: Sequence[Triple], gram: Tensor | None = None) -> Tensor:
    symmetric = _has_symmetric_kernel(x)
    for a, b, c in schedule:
        gram = _gram_of(x) if gram is None else gram
        if symmetric:  # b A + c A A is symmetric too
            polynomial = kernels.symmetric_product(gram, gram, alpha=c, beta=b)
        else:
            polynomial = _multiply_add(gram, gram, gram, beta=b, alpha=c)
        x, gram = _multiply_add(x, polynomial, x, beta=a), None
    return x


# One restart after two iterations keeps the Gram matrix positive in half precision: without it rounding makes
# eigenvalues slightly negative, which the later iterations blow up.
GRAM_RESTARTS = (2,)


def _gram(
    x: Tensor,
    schedule: Sequence[Triple],
    gram: Tensor | None = None,
    restarts: Sequence[int] = GRAM_RESTARTS,
) -> Tensor:
    """The same polynomial, iterated on the small Gram matrix: X <- Q X with Q and R = X X^T of size k x k."""
    r = x @ x.mT if gram is None else gram
    eye = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    q: Tensor | None = None
    for index, (a, b, c) in enumerate(schedule):
        if index in restarts:
            x = x if q is None else q @ x
            r = x @ x.mT
            q = None
        z = _multiply_add(r, r, r, beta=b, alpha=c)
        q = z + a * eye if q is None else _multiply_add(q, q, z, beta=a)
        if index + 1 < len(schedule) and index + 1 not in restarts:
            rz = _multiply_add(r, r, z, beta=a)
            r = _multiply_add(rz, z, rz, beta=a)
    return x if q is None else q @ x


NewtonSchulzMethod = Literal["standard", "gram"]
METHODS: dict[str, Callable[[Tensor, Sequence[Triple], Tensor | None], Tensor]] = {
    "standard": _standard,
    "gram": _gram,
}


def orthogonalize(
    matrix: Tensor,
    coefficients: Coefficients = "polar_express",
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float32,
    method: NewtonSchulzMethod = "standard",
    preconditioner: Preconditioner = "none",
) -> Tensor:
    """The polar factor of `matrix` (..., m, n), approximately, in `dtype`; scale-free, zero stays zero.

    `method="gram"` computes the same polynomial with fewer products when one side is much longer than the
    other; asked for bf16 it works and answers in fp16. Singular values below about 1e-3 of the Frobenius
    norm stay small. `preconditioner="aol"` gives the polar factor of diag(d) `matrix`, or of `matrix` diag(d)
    where it is tall: the same as without it only where all d_i are equal.
    """
    chosen = coefficient_set(coefficients, steps, preconditioner)
    # bf16 leaves a Gram matrix 8 bits, too few for it to stay positive. No value exceeds 1, so fp16 has range
    # enough and 11 bits.
    half = method == "gram" and dtype is torch.bfloat16
    working = torch.float16 if half else dtype
    x = matrix.to(torch.float32 if half else dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    flat = x if x.ndim <= 3 else x.reshape(-1, *x.shape[-2:])
    scaled, gram = PRECONDITIONERS[preconditioner](flat, chosen.safety, eps, working)
    result = METHODS[method](scaled, chosen.schedule(steps), gram).reshape(x.shape)
    return result.mT if tall else result


def nuclear_norm(matrix: Tensor, steps: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """||A||_* = <A, polar(A)>, shape (..., 1, 1), fp32; within 1 % at 8 Polar Express iterations in fp32."""
    a = matrix.float()
    return (a * orthogonalize(a, "polar_express", steps, dtype=dtype)).sum(dim=(-2, -1), keepdim=True)


def orthogonalize_rows(
    matrix: Tensor, row_blocks: Sequence[int], engine: Callable[[Tensor], Tensor]
) -> Tensor:
    """`engine` on each block of rows by itself: heads of a projection, or the parts of a fused QKV weight.

    `row_blocks` are the heights of the blocks from the top and must add up to the rows of `matrix`.
    """
    if len(set(row_blocks)) == 1:  # equal heights: one batched call
        blocks = matrix.unflatten(-2, (len(row_blocks), row_blocks[0]))
        return engine(blocks).flatten(-3, -2)
    return torch.cat([engine(block) for block in matrix.split(list(row_blocks), dim=-2)], dim=-2)
