"""NovoGrad: first step, the second moment per layer, and the factor (1 - beta1)."""

from __future__ import annotations

import torch

from llmnorm.optim.novograd import NovoGrad


def gradients(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_first_step_is_the_unit_gradient_times_one_minus_beta1():
    weight = torch.zeros(4, 5, requires_grad=True)
    weight.grad = gradients(1, 4, 5)[0]
    NovoGrad([weight], lr=0.1, betas=(0.95, 0.98)).step()
    torch.testing.assert_close(weight.detach(), -0.1 * 0.05 * weight.grad / weight.grad.norm())


def test_trajectory_with_decay():
    weight = gradients(1, 4, 5)[0].requires_grad_()
    expected, m, v = weight.detach().clone(), torch.zeros(4, 5), None
    optimizer = NovoGrad([weight], lr=0.1, weight_decay=0.01)
    for grad in gradients(6, 4, 5):
        weight.grad = grad
        optimizer.step()
        v = grad.norm() ** 2 if v is None else 0.98 * v + 0.02 * grad.norm() ** 2
        m = 0.95 * m + 0.05 * (grad / (v.sqrt() + 1e-8) + 0.01 * expected)
        expected = expected - 0.1 * m
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_second_moment_starts_at_the_first_gradient_that_is_not_zero():
    weight = torch.zeros(4, 5, requires_grad=True)
    optimizer = NovoGrad([weight], lr=0.1)
    weight.grad = torch.zeros(4, 5)
    optimizer.step()
    assert not weight.any()
    weight.grad = gradients(1, 4, 5)[0]
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -0.1 * 0.05 * weight.grad / weight.grad.norm())


def test_state_is_one_momentum_and_one_number_per_layer():
    parameters = [torch.zeros(shape, requires_grad=True) for shape in ((4, 5), (2, 3, 3), (6,))]
    optimizer = NovoGrad(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shapes = [optimizer.state[parameter]["second_moment"].shape for parameter in parameters]
    assert shapes == [(1, 1), (2, 1, 1), (1,)]
    assert all(sorted(optimizer.state[p]) == ["momentum_buffer", "second_moment"] for p in parameters)
