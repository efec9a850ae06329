"""A run that stands still is ended and says where; one that is merely slow is left alone."""

from __future__ import annotations

import json
import re
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore
from torchrun import torchrun

from llmnorm.training.watchdog import Watchdog

# Rank 1 of a real run stops for good in the middle of step 4.
STANDS_STILL = """
import os, sys, time
from llmnorm.config import load_run_config
from llmnorm.errors import exit_on_user_error
from llmnorm.training import train
from llmnorm.training.update import Update

def wait_for_godot(apply=Update.apply, calls=[]):
    def patched(self, *args):
        calls.append(1)
        if len(calls) == 4 and os.environ["RANK"] == "1":
            stand_still()
        return apply(self, *args)
    return patched

def stand_still():
    time.sleep(3600)

Update.apply = wait_for_godot()
with exit_on_user_error():
    train(load_run_config(sys.argv[-1]))
"""


@pytest.fixture
def ended(monkeypatch):
    """What a watchdog would have ended the process for, instead of the end."""
    found = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, note, stood: found.append((note.step, note.act)))
    return found


def test_a_slow_run_is_left_alone(ended):
    """Every act is shorter than the timeout, or patient; all together are longer."""
    with Watchdog(0.6) as watchdog:
        for step in range(3):
            watchdog.at(step, "reading its data")
            time.sleep(0.2)
            watchdog.at(step, "computing")
            time.sleep(0.2)
        watchdog.at(3, "evaluating", patient=True)
        time.sleep(1.2)
    assert ended == []


def test_an_act_that_does_not_end_is_noticed_and_named(ended):
    with Watchdog(0.3) as watchdog:
        watchdog.at(7, "reading its data")
        watchdog.at(7, "computing")
        time.sleep(1.0)
    assert ended and set(ended) == {(7, "computing")}


def test_without_a_timeout_nothing_is_watched(ended):
    with Watchdog(None) as watchdog:
        watchdog.at(7, "computing")
        assert watchdog._thread is None


def test_others_know_of_a_process_before_its_first_look(ended, monkeypatch):
    """One that stops for good within the first seconds has begun, and where is known."""
    store = HashStore()
    monkeypatch.setattr("llmnorm.training.watchdog.launcher_store", lambda *_, **__: store)
    with Watchdog(3600, rank=1, world_size=2):
        store.set_timeout(timedelta(seconds=2))  # the first look is after 5
        assert json.loads(store.get("1"))[2] == "starting"


@pytest.mark.distributed
@pytest.mark.parametrize("own_store", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_hang_names_its_rank_and_step_shows_stacks_and_ends_the_run(run_config, tmp_path, own_store):
    """Under torchrun: one of two processes stops in step 4, the other waits for it in the collectives. The
    notes travel through the launcher's store or, as on several nodes, through that of the processes."""
    script = tmp_path / "stands_still.py"
    script.write_text(STANDS_STILL, encoding="utf-8")
    config = run_config(**{"train.hang_timeout": 6, "evaluation.at_start": False})
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store}
    with torchrun(config, tmp_path, script=script, **store) as launcher:
        assert launcher.wait(timeout=300) == 1
    output = (tmp_path / "log").read_text(encoding="utf-8")
    stood = r"rank 1 of 2 \(process \d+ on \S+\) stands still: step 4, updating weights for \d+ s"
    assert re.search(stood + r" \(train\.hang_timeout=6\)", output), output
    assert re.search(r"rank 0 of 2 \(process \d+ on \S+\) stands still: step 4, saving", output), output
    assert output.count("The others wait for rank 1: step 4, updating weights for") == 2, output
    assert re.search(r"stands_still\.py\", line \d+ in stand_still", output), output
    assert "exitcode  : 3" in output, output
