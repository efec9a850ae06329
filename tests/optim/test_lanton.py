"""LANTON: noise per layer, what it does to the rates of a family, and what it leaves to the direction."""

from __future__ import annotations

import math

import pytest
import torch
from matrix_cases import HIDDEN, groups, make_parameters

from llmnorm.optim.lanton import LANTON, observe_noise, relative_rate
from llmnorm.optim.newton_schulz import orthogonalize

FP32 = {"ns_dtype": "fp32"}
SHAPE = (12, 20)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def lengths(noise: list[float], steps: int = 6, **options) -> list[float]:
    """Length of the last step of layers whose gradients are one common matrix plus noise of these sizes."""
    weights = [torch.zeros(SHAPE, requires_grad=True) for _ in noise]
    optimizer = LANTON([(f"layer{i}", w) for i, w in enumerate(weights)], lr=1.0, **FP32, **options)
    for step in range(steps):
        before = [weight.detach().clone() for weight in weights]
        for size, weight in zip(noise, weights, strict=True):
            weight.grad = 10 * random(0) + size * random(step + 1)
        optimizer.step()
    return [(w.detach() - b).norm().item() for w, b in zip(weights, before, strict=True)]


def test_equal_noise_is_the_spectral_method_without_it():
    weights = [torch.zeros(SHAPE, requires_grad=True) for _ in range(3)]
    optimizer = LANTON(weights, lr=1.0, **FP32)
    average = torch.zeros(SHAPE)
    for step in range(4):
        before = weights[0].detach().clone()
        grad = random(step)
        average = 0.95 * average + 0.05 * grad
        for weight in weights:
            weight.grad = grad.clone()
        optimizer.step()
        expected = before - math.sqrt(12 / 20) * orthogonalize(average, "polar_express")
        torch.testing.assert_close(weights[0].detach(), expected, rtol=0, atol=1e-5)


def test_gradients_without_noise_keep_the_full_rate():
    weight = torch.zeros(SHAPE, requires_grad=True)
    optimizer = LANTON([weight], lr=1.0, alpha=0.1, **FP32)
    for _ in range(3):
        weight.grad = random(0)
        optimizer.step()
    assert optimizer.state[weight]["noise"].item() == 0


@pytest.mark.parametrize("options", [{}, {"alpha": 5.0}])
def test_only_the_noisy_layer_slows_down(options):
    even, uneven = lengths([1.0, 1.0, 1.0], **options), lengths([1.0, 2.0, 1.0], **options)
    assert uneven[1] < 0.9 * even[1]
    assert uneven[0] == pytest.approx(even[0], rel=1e-3)
    assert uneven[2] == pytest.approx(even[2], rel=1e-3)


def test_rate_formula_against_the_svd():
    """H after two gradients is (1 - b2) m/n ||G2 - G1||_nuclear^2."""
    state: dict = {}
    hyper = {"role": "hidden_matrix", "beta2": 0.9, **FP32}
    observe_noise(random(0), state, hyper)
    state["previous_grad"] = random(0)
    noise = observe_noise(random(1), state, hyper).item()
    nuclear = torch.linalg.svdvals(random(1) - random(0)).sum().item()
    assert noise == pytest.approx(0.1 * 12 / 20 * nuclear**2, rel=0.02)
    rates = relative_rate(torch.tensor([0.0, 1.0, 3.0]), 1.0)
    torch.testing.assert_close(rates, torch.tensor([1.0, math.sqrt(0.5), 0.5]))


def test_scale_of_the_loss_does_not_matter_with_the_median():
    def run(factor: float) -> dict[str, torch.Tensor]:
        parameters = make_parameters()
        optimizer = LANTON(groups(parameters), lr=0.1, **FP32)
        for step in range(4):
            for index, parameter in enumerate(parameters.values()):
                parameter.grad = factor * (1 + index) * random(10 * step + index, *parameter.shape)
            optimizer.step()
        return parameters

    small, large = run(1.0), run(64.0)
    for name in small:
        torch.testing.assert_close(large[name], small[name], rtol=1e-4, atol=1e-5)


def test_embedding_and_head_are_one_family_of_signs():
    parameters = make_parameters()
    optimizer = LANTON(groups(parameters), lr=0.1)
    names = ["embed_tokens.weight", "lm_head.weight"]
    before = {name: parameters[name].detach().clone() for name in names}
    for step in range(2):
        for index, (name, parameter) in enumerate(parameters.items()):
            noise = 5.0 if name == "lm_head.weight" else 1.0
            parameter.grad = 2 * random(index, *parameter.shape) + noise * random(99 + step, *parameter.shape)
        before = {name: parameters[name].detach().clone() for name in names}
        optimizer.step()
    steps = {name: (parameters[name].detach() - before[name]).abs() for name in names}
    for step in steps.values():
        torch.testing.assert_close(step, step.mean().expand_as(step), rtol=1e-4, atol=0)
    assert steps["embed_tokens.weight"].mean().item() == pytest.approx(0.1 * 60 / 12, rel=1e-4)
    assert steps["lm_head.weight"].mean() < 0.9 * steps["embed_tokens.weight"].mean()
    assert optimizer.state[parameters[HIDDEN[0]]]["noise"].shape == (1, 1)
