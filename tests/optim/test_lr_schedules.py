"""Schedules: end points, continuity, monotone decay, the floor, and no state but the update counter."""

import itertools
import math

import pytest

from llmnorm.errors import UserError
from llmnorm.optim import create_schedule
from llmnorm.optim.schedules import DECAY_SHAPES

T, W = 400, 40
WSD = [{"name": "wsd", "decay_shape": shape, "min_lr_ratio": r} for shape in DECAY_SHAPES for r in (0.0, 0.1)]
DECAYING = [
    {"name": "cosine", "min_lr_ratio": 0.1},
    {"name": "cosine", "min_lr_ratio": 0.0},
    {"name": "linear", "min_lr_ratio": 0.0},
    {"name": "linear", "min_lr_ratio": 0.25},
    *WSD,
]


def build(options, max_steps=T, warmup_steps=W):
    return create_schedule(max_steps=max_steps, warmup_steps=warmup_steps, **options)


@pytest.mark.parametrize("options", [*DECAYING, {"name": "constant"}], ids=str)
def test_warm_up_rises_in_equal_steps_and_reaches_the_peak(options):
    schedule = build(options)
    assert [schedule.multiplier(t) for t in range(W)] == [(t + 1) / W for t in range(W)]
    assert schedule.multiplier(W) == 1.0


@pytest.mark.parametrize("options", DECAYING, ids=str)
def test_decay_ends_at_the_floor_never_below_never_rising_never_jumping(options):
    schedule = build(options)
    values = [schedule.multiplier(t) for t in range(W, T + 1)]
    assert values[-1] == pytest.approx(options["min_lr_ratio"], abs=1e-12)
    assert schedule.multiplier(T + 1000) == pytest.approx(options["min_lr_ratio"], abs=1e-12)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert min(values) >= options["min_lr_ratio"] - 1e-12
    # The steepest step of any shape: sqrt, 1/sqrt(80) in its first update.
    assert max(earlier - later for earlier, later in itertools.pairwise(values)) < 0.12


@pytest.mark.parametrize(
    ("options", "update", "expected"),
    [
        ({"name": "cosine", "min_lr_ratio": 0.1}, 220, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))),
        ({"name": "cosine", "min_lr_ratio": 0.1}, 130, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25))),
        ({"name": "linear", "min_lr_ratio": 0.0}, 220, 0.5),
        ({"name": "wsd", "decay_shape": "linear"}, 360, 0.5),
        ({"name": "wsd", "decay_shape": "sqrt"}, 340, 0.5),
        ({"name": "wsd", "decay_shape": "square"}, 360, 0.75),
        ({"name": "wsd", "decay_shape": "cosine", "min_lr_ratio": 0.2}, 360, 0.2 + 0.8 * 0.5),
        ({"name": "wsd", "decay_shape": "exponential"}, 360, (2**-5 - 2**-10) / (1 - 2**-10)),
        ({"name": "wsd", "decay_steps": 40, "decay_shape": "linear"}, 380, 0.5),
        ({"name": "constant"}, 399, 1.0),
    ],
)
def test_values_follow_the_formula(options, update, expected):
    assert build(options).multiplier(update) == pytest.approx(expected, rel=1e-12)


def test_wsd_is_at_the_peak_until_the_decay():
    schedule = build({"name": "wsd", "decay_fraction": 0.2})
    assert {schedule.multiplier(t) for t in range(W, 321)} == {1.0}
    assert schedule.multiplier(321) < 1.0


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_a_warm_up_longer_than_the_run_only_warms_up(name):
    schedule = build({"name": name}, max_steps=10, warmup_steps=20)
    assert [schedule.multiplier(t) for t in range(10)] == [(t + 1) / 20 for t in range(10)]


def test_no_decay_fraction_means_no_decay():
    assert build({"name": "wsd", "decay_fraction": 0.0}).multiplier(T - 1) == 1.0


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("cosin", {}, "schedule.name"),
        ("linear", {"decay_shape": "sqrt"}, "schedule.decay_shape"),
        ("wsd", {"decay_shape": "cube"}, "schedule.decay_shape='cube'"),
        ("constant", {"min_lr_ratio": 0.1}, "schedule.min_lr_ratio"),
        ("cosine", {"warmup_steps": -1}, "schedule.warmup_steps=-1"),
    ],
)
def test_mistakes_name_the_key(name, options, word):
    with pytest.raises(UserError, match=word):
        create_schedule(name, 10, **options)
