"""NorMuon: golden vectors of both variants, RMS of the update, and what it shares with Muon."""

from __future__ import annotations

import math

import pytest
import torch

from llmnorm.optim.muon import Muon
from llmnorm.optim.normalization import rms, to_unit_rms
from llmnorm.optim.normuon import NorMuon, normalize_neurons

HYPER = {"beta2": 0.95, "normalizer_eps": 1e-10}
POLAR = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
FP32 = {"ns_dtype": "fp32"}


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(12, 20, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def steps(optimizer: torch.optim.Optimizer, weight: torch.Tensor, count: int = 4, skew: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(7)
    heights = torch.linspace(1.0, skew, 12)[:, None]
    for _ in range(count):
        weight.grad = heights * torch.randn(12, 20, generator=generator)
        optimizer.step()


def test_golden_vectors():
    state: dict = {}
    normalized = normalize_neurons(POLAR, state, HYPER)
    torch.testing.assert_close(state["second_moment"], torch.tensor([[1 / 60], [1 / 120]]))
    torch.testing.assert_close(normalized.norm(dim=1), torch.full((2,), 7.745967))
    paper = 0.2 * to_unit_rms(normalized)
    expected = torch.tensor([[0.346410, 0, 0], [0, 0.244949, 0.244949]])
    torch.testing.assert_close(paper, expected, rtol=0, atol=1e-6)
    released = to_unit_rms(normalized) * rms(POLAR, (-2, -1))
    expected = torch.tensor([[0.866025, 0, 0], [0, 0.612372, 0.612372]])
    torch.testing.assert_close(released, expected, rtol=0, atol=1e-6)
    assert released.norm().item() == pytest.approx(1.224745, abs=1e-6)


@pytest.mark.parametrize(
    "lr_mode, target", [("paper", 0.2), ("adam_rms", 0.2), ("keller", 1 / math.sqrt(20))]
)
def test_paper_variant_has_the_same_rms_at_every_step(lr_mode, target):
    weight = weights()
    optimizer = NorMuon([weight], lr=0.01, variant="paper", lr_mode=lr_mode)
    for _ in range(3):
        before = weight.detach().clone()
        steps(optimizer, weight, 1, skew=5.0)
        assert rms(weight.detach() - before, (0, 1)).item() == pytest.approx(0.01 * target, rel=1e-4)


def test_released_variant_keeps_the_norm_of_the_muon_update():
    ours, muon = weights(), weights()
    start = weights().detach()
    steps(NorMuon([ours], lr=0.02, **FP32), ours, 1, skew=5.0)
    steps(Muon([muon], lr=0.02, **FP32), muon, 1, skew=5.0)
    assert (ours - start).norm().item() == pytest.approx((muon - start).norm().item(), rel=1e-5)
    assert not torch.allclose(ours, muon, atol=1e-4)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_without_memory_all_neurons_move_equally_far(variant):
    weight = weights()
    start = weight.detach().clone()
    steps(NorMuon([weight], lr=0.02, beta2=0.0, variant=variant), weight, 1, skew=5.0)
    norms = (weight.detach() - start).norm(dim=1)
    torch.testing.assert_close(norms, norms.mean().expand(12), rtol=1e-4, atol=0)


def test_rows_of_equal_norm_make_it_muon():
    """Orthonormal rows: with enough iterations every row of O has norm 1, and v is the same for all."""
    ours, muon = weights(), weights()
    engine = {"ns_coefficients": "polar_express", "ns_steps": 12, **FP32}
    steps(NorMuon([ours], lr=0.02, **engine), ours, 5)
    steps(Muon([muon], lr=0.02, **engine), muon, 5)
    torch.testing.assert_close(ours, muon, rtol=0, atol=1e-5)


def test_second_moment_is_fp32_and_remembers_the_rows():
    weight = weights().detach().bfloat16().requires_grad_()
    optimizer = NorMuon([weight], lr=0.02)
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        weight.grad = torch.randn(12, 20, generator=generator).bfloat16()
        optimizer.step()
    state = optimizer.state[weight]
    assert state["momentum_buffer"].dtype == torch.bfloat16
    assert state["second_moment"].dtype == torch.float32 and state["second_moment"].shape == (12, 1)
    # Rows of a 12 x 20 polar factor have mean square 1/20; Jordan's singular values lie in [0.68, 1.13].
    exact = (1 - 0.95**3) / 20
    assert (state["second_moment"] / exact).min() > 0.68**2
    assert (state["second_moment"] / exact).max() < 1.13**2


def test_dead_rows_stay():
    weight = weights()
    start = weight.detach().clone()
    optimizer = NorMuon([weight], lr=0.02)
    weight.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    weight.grad[3] = 0.0
    optimizer.step()
    assert torch.equal(weight.detach()[3], start[3])
    assert weight.isfinite().all()
