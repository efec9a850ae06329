"""LAMB: length of the step, bias-corrected moments inside the ratio, no ratio for vectors."""

from __future__ import annotations

import pytest
import torch

from llmnorm.optim.lamb import LAMB


def weight_of_norm(norm: float) -> torch.Tensor:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return (norm * weight / weight.norm()).requires_grad_()


@pytest.mark.parametrize(
    "norm, options, trusted", [(3.0, {}, 3.0), (25.0, {}, 10.0), (25.0, {"max_weight_norm": None}, 25.0)]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_length_of_the_step_is_lr_times_the_clipped_weight_norm(norm, options, trusted, weight_decay):
    weight = weight_of_norm(norm)
    optimizer = LAMB([weight], lr=0.01, weight_decay=weight_decay, **options)
    for step in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(step + 1))
        optimizer.step()
        expected = 0.01 * min(before.norm().item(), trusted)
        assert (weight.detach() - before).norm().item() == pytest.approx(expected, rel=1e-4)


def test_direction_is_bias_corrected_adam_plus_decay():
    weight = weight_of_norm(3.0)
    optimizer = LAMB([weight], lr=0.01, weight_decay=0.1)
    m = v = torch.zeros(6, 8)
    for step in range(1, 5):
        before = weight.detach().clone()
        weight.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        m, v = 0.9 * m + 0.1 * weight.grad, 0.999 * v + 0.001 * weight.grad**2
        r = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + 0.1 * before
        expected = before - 0.01 * before.norm() / r.norm() * r
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_vectors_and_zero_weights_have_ratio_one():
    gain, matrix = torch.full((4,), 50.0, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    optimizer = LAMB([gain, matrix], lr=0.01)
    gain.grad, matrix.grad = torch.ones(4), torch.ones(2, 3)
    optimizer.step()
    torch.testing.assert_close(gain.detach(), torch.full((4,), 49.99))
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), -0.01), rtol=1e-5, atol=0)
