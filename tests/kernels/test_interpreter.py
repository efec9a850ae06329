"""Runs the interpreted half of every kernel test file in a process of its own (the reason stands in
conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_*_kernels.py"))


def run_interpreted(files: list[str], marks: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # xdist and coverage settings of the session must not reach the child.
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        marks,
    ]
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in files)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=HERE.parent.parent,
    )
    assert done.returncode == 0, (
        f"{' '.join(files)} under TRITON_INTERPRET=1:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    )
    assert " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    run_interpreted([file], "not slow and not gpu")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted_grid(file: str) -> None:
    run_interpreted([file], "slow and not gpu")
