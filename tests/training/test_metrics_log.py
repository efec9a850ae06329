"""metrics.jsonl: whole lines whatever happens, nothing beyond the step a run resumes from, valid JSON."""

import json
import math
import os

import pytest

from llmnorm.errors import UserError
from llmnorm.training.metrics import MetricsLog


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def step(number, loss=1.0):
    return {"step": number, "loss": loss}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_each_row_is_a_line_at_once(path):
    log = MetricsLog(path)
    for number in (1, 2):
        log.write(step(number, loss=number / 3))
        assert rows(path)[-1] == {"step": number, "loss": number / 3}
        assert path.read_bytes().endswith(b"\n")


def test_numbers_that_are_not_finite_become_null(path):
    log = MetricsLog(path)
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    assert rows(path) == [{"step": 1, "loss": None, "grad_norm": None}]


def test_resuming_drops_later_rows_and_torn_lines(path):
    log = MetricsLog(path)
    for number in range(1, 6):
        log.write(step(number))
    log.write({"step": 3, "eval/loss": 2.5})
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    log = MetricsLog(path, resume_step=3)
    log.write(step(4, loss=9.0))
    assert rows(path) == [step(1), step(2), step(3), {"step": 3, "eval/loss": 2.5}, step(4, loss=9.0)]


def test_kept_lines_keep_their_bytes(path):
    original = b'{"step": 1, "loss": 0.1000000000000000055511151231257827, "sample": "\xc3\xa9"}\n'
    path.write_bytes(original + b'{"step": 2, "loss": 1.0}\n')
    MetricsLog(path, resume_step=1)
    assert path.read_bytes() == original


def test_a_fresh_run_starts_an_empty_file(path):
    path.write_text('{"step": 1}\n')
    MetricsLog(path)
    assert path.read_text() == ""


def test_resuming_without_a_file_starts_one(path):
    MetricsLog(path, resume_step=7).write(step(8))
    assert rows(path) == [step(8)]


def test_it_knows_which_evaluations_and_samples_are_written(path):
    log = MetricsLog(path)
    log.write({"step": 2, "eval/loss": 1.0})
    log.write({"step": 4, "sample": "text"})
    again = MetricsLog(path, resume_step=3)
    assert log.has(2, "eval/loss") and log.has(4, "sample") and not log.has(4, "eval/loss")
    assert again.has(2, "eval/loss") and not again.has(4, "sample")


def test_rolling_back_cuts_the_rows_that_no_longer_happened(path):
    log = MetricsLog(path)
    for number in range(1, 5):
        log.write(step(number))
    log.write({"step": 4, "eval/loss": 1.0})
    log.cut_after(2)
    log.write(step(3, loss=7.0))
    assert rows(path) == [step(1), step(2), step(3, loss=7.0)]
    assert not log.has(4, "eval/loss")


def test_a_full_disk_is_a_user_error(path, monkeypatch):
    log = MetricsLog(path)

    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No space left"):
        log.write(step(1))
