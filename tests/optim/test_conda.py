"""Conda: golden step, equality with Adam in a fixed basis, equivariance, and when the basis changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from llmnorm.optim.conda import Conda, conda_update, singular_basis

HYPER = {
    "betas": (0.9, 0.99),
    "eps": 1e-8,
    "update_proj_gap": 4,
    "scale": 0.25,
    "state_dtype": "param",
    "weight_decay": 0.0,
    "lr": 0.01,
}


def gaussians(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussians(1, size, size, seed=seed)[0])[0]


def trajectory(grads: list[torch.Tensor], **options) -> list[torch.Tensor]:
    state: dict = {}
    return [conda_update(grad, state, {**HYPER, **options}, torch.zeros_like(grad)) for grad in grads]


def test_golden_first_step():
    weight = torch.zeros(3, 2, requires_grad=True)
    weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    Conda([weight], lr=0.01).step()
    # Every entry is +-1 in the basis, so that the norm is lr * scale * sqrt(6) whatever the signs.
    assert weight.norm().item() == pytest.approx(0.006124, abs=1e-6)
    expected = torch.tensor([[0.000413, -0.003511], [0.000413, -0.003511], [-0.003511, -0.000413]])
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_basis_holds_the_singular_vectors_of_the_shorter_side(shape):
    (matrix,) = gaussians(1, *shape)
    basis = singular_basis(1e-25 * matrix)
    k = min(shape)
    torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64))
    rotated = matrix @ basis if shape[0] >= shape[1] else basis.T @ matrix
    gram = rotated.T @ rotated if shape[0] >= shape[1] else rotated @ rotated.T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_in_its_basis_it_is_adam_with_eps_on_the_uncorrected_root(shape):
    grads = gaussians(4, *shape)
    beta1, beta2 = HYPER["betas"]
    basis = singular_basis(grads[0])
    tall = shape[0] >= shape[1]
    m = v = torch.zeros(shape, dtype=torch.float64)
    for step, (grad, update) in enumerate(zip(grads, trajectory(grads, scale=1.0), strict=True), 1):
        rotated = grad @ basis if tall else basis.T @ grad
        m, v = beta1 * m + (1 - beta1) * rotated, beta2 * v + (1 - beta2) * rotated**2
        adam = m / (v.sqrt() + 1e-8) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        expected = adam @ basis.T if tall else basis @ adam
        torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-11)


def test_rotating_the_shorter_side_rotates_the_update():
    grads, rotation = gaussians(6, 7, 4), orthogonal(4, seed=9)
    rotated = trajectory([grad @ rotation for grad in grads])
    for update, other in zip(trajectory(grads), rotated, strict=True):
        torch.testing.assert_close(other, update @ rotation, rtol=1e-7, atol=1e-9)
    permutation = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    permuted = trajectory([grad[permutation] for grad in grads])
    for update, other in zip(trajectory(grads), permuted, strict=True):
        torch.testing.assert_close(other, update[permutation], rtol=1e-7, atol=1e-9)
    wide = trajectory([grad.T for grad in grads])
    for update, other in zip(trajectory(grads), wide, strict=True):
        torch.testing.assert_close(other, update.T, rtol=1e-7, atol=1e-9)


def test_the_basis_changes_every_gap_steps_and_at_no_other_time():
    state: dict = {}
    bases = []
    for grad in gaussians(9, 7, 4):
        conda_update(grad, state, HYPER, grad)
        bases.append(state["basis"].clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert [index + 1 for index, flag in enumerate(changed) if flag] == [4, 8]


def test_basis_is_an_fp32_tensor_for_bf16_weights():
    weight = torch.zeros(6, 3, dtype=torch.bfloat16, requires_grad=True)
    weight.grad = gaussians(1, 6, 3)[0].bfloat16()
    optimizer = Conda([weight])
    optimizer.step()
    state = optimizer.state[weight]
    assert state["basis"].dtype == torch.float32 and state["basis"].shape == (3, 3)
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


def test_decay_follows_the_update():
    decayed, plain = (torch.ones(4, 3, requires_grad=True) for _ in range(2))
    grad = gaussians(1, 4, 3)[0].float()
    decayed.grad, plain.grad = grad, grad.clone()
    Conda([decayed], lr=0.1, weight_decay=0.5).step()
    Conda([plain], lr=0.1).step()
    torch.testing.assert_close(decayed.detach(), plain.detach() * (1 - 0.1 * 0.5), rtol=1e-6, atol=1e-7)
