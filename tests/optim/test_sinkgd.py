"""SinkGD: golden vector, balanced rows and columns, fixed point and invariance of Sinkhorn's iteration."""

from __future__ import annotations

import math

import pytest
import torch

from llmnorm.optim.sinkgd import SinkGD, sinkgd_update

HYPER = {"iterations": 5, "eps": 1e-7}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(grad: torch.Tensor, iterations: int) -> torch.Tensor:
    """The iteration as the paper writes it, on X itself."""
    m, n = grad.shape
    for _ in range(iterations):
        grad = grad * math.sqrt(n) / grad.norm(dim=1, keepdim=True)
        grad = grad * math.sqrt(m) / grad.norm(dim=0, keepdim=True)
    return grad


def test_golden_vector_after_one_iteration():
    got = sinkgd_update(torch.tensor([[3.0, 4.0], [0.0, 5.0]]), {}, {**HYPER, "iterations": 1})
    torch.testing.assert_close(got, torch.tensor([[1.414214, 0.883452], [0.0, 1.104315]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_scaling_vectors_equal_scaling_the_matrix(iterations):
    grad = gaussian(6, 10)
    got = sinkgd_update(grad, {}, {**HYPER, "iterations": iterations})
    torch.testing.assert_close(got, literal(grad, iterations), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 5])
def test_columns_are_exact_and_rows_close(iterations):
    grad = gaussian(64, 172)
    update = sinkgd_update(grad, {}, {**HYPER, "iterations": iterations})
    assert update.norm().item() == pytest.approx(math.sqrt(update.numel()), rel=1e-10)
    torch.testing.assert_close(update.square().mean(0), torch.ones(172, dtype=torch.float64))
    if iterations == 5:
        assert (update.square().mean(1).sqrt() - 1).abs().max() < 1e-4
    assert torch.equal(update.sign(), grad.sign())


def test_a_balanced_matrix_is_a_fixed_point():
    balanced = literal(gaussian(6, 10), 300)
    torch.testing.assert_close(sinkgd_update(balanced, {}, HYPER), balanced, rtol=1e-9, atol=1e-12)


def test_positive_scalings_of_rows_and_columns_change_nothing_in_the_limit():
    grad, rows, columns = gaussian(6, 10), gaussian(6, 1, seed=1).exp(), gaussian(1, 10, seed=2).exp()
    hyper = {**HYPER, "iterations": 300}
    scaled = sinkgd_update(rows * grad * columns, {}, hyper)
    torch.testing.assert_close(scaled, sinkgd_update(grad, {}, hyper), rtol=1e-8, atol=1e-10)


def test_dead_and_noisy_rows_and_columns_stay_zero():
    grad = gaussian(5, 8).float()
    grad[1] = 0.0
    grad[2] *= 1e-12
    grad[:, 3] = 0.0
    update = sinkgd_update(grad, {}, HYPER)
    assert update.isfinite().all()
    assert not update[1].any() and not update[2].any() and not update[:, 3].any()
    alive = update[[0, 3, 4]]
    torch.testing.assert_close(alive.square().sum(0)[[0, 1, 2]], torch.full((3,), 5.0))


def test_heavy_tails_stay_finite_in_fp32():
    grad = gaussian(64, 96).float().pow(9)
    update = sinkgd_update(1e-15 * grad, {}, HYPER)
    torch.testing.assert_close(update.square().mean(0).sqrt(), torch.ones(96), rtol=1e-4, atol=0)


def test_the_step_is_lr_times_alpha_and_leaves_no_state():
    weight = torch.zeros(4, 6, requires_grad=True)
    weight.grad = gaussian(4, 6).float()
    optimizer = SinkGD([weight], lr=0.02)
    optimizer.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.02 * 0.05, rel=1e-5)
    assert not optimizer.state
    weight.data.zero_()
    SinkGD([weight], lr=0.02, lr_mode="adam_rms").step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.02 * 0.2, rel=1e-5)
