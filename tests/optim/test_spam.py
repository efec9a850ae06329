"""SPAM and Stable-SPAM: golden runs, some of the released classes, and what clip and reset promise."""

from __future__ import annotations

import math

import pytest
import torch

from llmnorm.errors import UserError
from llmnorm.optim.spam import SPAM, spam_update, warm_restart
from llmnorm.optim.stable_spam import StableSPAM, clocks, cosine_scale, stabilized

GRADIENTS = [
    (0.1, -0.2, 0.3, -0.05),
    (0.12, -0.1, 0.25, 0.04),
    (0.09, -4.0, 0.2, 0.01),
    (-0.2, 0.15, 0.22, -0.3),
    (0.05, 0.3, -0.1, 0.2),
    (9.0, 0.1, -0.1, 0.2),
]
PRINTED = {"rtol": 0, "atol": 2e-9}


def walk(optimizer_class: type, steps: int, **options):
    """(weight, state) after each of the golden gradients."""
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_class([{"params": [("w", parameter)], "role": "vector"}], lr=0.01, **options)
    for values in GRADIENTS[:steps]:
        parameter.grad = torch.tensor(values, dtype=torch.float64)
        optimizer.step()
        yield parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}


SPAM_WEIGHTS = [
    (-0.009996839, 0.009998419, -0.009998946, 0.009993679),
    (-0.020000944, 0.019318897, -0.019909872, 0.010574643),
    (-0.029890809, 0.028090939, -0.029641322, 0.010032340),
    (-0.029832705, 0.028032839, -0.029699426, 0.010090447),
    (-0.029299426, 0.026936402, -0.030042360, 0.010254622),
    (-0.031095230, 0.023232023, -0.029923318, 0.009378017),
]


def test_golden_spam():
    options = {"threshold": 5000.0, "reset_interval": 4, "grace_steps": 2, "warmup_steps": 3, "eps": 1e-6}
    for (weight, _), expected in zip(walk(SPAM, 6, **options), SPAM_WEIGHTS, strict=True):
        torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64), **PRINTED)


def test_golden_spam_warm_restart():
    expected = (1, 1, 1, 0.01, 0.154982143, 0.505)
    assert [warm_restart(step, 4, 3) for step in range(1, 7)] == pytest.approx(expected, abs=1e-9)


INTENDED = [
    (-0.01, 0.01, -0.01, 0.009999999),
    (-0.019912642, 0.019618039, -0.020007402, 0.009508171),
    (-0.029912640, 0.029618039, -0.030007401, -0.000491812),
    (-0.023496062, 0.033809844, -0.039017533, 0.006878078),
    (-0.020390634, 0.033028089, -0.042525420, 0.007689273),
]
RELEASED = [
    *INTENDED[:2],
    (-0.032947069, 0.034468208, -0.033082763, 0.008596266),
    (-0.025505701, 0.027026840, -0.040524131, 0.016037634),
    (-0.021518291, 0.018762989, -0.043042013, 0.017184888),
]
LIMITS = {
    "paper": (0.3, 0.274987494, 1.517900828, 1.212968528, 1.030009269),
    "released": (0.3, 0.274987494, 1.517900828, 2.423512331, 1.714966578),
}
NORMS = {
    "paper": (0.999999974, 0.978315182, 0.907532020, 0.833183044, 0.772515204),
    "released": (0.999999974, 0.978315182, 0.907532020, 0.922757121, 0.795757686),
}


@pytest.mark.parametrize(("variant", "weights"), [("paper", INTENDED), ("released", RELEASED)])
def test_golden_stable_spam(variant, weights):
    options = {"gammas": (0.7, 0.9, 0.999), "eps": 1e-8, "reset_interval": 3, "variant": variant}
    for (weight, _), expected in zip(walk(StableSPAM, 5, **options), weights, strict=True):
        torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64), **PRINTED)


def released_stable_spam(steps, gap, total):
    """Weights after each golden gradient, number by number as the released class computes them."""
    betas, gammas, eps, lr = (0.9, 0.999), (0.7, 0.9, 0.999), 1e-8, 0.01
    weights, first, second = [0.0] * 4, [0.0] * 4, [0.0] * 4
    largest = mean = power = 0.0
    clock = 0
    for step in range(1, steps + 1):
        scale = 0.5 + (1 - 0.5) * (1 + math.cos(math.pi * step / (total + 1))) / 2
        g, clock = list(GRADIENTS[step - 1]), clock + 1
        greatest = max(map(abs, g))
        largest = gammas[2] * largest + (1 - gammas[2]) * greatest
        limit = largest / (1 - gammas[2] ** clock)
        g = [x / greatest * limit if abs(x) > limit else x for x in g]
        norm, fade = math.hypot(*g), gammas[0] * scale
        mean = fade * mean + (1 - fade) * norm
        power = gammas[1] * power + (1 - gammas[1]) * norm**2
        size = mean / (1 - fade**clock) / (math.sqrt(power / (1 - gammas[1] ** clock)) + eps)
        g = [x / norm * size for x in g]
        resets = step % gap == 0
        clock = 1 if resets else clock
        beta1, beta2 = betas[0] * scale, betas[1]
        first = [beta1 * m + (1 - beta1) * x for m, x in zip(first, g, strict=True)]
        second = [beta2 * v + (1 - beta2) * x * x for v, x in zip(second, g, strict=True)]
        for i, (m, v) in enumerate(zip(first, second, strict=True)):
            weights[i] -= lr / (1 - beta1**clock) * m / (math.sqrt(v) / math.sqrt(1 - beta2**clock) + eps)
        if resets:
            first, second = [0.0] * 4, [0.0] * 4
        yield list(weights)


@pytest.mark.parametrize("total", [10, 2], ids=["within its cosine", "beyond it"])
def test_released_stable_spam_with_its_cosine_is_the_released_class_in_plain_numbers(total):
    options = {"eps": 1e-8, "reset_interval": 3, "variant": "released", "cosine_steps": total}
    expected = released_stable_spam(6, 3, total)
    for (weight, _), numbers in zip(walk(StableSPAM, 6, **options), expected, strict=True):
        torch.testing.assert_close(weight, torch.tensor(numbers, dtype=torch.float64), rtol=0, atol=1e-15)
    *_, (without, _) = walk(StableSPAM, 6, eps=1e-8, reset_interval=3, variant="released")
    assert (weight - without).abs().max() > 1e-5, "the cosine says something"


def test_the_plain_numbers_above_are_the_golden_released_run_where_the_cosine_is_flat():
    for numbers, expected in zip(released_stable_spam(5, 3, 10**9), RELEASED, strict=True):
        assert numbers == pytest.approx(expected, abs=2e-9)


def test_the_cosine_falls_to_half_and_stays_but_rises_again_as_released():
    assert [cosine_scale(s, 3, "paper") for s in (0, 2, 4, 5, 8)] == pytest.approx([1, 0.75, 0.5, 0.5, 0.5])
    assert [cosine_scale(s, 3, "released") for s in (4, 6, 8)] == pytest.approx([0.5, 0.75, 1])
    assert cosine_scale(7, None, "paper") == 1
    with pytest.raises(UserError, match="cosine_steps=0 must be an integer of at least 1, or null"):
        StableSPAM([torch.zeros(4, 4)], cosine_steps=0)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_golden_stable_spam_clip_and_norm(variant):
    state: dict = {}
    hyper = {"gammas": (0.7, 0.9, 0.999), "eps": 1e-8}
    for step, (values, limit, norm) in enumerate(
        zip(GRADIENTS[:5], LIMITS[variant], NORMS[variant], strict=True), 1
    ):
        clock = clocks(step, 3, variant, "restart").averages
        g = stabilized(torch.tensor(values, dtype=torch.float64), state, hyper, clock)
        assert state["largest_avg"].item() / (1 - 0.999**clock) == pytest.approx(limit, abs=1e-9)
        assert torch.linalg.vector_norm(g).item() == pytest.approx(norm, abs=1e-9)


def test_o16_adaclip_clips_to_its_average_and_nothing_on_the_first_step():
    state: dict = {}
    hyper = {"gammas": (0.0, 0.0, 0.999), "eps": 1e-8}
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, generator=generator, dtype=torch.float64)
    g = stabilized(first, state, hyper, 1)
    torch.testing.assert_close(g, first / (first.norm() + 1e-8), rtol=1e-7, atol=0)
    spiked = 0.5 * first
    spiked[7] = -100.0
    g = stabilized(spiked, state, hyper, 2)
    limit = state["largest_avg"].item() / (1 - 0.999**2)
    clipped = spiked.clone()
    clipped[7] = -limit
    torch.testing.assert_close(g, clipped / clipped.norm(), rtol=1e-7, atol=0)


def test_a_row_without_a_gradient_in_the_grace_steps_rests_until_the_next_reset():
    """Its second moment is zero, and theta V with it: every later gradient is a spike, clipped to it."""
    weight = torch.zeros(2, 3, requires_grad=True)
    optimizer = SPAM([("w", weight)], lr=0.1, reset_interval=6, grace_steps=2, warmup_steps=0)
    moved = []
    for step in range(1, 8):
        weight.grad = torch.ones(2, 3)
        if step <= 2:
            weight.grad[1] = 0
        before = weight.detach().clone()
        optimizer.step()
        moved.append(bool((weight.detach() != before)[1].all()))
    assert moved == [False] * 5 + [True, True]


@pytest.mark.parametrize(("reset_clock", "size"), [("restart", 1.0), ("global", 3.162)])
def test_o17_the_first_update_after_a_reset(reset_clock, size):
    options = {"reset_interval": 900, "reset_clock": reset_clock, "gammas": (0.0, 0.0, 0.0)}
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = StableSPAM([{"params": [("w", parameter)], "role": "vector"}], lr=0.01, **options)
    for _ in range(900):
        before = parameter.item()
        parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
    # In the global clock (1 - b1) / sqrt(1 - b2) times sqrt(1 - b2^900).
    expected = size * (1 if reset_clock == "restart" else math.sqrt(1 - 0.999**900))
    assert (before - parameter.item()) / 0.01 == pytest.approx(expected, rel=1e-3)


def test_clocks_of_the_released_code_inflate_the_clip_threshold_after_a_reset():
    assert [clocks(s, 3, "released", "restart") for s in (2, 3, 4, 5, 6, 7)] == [
        (2, 2, False),
        (3, 1, True),
        (2, 2, False),
        (3, 3, False),
        (4, 1, True),
        (2, 2, False),
    ]
    assert clocks(4, 3, "paper", "restart") == (4, 2, False)
    assert clocks(3, 3, "paper", "global") == (3, 3, True)
    assert clocks(1000, 0, "paper", "restart") == (1000, 1000, False)


def test_o18_spam_clips_a_spike_to_the_root_of_theta_v():
    hyper = {
        "threshold": 5000.0, "reset_interval": 500, "grace_steps": 20, "warmup_steps": 150, "eps": 1e-6,
        "reset_clock": "global", "betas": (0.9, 0.999), "state_dtype": "param", "lr": 1.0,
        "weight_decay": 0.0,
    }  # fmt: skip
    state: dict = {}
    constant, weight = torch.full((1,), 2.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for _ in range(40):
        spam_update(constant, state, hyper, weight)
    mean = state["exp_avg"].clone()
    spike = torch.full((1,), -1e6, dtype=torch.float64)
    spam_update(spike, state, hyper, weight)
    entered = (state["exp_avg"] - 0.9 * mean) / 0.1
    assert entered.item() == pytest.approx(-math.sqrt(5000 * 4 * (1 - 0.999**40)), rel=1e-12)
    assert spike.item() == -1e6  # the caller's gradient is left alone


def test_a_warm_restart_that_never_ends_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps=1000 must be below optimizer.reset_interval=500"):
        SPAM([torch.zeros(4, 4)], warmup_steps=1000)


def test_a_zero_gradient_stays_one():
    state: dict = {}
    g = stabilized(torch.zeros(3, 2), state, {"gammas": (0.7, 0.9, 0.999), "eps": 1e-8}, 1)
    assert torch.equal(g, torch.zeros(3, 2))


MASKED = {
    "density": 0.25, "reset_interval": 4, "grace_steps": 2, "warmup_steps": 3, "threshold": 1.0,
    "reset_clock": "restart", "seed": 3,
}  # fmt: skip


def masked_run(steps: int, **options):
    """(weights, state) of a 6 x 8 hidden matrix, before the first update and after each."""
    generator = torch.Generator().manual_seed(1)
    parameter = torch.randn(6, 8, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = SPAM([("w", parameter)], lr=0.01, **{**MASKED, **options})
    yield parameter.detach().clone(), {}
    for _ in range(steps):
        parameter.grad = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        optimizer.step()
        yield parameter.detach().clone(), {k: v.clone() for k, v in optimizer.state[parameter].items()}


def test_masked_spam_is_spam_on_its_places_and_rests_elsewhere():
    run = list(masked_run(9, weight_decay=0.5))
    generator = torch.Generator().manual_seed(1)
    torch.randn(6, 8, generator=generator, dtype=torch.float64)
    plain, optimizer, held = None, None, None
    for step in range(1, 10):
        grad = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        (before, _), (after, state) = run[step - 1], run[step]
        places = state["places"].long()
        if step % 4 == 0 or step == 1:
            assert held is None or not torch.equal(held, places)
            held = places
        assert torch.equal(places, held)
        moved = torch.zeros(6, 8, dtype=torch.bool).scatter_(-1, places, True)
        assert moved.sum(-1).tolist() == [2] * 6
        assert torch.equal(after[~moved], before[~moved])
        if plain is None:
            plain = before.clone().requires_grad_()
            optimizer = SPAM([("w", plain)], lr=0.01, weight_decay=0.5, **{**MASKED, "density": 1.0})
        # The moments of plain SPAM start at zero with every reset too, so its steps are the same there.
        plain.grad = grad
        with torch.no_grad():
            plain.copy_(before)
        optimizer.step()
        torch.testing.assert_close(after[moved], plain.detach()[moved], rtol=1e-12, atol=0)


def test_masked_spam_state_is_its_share_to_the_byte_and_vectors_are_whole():
    parameter, gain = torch.randn(16, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    optimizer = SPAM([("w", parameter), ("g", gain)], lr=0.01, density=0.25)
    parameter.grad, gain.grad = torch.randn(16, 64), torch.randn(64)
    optimizer.step()
    sizes = [
        sum(t.numel() * t.element_size() for t in optimizer.state[p].values()) for p in (parameter, gain)
    ]
    assert sizes == [(2 * 4 + 4) * 16 * 16 + 4, 2 * 4 * 64 + 4]
    assert [optimizer.state_bytes(group, group["params"][0]) for group in optimizer.param_groups] == sizes


def test_masked_spam_places_depend_on_seed_and_name_only():
    state = [list(masked_run(1))[1][1]["places"]]
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(list(masked_run(1))[1][1]["places"], state[0])
    assert not torch.equal(list(masked_run(1, seed=4))[1][1]["places"], state[0])


@pytest.mark.parametrize("at", [1, 5])
def test_o22_masked_spam_resumes_to_the_bit(at):
    def build():
        parameter = torch.ones(6, 8, requires_grad=True)
        return parameter, SPAM([("w", parameter)], lr=0.01, **MASKED)

    gradients = torch.randn(10, 6, 8, generator=torch.Generator().manual_seed(5))
    whole, optimizer = build()
    first, other = build()
    for step, grad in enumerate(gradients):
        if step == at:
            weight, saved = first.detach().clone(), other.state_dict()
            first, other = build()
            first.data.copy_(weight)
            other.load_state_dict(saved)
        for parameter, method in ((whole, optimizer), (first, other)):
            parameter.grad = grad
            method.step()
    assert torch.equal(whole, first)
    assert other.state[first]["places"].dtype == torch.int32


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(UserError, match=r"optimizer.density=.* must be greater than 0 and at most 1"):
        SPAM([torch.zeros(4, 4)], density=density)
