"""Trackers: numbers arrive, a missing package is the user's mistake, a failing one never kills the run."""

import importlib.util

import pytest

from llmnorm.config import TensorBoardSection, TrackioSection, WandbSection
from llmnorm.errors import UserError
from llmnorm.training import tracking
from llmnorm.training.processes import start_processes
from llmnorm.training.tracking import Trackers

start_processes()  # Accelerate's trackers ask which process they are in

ROW = {"step": 3, "loss": 2.5, "lr": 1e-3, "skipped": True, "sample": "text"}


def start(sections, run_dir, step=0, notes=None):
    config = {"seed": 0, "model": {"norm": ["pre_ln"], "preset": None}}
    return Trackers(sections, run_dir, "abc123", step, config, (notes if notes is not None else []).append)


def scalars(folder):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_gets_every_number_under_its_step(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = start([TensorBoardSection(name="tensorboard")], tmp_path)
    trackers.log(ROW)
    trackers.close()
    written = scalars(tmp_path / "tensorboard")
    assert written["loss"] == [(3, 2.5)] and set(written) == {"loss", "lr"}


def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tracking lists wandb, which is not installed; `pip install wandb`"):
        start([WandbSection(name="wandb")], tmp_path)


class Failing:
    """A tracker whose service is away."""

    def __init__(self, at):
        self.at = at
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name == self.at:
                raise ConnectionError("service away")

        return call


def test_a_tracker_that_does_not_start_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(tracking.TRACKERS, "trackio", lambda *args: Failing("start"))
    with pytest.raises(UserError, match=r"trackio did not start.*service away"):
        start([TrackioSection(name="trackio")], tmp_path)


def test_a_tracker_that_fails_later_is_dropped_with_one_note(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    failing = Failing("log")
    monkeypatch.setitem(tracking.TRACKERS, "trackio", lambda *args: failing)
    notes = []
    trackers = start([TrackioSection(name="trackio")], tmp_path, notes=notes)
    trackers.log(ROW)
    trackers.log(ROW)
    trackers.close()
    assert len(notes) == 1 and "trackio failed and is dropped" in notes[0]
    assert failing.calls == ["start", "store_init_configuration", "log"]


def test_a_resumed_run_keeps_its_name(tmp_path, monkeypatch):
    """Weights & Biases and trackio find the run of before the interruption by an id of the run directory."""
    seen = {}
    monkeypatch.setattr(
        "accelerate.tracking.WandBTracker", lambda **options: seen.setdefault("wandb", options)
    )
    monkeypatch.setattr(
        "accelerate.tracking.TrackioTracker", lambda **options: seen.setdefault("trackio", options)
    )
    tracking.TRACKERS["wandb"](WandbSection(name="wandb"), tmp_path / "run", "abc123", 5)
    tracking.TRACKERS["trackio"](TrackioSection(name="trackio"), tmp_path / "run", "abc123", 5)
    assert seen["wandb"]["id"] == "abc123" and seen["wandb"]["resume"] == "allow"
    assert seen["wandb"]["name"] == "run"
    assert seen["trackio"]["name"] == "run-abc123" and seen["trackio"]["resume"] == "allow"
