"""The arithmetic of the certificate against published and derived numbers, and against the functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from llmnorm.evaluation.lipschitz_bounds import (
    ACTIVATIONS,
    Bound,
    Matrix,
    added,
    floor_norm,
    gated_mlp,
    head_slope,
    joined,
    plain_mlp,
    published_attention,
)
from llmnorm.evaluation.singular_values import (
    ROUNDING,
    gram_bound,
    largest_difference_of_rows,
    largest_singular_value,
    rms_to_rms,
)

HIDDEN, HEADS, HEAD_DIM, WIDE, LAYERS = 768, 12, 64, 2048, 12
UNIT = Matrix(sigma=1.0, row=math.sqrt(HIDDEN / WIDE))  # semi-orthogonal [2048, 768]: rows of this norm


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_slope_and_range_of_every_activation_are_rounded_up(name: str) -> None:
    """On a grid of 1e-4, where the second derivative, below 2, can hide 1e-4 of slope at most at a kink."""
    t = torch.linspace(-12, 12, 240_001, dtype=torch.float64, requires_grad=True)
    y = ACT2FN[name](t)
    (slope,) = torch.autograd.grad(y.sum(), t)
    bound = ACTIVATIONS[name]
    assert slope.abs().max() <= bound.slope
    assert slope.abs().max() > bound.slope - 2e-4, "a needlessly large slope"
    t, y = t.detach(), y.detach()
    if bound.contracts:
        assert (y.abs() <= t.abs() + 1e-15).all()
    for reach in (0.1, 1.0, 5.0):
        assert y[t.abs() <= reach].abs().max() <= bound.largest(reach) + 1e-12


def test_table_d3_activation_slopes() -> None:
    """Maximal slopes: GeLU 1.128904145 at 1.414214, tanh-GeLU 1.128993, SiLU 1.099839."""
    for name, slope in (("gelu", 1.128904145), ("gelu_pytorch_tanh", 1.128993), ("silu", 1.099839)):
        assert slope <= ACTIVATIONS[name].slope < slope + 3e-5


def test_table_d3_floor_norm_is_gain_over_floor_and_attains_it() -> None:
    bound = floor_norm(radius=5.0, width=16, floor=0.5, gain=3.0)
    assert bound == Bound(6.0, 12.0)  # 3 / 0.5; 3 sqrt(16) below 6 * 5
    x, y = torch.zeros(2, 16, dtype=torch.float64)
    x[0], y[0] = 0.1, 0.2  # below the floor the norm is linear
    moved = 3 * (x - y) / 0.5
    assert moved.norm() / (x - y).norm() == pytest.approx(bound.lipschitz)


def test_table_d3_gelu_mlp_over_its_slope_is_sigma_sigma() -> None:
    bound = plain_mlp(7.0, Matrix(2.0, 1.0), Matrix(3.0, 1.0), ACTIVATIONS["gelu"], 1 / 1.1290)
    assert 6.0 * (1 - 1e-4) < bound.lipschitz <= 6.0  # 1.12891 / 1.1290
    assert bound.radius == pytest.approx(6.0 * 7.0 / 1.1290)


def test_table_d3_swiglu_has_no_bound_but_on_a_ball() -> None:
    """On radius R: sigma_d R (1.09984 sigma_g rho_u + rho_g sigma_u), and infinite on the whole space."""
    silu = ACTIVATIONS["silu"]
    bound = gated_mlp(math.sqrt(HIDDEN), UNIT, UNIT, Matrix(1.0, 1.0), silu, WIDE)
    assert bound.lipschitz == pytest.approx(35.6, abs=0.05)
    assert bound.radius == pytest.approx(UNIT.row * HIDDEN, rel=1e-6)  # min(rho_g sigma_u, rho_u sigma_g) R^2
    assert gated_mlp(math.inf, UNIT, UNIT, Matrix(1.0, 1.0), silu, WIDE).lipschitz == math.inf
    clipped = gated_mlp(math.inf, UNIT, UNIT, Matrix(1.0, 1.0), silu, WIDE, clip=2.0)
    at_clip = float(F.silu(torch.tensor(2.0, dtype=torch.float64)))
    assert clipped.lipschitz == pytest.approx(1.09984 * 2 + at_clip)


# logit scale, output factor, MLP -> log10 of 12 blocks with a convex residual of 1/24 and with a plain one.
EXPECTED = [
    (HEAD_DIM**-0.5, 1.0, "gelu", 195.0, 11.5, 31.1),
    (HEAD_DIM**-0.5, 1.0, "swiglu", 195.0, 16.2, 46.3),
    (1 / HEAD_DIM, 1.0, "gelu", 27.5, 3.9, 21.1),
    (1 / HEAD_DIM, HEADS**-0.5, "gelu", 7.9, 1.3, 15.0),
    (1 / HEAD_DIM, HEADS**-0.5, "swiglu", 7.9, 6.0, 30.2),
    (1 / HIDDEN, HEADS**-0.5, "gelu", 1.6, 0.12, 8.6),
    (1 / HIDDEN, HEADS**-0.5, "swiglu", 1.6, 4.8, 23.7),
]


@pytest.mark.parametrize(("scale", "factor", "mlp", "attention", "convex", "plain"), EXPECTED)
def test_o4_8_what_twelve_llama_blocks_come_to(
    scale: float, factor: float, mlp: str, attention: float, convex: float, plain: float
) -> None:
    """All norms of matrices 1, floors and gains 1, floor-RMSNorm before each branch, QK floor-norm."""
    z = floor_norm(math.inf, HIDDEN, 1.0, 1.0)
    side = floor_norm(z.radius, HEAD_DIM, 1.0, 1.0)
    head = head_slope(1.0, z.radius, side, side, scale)
    found = factor * joined([head] * HEADS, 1.0, [1.0] * HEADS)
    assert found == pytest.approx(attention, rel=0.02)
    branch = 1.0
    if mlp == "swiglu":
        branch = gated_mlp(z.radius, UNIT, UNIT, Matrix(1.0, 1.0), ACTIVATIONS["silu"], WIDE).lipschitz
    for a, b, expected in ((1 - 1 / 24, 1 / 24, convex), (1.0, 1.0, plain)):
        stream = Bound(1.0, 1.0)
        sums = [added(stream, a, Bound(slope, 1.0), b).lipschitz for slope in (found, branch)]
        assert LAYERS * sum(map(math.log10, sums)) == pytest.approx(expected, abs=0.06)


PUBLISHED = {  # logit scale s of a cap w -> log10 for w = 1, 2, 4, 8, 16
    "one": (lambda w: 1.0, (-0.1, 6.1, 47.8, 135.8, 273.2)),
    "falling": (lambda w: math.sqrt(128) / w**2, (0.9, 9.9, 46.0, 126.8, 257.0)),
}


@pytest.mark.parametrize("scales", sorted(PUBLISHED))
def test_o4_5_the_published_recursion_at_twelve_blocks(scales: str) -> None:
    """The numbers of the paper's code, which divides the MLP's slope by 1.1289 a second time."""
    scale, expected = PUBLISHED[scales]
    for w, value in zip((1.0, 2.0, 4.0, 8.0, 16.0), expected, strict=True):
        matrix, total, stream = Matrix(w, w), math.log10(w), Bound(1.0, 1.0)  # the head, then the blocks
        for _ in range(LAYERS):
            attention = published_attention(w, w, w, w, scale(w), stream.radius, 1 / 3)
            stream = added(stream, 1 - 1 / 24, attention, 1 / 24)
            total += math.log10(stream.lipschitz)
            stream = Bound(1.0, stream.radius)
            mlp = plain_mlp(stream.radius, matrix, matrix, ACTIVATIONS["gelu"], 1 / 1.1289)
            stream = added(stream, 1 - 1 / 24, Bound(mlp.lipschitz / 1.1289, mlp.radius), 1 / 24)
            total += math.log10(stream.lipschitz)
            stream = Bound(1.0, stream.radius)
        assert total == pytest.approx(value, abs=0.06)


@pytest.mark.parametrize("shape", [(7, 7), (5, 33), (33, 5), (3, 6, 9)])
def test_o4_7_singular_values_are_bounded_from_above(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.linalg.matrix_norm(weight, 2)
    found, gram = largest_singular_value(weight), gram_bound(weight)
    assert (found >= exact).all()
    assert torch.allclose(found, exact, rtol=3 * ROUNDING, atol=0)
    assert (gram >= exact * (1 - 1e-13)).all()
    assert (gram <= exact * min(shape[-2:]) ** (1 / 1024) * (1 + 1e-12)).all()


def test_o4_7_a_repeated_singular_value_is_where_the_gram_bound_is_loosest() -> None:
    assert float(gram_bound(3 * torch.eye(16))) == pytest.approx(3 * 16 ** (1 / 1024), rel=1e-12)


def test_rms_to_rms_is_the_norm_of_the_paper() -> None:
    assert rms_to_rms(torch.ones(2, 8)) == pytest.approx(8.0, rel=1e-9)  # x = 1 has rms 1, y = 8 has rms 8


def test_differences_of_rows_are_bounded_from_above(monkeypatch: pytest.MonkeyPatch) -> None:
    # far from 0, near each other
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).double() + 100
    exact = float(torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").max())
    assert largest_difference_of_rows(rows) == pytest.approx(exact, rel=1e-9)
    assert largest_difference_of_rows(rows) >= exact
    monkeypatch.setattr("llmnorm.evaluation.singular_values.EXACT_DIFFERENCES", 1)
    assert exact <= largest_difference_of_rows(rows) <= 2 * exact
