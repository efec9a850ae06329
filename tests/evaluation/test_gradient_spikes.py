"""Spikes of the gradient's norm, against cases counted by hand."""

from __future__ import annotations

import math

from llmnorm.evaluation.gradient_spikes import joined, norms_of, ratios, summarize


def test_a_spike_is_measured_by_the_median_before_it_and_not_by_itself() -> None:
    norms = [1.0] * 10 + [10.0, 10.5, 1.0]
    assert ratios(norms) == [10.0, 10.5, 1.0]
    found = summarize(list(enumerate(norms, start=1)))
    assert found["spikes"] == 1, "above ten, not at ten"
    assert (found["median"], found["largest"], found["largest_ratio"]) == (1.0, 10.5, 10.5)


def test_a_falling_norm_has_no_spikes_and_a_lasting_rise_has_them_until_it_is_usual() -> None:
    assert max(ratios([1000.0 * 0.9**t for t in range(300)])) < 1
    # Twenty after the rise forty of the 50 before are still low, so the median is; after 26 it is not.
    assert sum(ratio > 10 for ratio in ratios([1.0] * 60 + [20.0] * 60)) == 25


def test_norms_that_are_not_finite_are_counted_apart() -> None:
    rows = [{"step": s, "loss": 1.0, "grad_norm": None if s == 12 else 2.0} for s in range(1, 21)]
    found = summarize(norms_of([*rows, {"step": 20, "eval/loss": 1.0}]))
    assert (found["not_finite"], found["spikes"], found["largest"]) == (1, 0, 2.0)
    assert found["curve"] == [[s, None if s == 12 else 2.0] for s in range(1, 21)]


def test_a_long_run_keeps_its_spikes_in_a_short_curve() -> None:
    points = [(float(s), 50.0 if s == 77_777 else 2 + math.sin(s)) for s in range(1, 100_001)]
    curve = summarize(points)["curve"]
    assert len(curve) <= 2000 and [77_777.0, 50.0] in curve


def test_of_several_runs_the_spikes_add_and_of_none_nothing_is_said() -> None:
    one = summarize([(s, 20.0 if s == 15 else 1.0) for s in range(1, 21)])
    two = summarize([(s, 3.0) for s in range(1, 21)])
    expected = {"median": 2.0, "largest": 20.0, "largest_ratio": 20.0, "spikes": 1, "not_finite": 0}
    assert joined([one, two]) == expected
    assert joined([]) is None
    assert summarize([(1, math.nan)])["median"] is None
