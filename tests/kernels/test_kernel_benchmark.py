"""The kernel benchmark runs where there is no GPU, and says which optional packages it lacks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_smoke_times_every_provider_that_is_there() -> None:
    options = ["--smoke", "--repeats", "1", "--only", "linear_attention"]
    command = [sys.executable, "benchmarks/kernels.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    absent = [line for line in done.stdout.splitlines() if line.startswith("not installed")]
    for package, column in (("liger_kernel", "liger"), ("fla", "fla")):
        said = any(column in line for line in absent)
        assert said == (importlib.util.find_spec(package) is None)
    for name in ("linear_attention T=64", "linear_attention relu T=64"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert all(f"'{provider} fwd+bwd'" in line for provider in ("ours", "eager", "sdpa"))
