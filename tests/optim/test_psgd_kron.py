"""PSGD Kron: it whitens, its factors stay triangular, and its randomness has a name."""

from __future__ import annotations

import pytest
import torch

from llmnorm.optim.psgd_kron import PSGDKron, psgd_kron_update, update_probability

HYPER = {
    "momentum": 0.0,
    "precond_lr": 0.1,
    "max_size_triangular": 8192,
    "min_update_probability": 1.0,
    "seed": 0,
    "name": "w",
    "state_dtype": "param",
}


def square_root(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return basis @ torch.diag(torch.linspace(0.3, 3.0, size)) @ basis.T


def fitted(steps: int = 700, **options) -> tuple[dict, torch.Tensor]:
    """State and the mean of U U^T / n over the last updates, for gradients L^(1/2) Z R^(1/2)."""
    left, right = square_root(4, 0), square_root(6, 1)
    generator = torch.Generator().manual_seed(2)
    state: dict = {}
    average, kept = torch.zeros(4, 4), 200
    for step in range(steps):
        # Small enough a rate at the end for the factors to settle.
        rate = 0.1 if step < steps - 2 * kept else 0.01
        grad = left @ torch.randn(4, 6, generator=generator) @ right
        update = psgd_kron_update(grad, state, {**HYPER, **options, "precond_lr": rate})
        if step >= steps - kept:
            average += update @ update.T / 6 / kept
    return state, average


def test_updates_become_white():
    _, average = fitted()
    scaled = average / average.diagonal().mean()
    torch.testing.assert_close(scaled, torch.eye(4), rtol=0, atol=0.3)
    raw = square_root(4, 0) @ square_root(4, 0).T
    raw = raw / raw.diagonal().mean()
    assert (raw - torch.eye(4)).abs().max() > 0.6


def test_factors_stay_upper_triangular_and_the_preconditioner_positive():
    state, _ = fitted(300)
    for key in ("factor_left", "factor_right"):
        q = state[key]
        assert torch.equal(q, torch.triu(q))
        assert torch.linalg.eigvalsh(q.T @ q).min() > 0
        assert (q - torch.diag(q.diagonal())).abs().max() > 0.1


def test_large_sides_and_vectors_are_diagonal():
    weights = [torch.zeros(shape, requires_grad=True) for shape in ((4, 6), (6,), (2, 4, 6))]
    optimizer = PSGDKron(weights, max_size_triangular=5)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    shapes = [
        (tuple(optimizer.state[w]["factor_left"].shape), tuple(optimizer.state[w]["factor_right"].shape))
        for w in weights
    ]
    assert shapes == [((4, 4), (6,)), ((1,), (6,)), ((2, 4, 4), (2, 6))]


def test_a_diagonal_side_whitens_what_it_can():
    state, average = fitted(max_size_triangular=1)
    assert state["factor_left"].shape == (4,)
    diagonal = average.diagonal() / average.diagonal().mean()
    torch.testing.assert_close(diagonal, torch.ones(4), rtol=0, atol=0.3)


def test_rms_is_clipped():
    update = psgd_kron_update(1e3 * torch.ones(4, 6), {}, HYPER)
    assert update.square().mean().sqrt().item() == pytest.approx(1.1, rel=1e-4)


def test_randomness_depends_on_seed_name_and_step_and_on_nothing_else():
    def trajectory(names: list[str], seed: int = 0, disturb: bool = False) -> dict[str, torch.Tensor]:
        weights = {name: torch.zeros(4, 6, requires_grad=True) for name in names}
        optimizer = PSGDKron(list(weights.items()), lr=0.1, seed=seed)
        for step in range(4):
            if disturb:
                torch.manual_seed(step)
            for weight in weights.values():
                weight.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return {name: weight.detach() for name, weight in weights.items()}

    base = trajectory(["a", "b"])
    reordered = trajectory(["b", "c", "a"], disturb=True)
    assert torch.equal(base["a"], reordered["a"]) and torch.equal(base["b"], reordered["b"])
    assert not torch.equal(base["a"], base["b"])
    assert not torch.equal(base["a"], trajectory(["a"], seed=1)["a"])


def test_zero_gradients_leave_the_factors_alone_and_dead_rows_stay():
    state: dict = {}
    for _ in range(3):
        assert not psgd_kron_update(torch.zeros(4, 6), state, HYPER).any()
    assert torch.equal(state["factor_left"], torch.eye(4))
    grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    grad[1] = 0.0
    for _ in range(50):
        update = psgd_kron_update(grad, state, HYPER)
    assert update.isfinite().all()
    # The factors are triangular, not diagonal: other rows may leak into a dead one, but not to full size.
    assert update[1].norm() < 0.3 * update[0].norm()


def test_update_probability():
    assert update_probability(1, 0.03) == update_probability(500, 0.03) == 1.0
    assert update_probability(1500, 0.03) == pytest.approx(0.36788, abs=1e-5)
    assert update_probability(100_000, 0.03) == 0.03
