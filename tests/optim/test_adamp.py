"""AdamP: projection per row or per layer where the gradient is orthogonal to the weight, Adam elsewhere."""

from __future__ import annotations

import torch

from llmnorm.optim.adamp import AdamP


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tangent_rows(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return grad - (grad * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True) * weight


def steps(weight: torch.Tensor, grads: list[torch.Tensor], **options) -> list[torch.Tensor]:
    optimizer = AdamP([weight], lr=0.01, **options)
    moves = []
    for grad in grads:
        before = weight.detach().clone()
        weight.grad = grad
        optimizer.step()
        moves.append(weight.detach() - before)
    return moves


def test_orthogonal_rows_are_projected_and_keep_their_distance():
    weight = random(6, 8)
    grad = tangent_rows(random(6, 8, seed=1), weight)
    (move,) = steps(weight.clone().requires_grad_(), [grad])
    assert (move * weight).sum(1).abs().max() < 1e-6
    # Adam's first step is the sign of the gradient, which is not orthogonal to the weight by itself.
    assert (grad.sign() * weight).sum(1).abs().max() > 0.1
    expected = tangent_rows(-0.01 * grad.sign(), weight)
    torch.testing.assert_close(move, expected, rtol=0, atol=1e-6)


def test_a_layer_can_be_orthogonal_as_a_whole_only():
    weight, grad = random(6, 8), random(6, 8, seed=1)
    grad[0] = weight[0]  # one row along its weight: no row view
    grad -= (grad * weight).sum() / weight.square().sum() * weight
    (move,) = steps(weight.clone().requires_grad_(), [grad])
    assert abs((move * weight).sum().item()) < 1e-6
    assert (move * weight).sum(1).abs().max() > 1e-3


def test_elsewhere_it_is_adamw():
    ours, theirs = random(6, 8).requires_grad_(), random(6, 8).requires_grad_()
    grads = [ours.detach() + 0.1 * random(6, 8, seed=seed) for seed in range(4)]
    steps(ours, grads, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, foreach=False)
    for grad in grads:
        theirs.grad = grad
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_projected_weights_decay_less():
    weight = random(6, 8)
    grad = tangent_rows(random(6, 8, seed=1), weight)
    (plain,) = steps(weight.clone().requires_grad_(), [grad])
    (decayed,) = steps(weight.clone().requires_grad_(), [grad], weight_decay=0.5, wd_ratio=0.2)
    torch.testing.assert_close(decayed - plain, -0.01 * 0.5 * 0.2 * weight, rtol=1e-4, atol=1e-7)
