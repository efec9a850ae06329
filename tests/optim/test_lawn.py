"""LAWN: norms stay, directions are tangent, and before the switch it is AdamW."""

from __future__ import annotations

import pytest
import torch

from llmnorm.optim.lawn import LAWN, lawn_update

HYPER = {"betas": (0.9, 0.999), "eps": 1e-8, "free_steps": 0, "state_dtype": "param", "weight_decay": 0.1}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8)])
def test_norm_of_every_matrix_is_constant(shape):
    weight = random(*shape).requires_grad_()
    norms = weight.detach().norm(dim=(-2, -1))
    optimizer = LAWN([weight], lr=0.1, weight_decay=0.5)
    for seed in range(5):
        before = weight.detach().clone()
        weight.grad = random(*shape, seed=seed + 1)
        optimizer.step()
        torch.testing.assert_close(weight.detach().norm(dim=(-2, -1)), norms, rtol=1e-6, atol=0)
        assert (weight.detach() - before).abs().max() > 0.01


def test_direction_is_tangent_and_blind_to_the_radial_gradient():
    weight, state, other = random(6, 8), {}, {}
    for seed in range(3):
        grad = random(6, 8, seed=seed + 1)
        update = lawn_update(grad, state, HYPER, weight)
        assert abs((update * weight).sum().item()) < 1e-4
        torch.testing.assert_close(
            lawn_update(grad + 2 * weight, other, HYPER, weight), update, rtol=1e-3, atol=1e-4
        )


def test_free_steps_are_adamw_and_the_norm_is_frozen_after_them():
    ours, theirs = random(6, 8).requires_grad_(), random(6, 8).requires_grad_()
    optimizer = LAWN([ours], lr=0.1, weight_decay=0.1, free_steps=3)
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, foreach=False)
    for seed in range(3):
        ours.grad = random(6, 8, seed=seed + 1)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    norm = ours.detach().norm()
    for seed in range(3):
        ours.grad = random(6, 8, seed=seed + 4)
        optimizer.step()
        torch.testing.assert_close(ours.detach().norm(), norm, rtol=1e-6, atol=0)
