"""train.py under a real torchrun: mistakes, deaths and signals end a run with a clear word and no hang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torchrun import ranks_of, torchrun

from llmnorm.checkpoint import published_steps
from llmnorm.training import train

pytestmark = pytest.mark.distributed


def wait_for_row(launcher: subprocess.Popen[bytes], run: Path, count: int) -> None:
    deadline, file = time.monotonic() + 300, run / "metrics.jsonl"
    while not file.exists() or file.read_text(encoding="utf-8").count("\n") < count:
        assert launcher.poll() is None, "the launcher ended early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass(frozen=True)
class Mistake:
    """Changes of the config, and what the paragraph must name."""

    changes: dict[str, Any]
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    hidden: str | None = None  # a package that the processes must not find


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
MISTAKES = {
    "micro-batch": Mistake({"train.micro_batch_size": 4}, ["train.micro_batch_size=4", "2 processes"]),
    "batch": Mistake({"train.global_batch_size": 3}, ["train.global_batch_size=3", "2 processes"]),
    "strategy": Mistake({"parallel.strategy": "none"}, ["parallel.strategy=none", "started 2 processes"]),
    "launcher": Mistake(
        {"parallel.strategy": "ddp"}, ["parallel.strategy=ddp contradicts the launcher", "fsdp2"], FSDP2
    ),
    "replicas": Mistake(
        {"parallel.strategy": "fsdp2", "parallel.replicas": 3}, ["parallel.replicas=3", "2 processes"]
    ),
    "class": Mistake(
        {"optimizer": {"class_path": "torch.optim.Adafactor", "lr": 1e-3}, "parallel.strategy": "fsdp2"},
        ["torch.optim.Adafactor looks beyond the rows", "parallel.strategy: ddp"],
    ),
    "deepspeed": Mistake(
        {"parallel.strategy": "deepspeed"},
        ["parallel.strategy=deepspeed", "not installed", "pip install 'llmnorm[deepspeed]'"],
        hidden="deepspeed",
    ),
}


def said_once_and_last(log: Path, words: list[str], processes: int = 2) -> None:
    """One paragraph without a traceback, then the launcher's report, of exit code 2 for every rank."""
    output = log.read_text(encoding="utf-8")
    assert output.count("error: ") == 1, output
    ours, paragraph = output.partition("error: ")[::2]
    paragraph, _, report = paragraph.partition("\n")
    assert all(word in paragraph for word in words), paragraph
    assert "Traceback" not in ours
    assert re.match(r"[EW]\d{4} .*torch/distributed/elastic", report), report
    assert len(re.findall(r"exitcode  : 2 ", report)) == processes, report


@pytest.mark.parametrize(
    "name",
    [name if name == "micro-batch" else pytest.param(name, marks=pytest.mark.slow) for name in MISTAKES],
)
def test_a_mistake_is_said_once_last_and_by_exit_code_2_of_every_rank(run_config, tmp_path, name):
    mistake = MISTAKES[name]
    environment = dict(mistake.environment)
    if mistake.hidden:
        # To `find_spec` and `import` a module that is None is one that is not there.
        line = f"import sys; sys.modules[{mistake.hidden!r}] = None\n"
        (tmp_path / "sitecustomize.py").write_text(line, encoding="utf-8")
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    with torchrun(run_config(**mistake.changes), tmp_path, **environment) as launcher:
        assert launcher.wait(timeout=300) == 1  # torchrun's own, whatever its processes return
    said_once_and_last(tmp_path / "log", mistake.words)
    assert not (tmp_path / "run").exists()


LATE = """
import os, time
from llmnorm.errors import UserError, exit_on_user_error

if os.environ["RANK"] == "0":
    time.sleep(2)
with exit_on_user_error():
    raise UserError("train.max_steps=0 is no number of updates")
"""


@pytest.mark.parametrize("own_store", ["0", "1"])
def test_a_mistake_waits_for_the_first_process_that_prints_it(run_config, tmp_path, own_store):
    """The launcher ends all as soon as one has ended; with or without a store of the launcher's."""
    (tmp_path / "late.py").write_text(LATE, encoding="utf-8")
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store}
    with torchrun(run_config(), tmp_path, script=tmp_path / "late.py", **store) as launcher:
        assert launcher.wait(timeout=120) == 1
    said_once_and_last(tmp_path / "log", ["train.max_steps=0"])


@pytest.mark.slow
def test_a_run_does_not_go_on_with_processes_that_its_batch_cannot_be_dealt_to(run_config, tmp_path):
    """Four sequences per update on three processes: refused, and what one process saved stays as it is."""
    run = tmp_path / "run"
    train(run_config(**{"train.max_steps": 2}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert any("step_2" in str(path) for path in before)
    three = ("--nproc_per_node=3",)
    with torchrun(run_config(**{"train.max_steps": 4}), tmp_path, three) as launcher:
        assert launcher.wait(timeout=300) == 1
    said_once_and_last(tmp_path / "log", ["train.global_batch_size=4", "3 processes"], processes=3)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_with_a_clear_word(run_config, tmp_path):
    with torchrun(run_config(**{"train.max_steps": 5000}), tmp_path) as launcher:
        wait_for_row(launcher, tmp_path / "run", 4)
        os.kill(ranks_of(launcher)[1], signal.SIGKILL)
        began = time.monotonic()
        assert launcher.wait(timeout=120) == 1
    assert time.monotonic() - began < 60  # no collective waited for its timeout of half an hour
    output = (tmp_path / "log").read_text(encoding="utf-8")
    assert re.search(r"error: rank 0, after step \d+: another process of this run has died", output), output
    assert "--max-restarts" in output
    assert re.search(r"rank      : 1 .*\n  exitcode  : -9", output), output


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["launcher", "rank"])
def test_sigterm_saves_and_stops_and_one_rank_is_enough(run_config, tmp_path, receiver):
    """torchrun that got the signal itself returns 1, though its processes saved and returned 0."""
    run = tmp_path / "run"
    with torchrun(run_config(**{"train.max_steps": 5000, "checkpoint.every": 1000}), tmp_path) as launcher:
        wait_for_row(launcher, run, 4)
        os.kill(launcher.pid if receiver == "launcher" else ranks_of(launcher)[1], signal.SIGTERM)
        assert launcher.wait(timeout=120) == (1 if receiver == "launcher" else 0)
    output = (tmp_path / "log").read_text(encoding="utf-8")
    stopped = re.search(r"stopped by .* after step (\d+), which is saved", output)
    assert stopped, output
    assert published_steps(run / "checkpoints") == [int(stopped[1])]


@pytest.mark.slow
def test_sigterm_under_zero_saves_what_one_process_goes_on_from(run_config, rows, tmp_path):
    pytest.importorskip(
        "deepspeed", reason="deepspeed is an optional extra: pip install 'llmnorm[deepspeed]'"
    )
    run = tmp_path / "run"
    common = {"optimizer.name": "muon", "optimizer.ns_dtype": "fp32", "schedule.name": "constant"}
    zero = {"parallel.strategy": "deepspeed", "parallel.zero_stage": 3, "checkpoint.every": 1000}
    with torchrun(run_config(**common, **zero, **{"train.max_steps": 5000}), tmp_path) as launcher:
        wait_for_row(launcher, run, 3)
        os.kill(ranks_of(launcher)[1], signal.SIGTERM)
        assert launcher.wait(timeout=300) == 0
    (stopped,) = published_steps(run / "checkpoints")
    last = {"train.max_steps": stopped + 2}
    train(run_config(**common, **last))
    train(run_config(**common, **last, output_dir=str(tmp_path / "alone")))
    assert [row["step"] for row in rows(run)] == list(range(1, stopped + 3))
    for here, there in zip(rows(run), rows(tmp_path / "alone"), strict=True):
        # fp32 sums in another order: rounding grows a little with each of the steps until the signal.
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4)
