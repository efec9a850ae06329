"""Guards: what is skipped, when a run stops and what it says, which loss is a spike, and exact restoring."""

import json
import math

import pytest

from llmnorm.config import GuardSection, SpikeSection
from llmnorm.training.guards import Guards, TrainingStopped, Verdict

SAMPLES = range(320, 352)
NAN, INF = math.nan, math.inf


def judge(guards, loss, grad_norm=1.0, step=11):
    return guards.judge(step, loss, grad_norm, SAMPLES)


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (2.0, NAN), (2.0, INF), (-INF, 1.0)])
def test_a_non_finite_loss_or_gradient_skips_the_update(loss, norm):
    guards = Guards(GuardSection())
    assert judge(guards, loss, norm) is Verdict.SKIP
    assert judge(guards, 2.0) is Verdict.APPLY
    assert guards.skipped == 1


def test_only_updates_in_a_row_count_towards_the_limit():
    guards = Guards(GuardSection(non_finite_limit=2))
    for _ in range(4):
        assert judge(guards, NAN) is Verdict.SKIP
        assert judge(guards, 2.0) is Verdict.APPLY


def test_the_run_stops_naming_the_step_the_samples_and_a_remedy():
    guards = Guards(GuardSection(non_finite_limit=3))
    judge(guards, NAN, step=9)
    judge(guards, NAN, step=10)
    with pytest.raises(TrainingStopped) as stop:
        judge(guards, NAN, step=11)
    for word in ("step 11", "samples 320 to 351", "guards.non_finite_limit=3", "of step 8", "optimizer.lr"):
        assert word in str(stop.value)


def spiky(**options):
    return Guards(GuardSection(spike=SpikeSection(window=8, threshold=4.0, **options)))


def test_a_spike_is_a_loss_far_above_the_window_and_is_not_added_to_it():
    guards = spiky()
    losses = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 2.0]
    assert all(judge(guards, loss) is Verdict.APPLY for loss in losses)
    mean, deviation = 2.0, math.sqrt(4 * 0.01 / 7)
    assert judge(guards, mean + 3.9 * deviation) is Verdict.APPLY
    guards.restore({**guards.state(), "window": losses})
    assert judge(guards, mean + 4.1 * deviation) is Verdict.ROLL_BACK
    assert list(guards.window) == losses


def test_nothing_is_a_spike_before_the_window_is_full_or_without_the_option():
    guards = spiky()
    assert [judge(guards, loss) for loss in (2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 90.0)] == [Verdict.APPLY] * 8
    plain = Guards(GuardSection())
    assert [judge(plain, loss) for loss in (*[2.0, 2.1] * 8, 90.0)] == [Verdict.APPLY] * 17


def test_roll_backs_are_limited():
    guards = spiky(max_rollbacks=1)
    for loss in [2.0, 2.1] * 4:
        judge(guards, loss)
    assert judge(guards, 90.0) is Verdict.ROLL_BACK
    with pytest.raises(TrainingStopped, match=r"step 11.*samples 320 to 351.*max_rollbacks=1"):
        judge(guards, 90.0)


def test_state_survives_json_to_the_last_bit():
    guards = spiky()
    for loss in (1 / 3, 2 / 3, NAN, 1e-30, 0.1):
        judge(guards, loss)
    again = spiky()
    again.restore(json.loads(json.dumps(guards.state())))
    assert again.state() == guards.state()
    assert again.window.maxlen == 8
