"""The AOL preconditioner: its equation, its bound, and gradients along which its coefficients would climb."""

from __future__ import annotations

import pytest
import torch

from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer
from llmnorm.optim.lanton import LANTON
from llmnorm.optim.muon import Muon
from llmnorm.optim.newton_schulz import COEFFICIENT_SETS, PRECONDITIONERS, orthogonalize
from llmnorm.optim.normuon import NorMuon
from llmnorm.optim.spectral_constraints import largest_output

DOUBLE = torch.float64
AOL = {"coefficients": "aol", "steps": 4, "preconditioner": "aol"}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def orthonormal_rows(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(random(columns, rows))[0].T


# Rows of Gaussian matrices are nearly orthogonal; the bound is tight for rank one and for orthogonal rows.
MATRICES = {
    "gaussian": random(16, 48),
    "square": random(24, 24),
    "correlated rows": random(16, 48) + 3 * random(1, 48, seed=1),
    "rows of all sizes": random(16, 48) * torch.logspace(-3, 3, 16, dtype=DOUBLE)[:, None],
    "rank one": random(16, 1) @ random(1, 48, seed=1),
    "orthogonal": orthonormal_rows(16, 48),
    "diagonal": torch.diag(random(12)),
}
TIGHT = ("rank one", "orthogonal", "diagonal")


def by_definition(g: torch.Tensor, factor: float) -> torch.Tensor:
    """diag(d) G / f with d_i = (sum_j |G G^T|_ij)^(-1/2)."""
    return (g @ g.T).abs().sum(1).rsqrt()[:, None] * g / factor


@pytest.mark.parametrize("name", MATRICES)
def test_o1_the_preconditioner_is_its_equation_and_bounds_the_spectral_norm_by_one(name):
    g = MATRICES[name]
    if name == "rows of all sizes":  # there the floor makes d smaller than the equation's
        scaled, gram = PRECONDITIONERS["aol"](g, 1.0, 1e-30, DOUBLE)
        assert (scaled.norm(dim=1) <= by_definition(g, 1.0).norm(dim=1) * (1 + 1e-12)).all()
    else:
        scaled, gram = PRECONDITIONERS["aol"](g, 1.0, 1e-30, DOUBLE)
        torch.testing.assert_close(scaled, by_definition(g, 1.0), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gram, scaled @ scaled.T, rtol=0, atol=1e-14)
    norm = torch.linalg.matrix_norm(scaled, 2).item()
    assert norm <= 1 + 1e-12
    if name in TIGHT:
        assert norm == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("name", [name for name in MATRICES if name != "rows of all sizes"])
def test_o2_orthogonalization_is_the_polynomial_of_the_scaled_matrix_s_singular_values(name, method):
    """From the SVD of diag(d) G / f, evaluated on its singular values: neither form's products."""
    chosen = COEFFICIENT_SETS["aol"]
    u, s, vh = torch.linalg.svd(by_definition(MATRICES[name], chosen.safety), full_matrices=False)
    for a, b, c in chosen.schedule(4):
        s = a * s + b * s**3 + c * s**5
    got = orthogonalize(MATRICES[name], **AOL, dtype=DOUBLE, method=method)
    torch.testing.assert_close(got, u @ torch.diag(s) @ vh, rtol=0, atol=1e-10)


# The composition of the four polynomials on [0.03, 1] / 1.2, in fp64.
RANGE = (0.987, 1.0405)


@pytest.mark.parametrize("method", ["standard", "gram"])
# bf16 rounds products at 2^-9; the slopes of the four polynomials multiply such errors by up to 5 each.
@pytest.mark.parametrize("dtype, slack", [(DOUBLE, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_o3_singular_values_land_in_the_range_of_the_set(method, dtype, slack):
    values = torch.logspace(-0.7, 0, 24, dtype=DOUBLE)
    g = orthonormal_rows(24, 24).T @ torch.diag(values) @ orthonormal_rows(24, 80)
    scaled = by_definition(g, 1.0)
    assert torch.linalg.svdvals(scaled).min() > 0.03
    got = torch.linalg.svdvals(orthogonalize(g, **AOL, dtype=dtype, method=method).double())
    assert RANGE[0] - slack <= got.min() and got.max() <= RANGE[1] + slack
    assert largest_output("aol", 4, 0.0, "aol") == pytest.approx(1.0841, abs=1e-3)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TIGHT)
def test_gradients_on_which_the_bound_is_tight_descend_where_published_coefficients_climb(
    name, dtype, method
):
    """s = 1: the first published polynomial gives -0.585, and odd polynomials keep the sign."""
    g = MATRICES[name].float()
    s = 1.0
    for a, b, c in COEFFICIENT_SETS["aol"].triples:
        s = a * s + b * s**3 + c * s**5
    assert s < -0.9
    got = orthogonalize(g, **AOL, dtype=dtype, method=method).float()
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    rank = 1 if name == "rank one" else min(g.shape)
    along = (u.T @ got @ vh.T).diagonal()[:rank]
    # p(1 / 1.2) = 1.0001 after four iterations; in bf16 the first loses 2^-9 times a slope of 5.
    assert ((along - 1).abs() < 0.06).all()


def test_symmetries_that_the_preconditioner_leaves():
    g = random(12, 30, seed=3)

    def orth(x):
        return orthogonalize(x, **AOL, dtype=DOUBLE)

    rotation = torch.linalg.qr(random(30, 30, seed=4))[0]
    order, signs = torch.randperm(12), torch.tensor([1.0, -1.0], dtype=DOUBLE).repeat(6)[:, None]
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(orth(1e-3 * g), orth(g), **close)
    torch.testing.assert_close(orth(g.T), orth(g).T, **close)
    torch.testing.assert_close(orth(g @ rotation), orth(g) @ rotation, **close)
    torch.testing.assert_close(orth((signs * g)[order]), (signs * orth(g))[order], **close)
    stack = torch.stack([g, 2 * g.flip(0)])
    torch.testing.assert_close(orth(stack), torch.stack([orth(g), orth(g).flip(0)]), **close)


@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_and_a_row_of_rounding_is_not_raised_to_the_size_of_the_others(method, dtype):
    options = {**AOL, "dtype": dtype, "method": method}
    assert torch.equal(orthogonalize(torch.zeros(4, 6), **options).float(), torch.zeros(4, 6))
    g = random(8, 24).float()
    g[0], g[1] = 0, 1e-7 * g[1]
    got = orthogonalize(g, **options).float()
    assert got.isfinite().all() and got[0].eq(0).all()
    # 100 from the floor and 87 from the four slopes at 0, of 1e-7 of the other rows.
    assert got[1].norm() < 2e-3 * got[2].norm()


def test_the_smallest_singular_values_of_gaussian_gradients_are_larger_than_without_it():
    g = random(64, 256, seed=5)
    smallest = {
        name: torch.linalg.svdvals(PRECONDITIONERS[name](g, 1.0, 1e-30, DOUBLE)[0]).min().item()
        for name in ("none", "aol")
    }
    assert smallest["aol"] > 3 * smallest["none"]


@pytest.mark.parametrize("method", [Muon, NorMuon, LANTON])
def test_methods_pass_the_preconditioner_to_the_engine(method):
    """Two runs of one step, equal gradients: what changes is the preconditioner alone."""
    moved = {}
    for preconditioner in ("none", "aol"):
        weight = torch.zeros(12, 30, requires_grad=True)
        options = {"ns_coefficients": "you", "ns_steps": 4, "ns_dtype": "fp32"}
        optimizer = method([weight], lr=1.0, **options, ns_preconditioner=preconditioner)
        weight.grad = MATRICES["correlated rows"][:12, :30].float()
        optimizer.step()
        options = {"coefficients": "you", "steps": 4, "preconditioner": preconditioner}
        direction = -orthogonalize(weight.grad, **options)
        moved[preconditioner] = weight.detach()
        if method is not NorMuon:  # whose rows are normalized after it
            scale = (moved[preconditioner] / direction).median()
            torch.testing.assert_close(moved[preconditioner], scale * direction, rtol=1e-4, atol=1e-5)
    assert (moved["none"] - moved["aol"]).norm() > 0.01 * moved["none"].norm()


def test_coefficients_without_their_preconditioner_are_refused(llama):
    with pytest.raises(UserError, match=r"ns_coefficients='aol' .*set optimizer.ns_preconditioner: aol, or"):
        create_optimizer("muon", llama(), lr=0.02, ns_coefficients="aol")
    with pytest.raises(UserError, match=r"ns_preconditioner='jacobi' is not known; choose one of none, aol"):
        create_optimizer("muon", llama(), lr=0.02, ns_preconditioner="jacobi")
