"""Refined and inverse-square-root schedules: golden vectors, limits and what a log must have."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from llmnorm.errors import UserError
from llmnorm.optim import create_schedule
from llmnorm.optim.refined_schedule import refine, smoothed


def write_log(path: Path, norms: list[float]) -> str:
    rows = [{"step": step, "loss": 1.0, "grad_norm": norm} for step, norm in enumerate(norms, 1)]
    rows.insert(3, {"step": 3, "eval/loss": 2.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "power, expected",
    [
        (2, [1, 0.470548, 0.224856, 0.101313, 0.035823, 0]),
        (1, [1, 0.618213, 0.371850, 0.204364, 0.086048, 0]),
    ],
)
def test_golden_vectors(power, expected):
    got = refine(torch.linspace(1, 2, 6, dtype=torch.float64), power)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("power", [1, 2])
def test_constant_norms_give_linear_decay(power):
    steps = 200
    got = refine(torch.full((steps,), 3.0), power)
    expected = torch.tensor([(steps - 1 - t) / (steps - 1) for t in range(steps)], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_large_early_norms_give_a_warm_up():
    norms = torch.ones(500)
    norms[:100] = torch.linspace(10, 1, 100)
    rates = refine(norms, 1)
    assert rates.argmax() > 60
    assert rates[0] < 0.2


def test_the_median_filter_removes_spikes_and_keeps_the_ends():
    norms = torch.linspace(1, 2, 101, dtype=torch.float64)
    spiked = norms.clone()
    spiked[50] = 100.0
    # Width 11: away from the ends the median of a line is the line, a spike moves it by one place at most.
    assert (smoothed(spiked, 0.1)[5:-5] - norms[5:-5]).abs().max() <= 0.0101
    assert smoothed(norms, 0.1)[0] == norms[0]
    # The end is mirrored: the median of the last window is three places before the end.
    assert smoothed(norms, 0.1)[-1].item() == pytest.approx(norms[-3].item(), abs=0.011)


def test_a_run_of_another_length_follows_the_same_curve(tmp_path):
    file = write_log(tmp_path / "metrics.jsonl", [5.0] * 304)
    schedule = create_schedule("refined", 1000, metrics_file=file, min_lr_ratio=0.1)
    for update in (0, 250, 999, 1000, 2000):
        expected = 0.1 + 0.9 * (1 - min(1.0, update / 1000))
        assert schedule.multiplier(update) == pytest.approx(expected, abs=1e-9)
    warm = create_schedule("refined", 1000, metrics_file=file, warmup_steps=10)
    assert warm.multiplier(0) == pytest.approx(0.1)
    assert warm.multiplier(500) == pytest.approx(0.5, abs=1e-9)


def test_long_logs_are_resampled(tmp_path):
    file = write_log(tmp_path / "metrics.jsonl", [2.0] * 12_000)
    schedule = create_schedule("refined", 100, metrics_file=file)
    assert len(schedule.rates) == 10_000
    assert schedule.multiplier(50) == pytest.approx(0.5, abs=1e-6)


def test_logs_that_cannot_serve_are_refused(tmp_path):
    few = write_log(tmp_path / "few.jsonl", [1.0] * 30 + [math.inf] * 30)
    with pytest.raises(UserError, match=r"28 usable gradient norms.*at least 50"):
        create_schedule("refined", 100, metrics_file=few)
    with pytest.raises(UserError, match=r"schedule\.metrics_file=.*missing"):
        create_schedule("refined", 100, metrics_file=str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match=r"schedule\.metrics_file is needed"):
        create_schedule("refined", 100)
    (tmp_path / "text.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="cannot be read"):
        create_schedule("refined", 100, metrics_file=str(tmp_path / "text.jsonl"))
    with pytest.raises(UserError, match=r"schedule\.weighting='l1'"):
        create_schedule("refined", 100, metrics_file=few, weighting="l1")


def test_inverse_square_root():
    schedule = create_schedule("inverse_sqrt", 1000, warmup_steps=100)
    assert [schedule.multiplier(t) for t in (0, 49, 99, 100)] == pytest.approx([0.01, 0.5, 1.0, 1.0])
    assert schedule.multiplier(400) == pytest.approx(0.5)
    assert schedule.multiplier(10_000) == pytest.approx(0.1)
    plain = create_schedule("inverse_sqrt", 1000)
    assert [plain.multiplier(t) for t in (0, 1, 4)] == [1.0, 1.0, 0.5]
    values = [schedule.multiplier(t) for t in range(100, 1000)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
