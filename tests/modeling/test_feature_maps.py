"""Feature maps of linear attention against their published values and their derivatives."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import feature_maps as maps
from llmnorm.modeling.linear_attention import linear_attention

GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "linear_attention.json").read_text())
DOUBLE = torch.float64


def halves(x: Tensor, f: Tensor) -> Tensor:
    return torch.cat((f * (x > 0), f * (x < 0)), -1)


SPLITS = {"relu_split": halves, "cosine": lambda x, f: maps._turned(x, f, maps.SHARPNESS, 0.0)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def published_exponent(q: Tensor) -> Tensor:
    return maps.exponent(torch.linalg.vector_norm(q, dim=-1, keepdim=True), 3.0, 0.5)


def direct_query(name: str, q: Tensor) -> Tensor:
    """phi_q as the paper writes it, with |q^|^p and nothing rescaled."""
    return SPLITS[name](q, maps.direct_power(q, published_exponent(q)))


@pytest.fixture
def golden_inputs() -> tuple[Tensor, Tensor, Tensor]:
    t, i = torch.arange(6, dtype=DOUBLE)[:, None], torch.arange(4, dtype=DOUBLE)
    q, k = (0.7 * t + 1.3 * i + 0.1).sin(), (0.5 * t - 0.9 * i + 0.2).cos()
    return q[None, None], k[None, None], (0.3 * t + 0.4 * i[:3]).sin()[None, None]


@pytest.mark.parametrize("name", ["relu_split", "cosine"])
def test_o1_6_golden_vectors(name: str, golden_inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Eight digits are printed, so 1e-8."""
    q, k, v = golden_inputs
    golden = GOLDEN[name]
    torch.testing.assert_close(
        published_exponent(q).flatten(), torch.tensor(GOLDEN["exponents"], dtype=DOUBLE), atol=1e-8, rtol=0
    )
    features = direct_query(name, q), maps.FEATURE_MAPS[name].key(k)
    denominators = (features[0] @ features[1].mT).tril().sum(-1).flatten()
    torch.testing.assert_close(
        denominators, torch.tensor(golden["denominators"], dtype=DOUBLE), atol=1e-8, rtol=0
    )
    o, _ = linear_attention(*features, v, eps=1e-6)
    for row, expected in golden["outputs"].items():
        torch.testing.assert_close(o[0, 0, int(row)], torch.tensor(expected, dtype=DOUBLE), atol=1e-8, rtol=0)
    o, _ = linear_attention(*features, v, eps=0.0)
    expected = torch.tensor(golden["output_5_without_eps"], dtype=DOUBLE)
    torch.testing.assert_close(o[0, 0, 5], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["relu_split", "cosine"])
def test_o1_1_scores_are_not_negative(name: str) -> None:
    q, k = randn(200, 16), randn(200, 16, seed=1)
    feature_map = maps.FEATURE_MAPS[name]
    scores = feature_map.query(q, published_exponent(q)) @ feature_map.key(k).mT
    assert scores.min() >= -1e-7
    assert scores.max() > 1
    if name == "relu_split":
        assert feature_map.query(q, published_exponent(q)).min() == 0 == feature_map.key(k).min()


@pytest.mark.parametrize(("sharpness", "bound"), [(20.0, 2e-3), (1000.0, 1e-7)])
def test_o1_2_the_cosine_map_tends_to_relu_split(sharpness: float, bound: float) -> None:
    """Only entries near 0 differ; 2e-3 and 1e-7 of the largest score are the sheet's bounds."""
    q, k = randn(100, 16), randn(100, 16, seed=1)
    p = published_exponent(q)
    cosine = maps.cosine_query(q, p, 0.0, sharpness) @ maps.cosine_key(k, 0.0, sharpness).mT
    split = maps.relu_split_query(q, p) @ maps.relu_split_key(k).mT
    difference = (cosine - split).abs().max() / split.max()
    assert difference < bound
    assert difference > 0


def mean_entropy(scores: Tensor) -> float:
    weights = scores / scores.sum(-1, keepdim=True)
    return -(weights * weights.clamp_min(1e-300).log()).sum(-1).mean().item()


def test_o1_3_a_longer_query_attends_more_sharply() -> None:
    q, k = randn(256, 64), randn(256, 64, seed=1)
    factors = (0.01, 0.03, 0.1, 0.3, 1.0)
    keys = maps.relu_split_key(k)
    norm_aware = [
        mean_entropy(maps.relu_split_query(q * c, published_exponent(q * c)) @ keys.mT) for c in factors
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(norm_aware))
    assert norm_aware[0] - norm_aware[3] >= 0.2
    plain = [mean_entropy((q * c).relu() @ k.relu().mT) for c in factors]
    assert max(plain) - min(plain) < 1e-6


@pytest.mark.parametrize("name", ["relu_split", "cosine"])
def test_o1_4_the_stable_power_gives_the_direct_output(name: str) -> None:
    q, k, v = randn(1, 2, 40, 64), randn(1, 2, 40, 64, seed=1), randn(1, 2, 40, 5, seed=2)
    key = maps.FEATURE_MAPS[name].key(k)
    stable, _ = linear_attention(maps.FEATURE_MAPS[name].query(q, published_exponent(q)), key, v, eps=0.0)
    direct, _ = linear_attention(direct_query(name, q), key, v, eps=0.0)
    torch.testing.assert_close(stable, direct, atol=1e-10, rtol=0)


def test_the_stable_power_survives_where_the_direct_one_vanishes() -> None:
    """128 entries, p = 4.5: half the direct features are below 1e-5, each stable row has a 1."""
    q = randn(50, 128).float()
    p = torch.full((50, 1), 4.5)
    assert maps.direct_power(q, p).median() < 1e-5
    assert torch.equal(maps.stable_power(q, p).amax(-1), torch.ones(50))


def test_o1_5_gradcheck_of_the_maps() -> None:
    q = randn(3, 5, 8).requires_grad_()
    p = (1 + 3 * torch.rand(3, 5, 1, dtype=DOUBLE)).requires_grad_()
    for function, inputs in (
        (maps.stable_power, (q, p)),
        (maps.relu_split_query, (q, p)),
        (lambda q, p: maps.relu_split_query(q, p, 0.1), (q, p)),
        (lambda k: maps.relu_split_key(k, 0.1), (q,)),
        (maps.relu_split_key, (q,)),
        (maps.cosine_query, (q, p)),
        (maps.cosine_key, (q,)),
        (lambda q: maps.relu_split_query(q, published_exponent(q)), (q,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)


def test_the_backward_is_the_published_formula() -> None:
    """dq = (dh - q^ (q^ . dh)) / n + dp lambda sech^2(n) q^, for a loss that forgets the scale of phi_q."""
    q, k, v = randn(1, 1, 9, 6), randn(1, 1, 9, 6, seed=1), randn(1, 1, 9, 4, seed=2)
    q = q.requires_grad_()
    features = maps.relu_split_query(q, published_exponent(q))
    o, _ = linear_attention(features, maps.relu_split_key(k), v, eps=0.0)
    (stable,) = torch.autograd.grad(o.sin().sum(), q)

    length = torch.linalg.vector_norm(q, dim=-1, keepdim=True).detach()
    direction, p = q.detach() / length, published_exponent(q).detach()
    u = direction.abs()
    y = (u**p).requires_grad_()
    o, _ = linear_attention(halves(q.detach(), y), maps.relu_split_key(k), v, eps=0.0)
    (g,) = torch.autograd.grad(o.sin().sum(), y)
    dh = g * p * u ** (p - 1) * direction.sign()
    dp = (g * y.detach() * u.log()).sum(-1, keepdim=True)
    radial = dp * 3.0 / torch.cosh(length) ** 2
    expected = (dh - direction * (direction * dh).sum(-1, keepdim=True)) / length + radial * direction
    torch.testing.assert_close(stable, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_o1_7_zero_queries_and_keys_stay_finite(floor: float) -> None:
    q, k, v = randn(1, 1, 5, 8), randn(1, 1, 5, 8, seed=1), randn(1, 1, 5, 3, seed=2)
    q[:, :, 2] = 0
    k[:, :, 1] = 0
    q.requires_grad_(), k.requires_grad_()
    query = maps.relu_split_query(q, published_exponent(q), floor)
    o, _ = linear_attention(query, maps.relu_split_key(k, floor), v)
    # Without a floor nothing is attended to; with one, every key seen alike (but for eps).
    expected = v[0, 0, :3].mean(0) if floor else torch.zeros(3, dtype=DOUBLE)
    torch.testing.assert_close(o[0, 0, 2], expected, atol=1e-4, rtol=0)
    o.sin().sum().backward()
    for x in (q, k):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().max() > 0


def test_the_exponent_is_held_at_one() -> None:
    lengths = torch.tensor([-3.0, -0.3, 0.0, 0.5, 20.0])
    expected = [1.0, 1.0, 1.5, 3 * (0.5 + torch.tanh(torch.tensor(0.5)).item()), 4.5]
    assert maps.exponent(lengths, 3.0, 0.5).tolist() == pytest.approx(expected)
