"""SCALE: golden vectors, which slice is normalized for which role, and how little state there is."""

from __future__ import annotations

import math

import pytest
import torch
from matrix_cases import HIDDEN, SHAPES, gradients, groups, make_parameters, run

from llmnorm.errors import UserError
from llmnorm.optim.scale import SCALE, normalized_columns, normalized_momentum_rows, normalized_rows

HYPER = {"eps": 1e-7, "momentum": 0.9, "state_dtype": "param"}
GOLDEN = torch.tensor([[3.0, 4.0], [0.0, 5.0]])


def test_golden_vectors():
    rows = torch.tensor([[0.848528, 1.131371], [0.0, 1.414214]])
    columns = torch.tensor([[1.414214, 0.883452], [0.0, 1.104315]])
    torch.testing.assert_close(normalized_rows(GOLDEN, {}, HYPER), rows, rtol=0, atol=1e-6)
    torch.testing.assert_close(normalized_columns(GOLDEN, {}, HYPER), columns, rtol=0, atol=1e-6)
    torch.testing.assert_close(normalized_momentum_rows(GOLDEN, {}, HYPER), rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_norm_of_every_slice(variant):
    parameters = make_parameters()
    optimizer = SCALE(groups(parameters), lr=0.5, variant=variant)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    run(optimizer, parameters, 1)
    for name, parameter in parameters.items():
        role = SHAPES[name][0]
        if role == "vector":
            continue
        dim = -2 if role == "embedding" else -1
        norms = (before[name] - parameter.detach()).norm(dim=dim)
        expected = 0.5 * (math.sqrt(parameter.shape[dim]) if variant == "released" else 1.0)
        torch.testing.assert_close(norms, torch.full_like(norms, expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", [normalized_rows, normalized_columns])
def test_a_positive_factor_of_the_gradient_changes_nothing(rule):
    grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    for factor in (1e-12, 8.0, 1e12):
        torch.testing.assert_close(rule(factor * grad, {}, HYPER), rule(grad, {}, HYPER), rtol=1e-5, atol=0)


def test_a_row_depends_on_its_own_gradient_only():
    grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    other = grad.clone()
    other[2] *= -3.0
    changed = (normalized_rows(grad, {}, HYPER) != normalized_rows(other, {}, HYPER)).any(dim=1)
    assert changed.tolist() == [False, False, True, False, False, False]


def test_dead_rows_stay_and_rounding_noise_is_not_blown_up():
    grad = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    grad[1] = 0.0
    grad[2] *= 1e-12
    update = normalized_rows(grad, {}, HYPER)
    assert torch.equal(update[1], torch.zeros(64))
    assert update[2].norm() < 1e-3  # a full row has norm 8
    assert update[0].norm().item() == pytest.approx(8.0, rel=1e-5)


def test_head_momentum():
    """Equal gradients give the stateless update; different ones the normalized average of gradients."""
    grads = [part["lm_head.weight"] for part in gradients(4)]
    state: dict = {}
    for _ in range(3):
        update = normalized_momentum_rows(grads[0], state, HYPER)
    torch.testing.assert_close(update, normalized_rows(grads[0], {}, HYPER), rtol=1e-5, atol=1e-6)

    state, average = {}, torch.zeros_like(grads[0])
    for grad in grads:
        average = 0.9 * average + 0.1 * grad
        update = normalized_momentum_rows(grad, state, HYPER)
    torch.testing.assert_close(update, normalized_rows(average, {}, HYPER), rtol=1e-5, atol=1e-6)
    stateless = normalized_momentum_rows(grads[0], {}, {**HYPER, "momentum": 0.0})
    assert torch.equal(stateless, normalized_rows(grads[0], {}, HYPER))


def test_state_is_one_tensor_of_the_head_and_adam_of_vectors():
    parameters = make_parameters()
    optimizer = SCALE(groups(parameters), lr=1e-3)
    run(optimizer, parameters, 2)
    kept = {name: sorted(optimizer.state.get(parameters[name], {})) for name in SHAPES}
    assert kept.pop("lm_head.weight") == ["momentum_buffer"]
    assert kept.pop("norm.weight") == ["exp_avg", "exp_avg_sq", "step"]
    assert kept == {name: [] for name in [*HIDDEN, "embed_tokens.weight"]}


def test_vectors_move_by_adam_with_eps_on_the_uncorrected_root():
    weight = torch.zeros(3, requires_grad=True)
    optimizer = SCALE([{"params": [weight], "role": "vector"}], lr=0.1, adamw_eps=1e-3)
    weight.grad = torch.tensor([1.0, -0.01, 0.0])
    optimizer.step()
    root = math.sqrt(1 - 0.999)
    expected = [-0.1 * g / (abs(g) * root + 1e-3) * root for g in (1.0, -0.01, 0.0)]
    assert weight.tolist() == pytest.approx(expected, rel=1e-5)


def test_unknown_variant_is_refused():
    with pytest.raises(UserError, match="released, paper"):
        SCALE(groups(make_parameters()), variant="rms")
