"""SWAN: whitening against the SVD, its convergence, orientation and dead rows."""

from __future__ import annotations

import math

import pytest
import torch

from llmnorm.optim.swan import SWAN, swan_update, whiten

HYPER = {"iterations": 10, "center": True, "eps": 1e-6}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polar(matrix: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def direction(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_whitening_is_the_polar_factor_up_to_a_scalar(shape):
    matrix = gaussian(*shape)
    got = whiten(matrix, 30)
    torch.testing.assert_close(direction(got), direction(polar(matrix)), rtol=0, atol=1e-9)
    torch.testing.assert_close(whiten(matrix.T, 30), got.T)
    # Ten iterations, the default, are within a percent on a spectrum of condition 4.
    torch.testing.assert_close(direction(whiten(matrix, 10)), direction(polar(matrix)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("center", [True, False])
def test_update_is_the_whitened_standardized_gradient_at_rms_one(center):
    grad = gaussian(8, 20) * gaussian(8, 1, seed=1).exp() + 0.3
    rows = grad - grad.mean(1, keepdim=True) if center else grad
    rows = rows / rows.square().mean(1, keepdim=True).sqrt()
    expected = direction(polar(rows)) * math.sqrt(grad.numel())
    got = swan_update(grad, {}, {**HYPER, "center": center, "iterations": 30})
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)


def test_row_scale_and_common_scale_do_not_matter_but_column_scale_does():
    grad, rows, columns = gaussian(8, 20), gaussian(8, 1, seed=1).exp(), gaussian(1, 20, seed=2).exp()
    update = swan_update(grad, {}, HYPER)
    torch.testing.assert_close(swan_update(1e-9 * rows * grad, {}, HYPER), update, rtol=0, atol=1e-9)
    assert (swan_update(grad * columns, {}, HYPER) - update).abs().max() > 0.1


def test_zero_and_constant_rows_get_no_update():
    grad = gaussian(6, 12).float()
    grad[1] = 0.0
    grad[2] *= 1e-12
    grad[4] = 0.25
    update = swan_update(grad, {}, HYPER)
    assert update.isfinite().all()
    assert not update[[1, 2, 4]].any()


def test_the_step_is_lr_times_alpha_and_leaves_no_state():
    weight = torch.zeros(6, 12, requires_grad=True)
    weight.grad = gaussian(6, 12).float()
    optimizer = SWAN([weight], lr=0.02)
    optimizer.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.02 * 0.05, rel=1e-5)
    assert not optimizer.state
