"""Kernel tests run in two kinds of process.

Triton decides at its import whether kernels are compiled or interpreted, and other tests of this tree may
import it first (torch.compile does). So nothing here touches the environment of the test session: a test that
takes the fixture `device` is kept in the session as its `cuda` version (marked gpu), and its `cpu` version
runs where TRITON_INTERPRET=1 was set from the start, in the processes that `test_interpreter.py` starts, one
per file, or in a session started that way by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmnorm_kernels import use_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import interpreter_shim

    interpreter_shim.install()


@pytest.fixture(
    params=[pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=pytest.mark.gpu, id="cuda")]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run: interpreted on the CPU, or compiled on a GPU. The backend is triton either
    way."""
    torch.manual_seed(0)
    with use_backend("triton"):
        yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = "cuda" if INTERPRETED else "cpu"
    here = str(Path(__file__).parent)
    keep, drop = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        mine = str(item.path).startswith(here)
        elsewhere = callspec is not None and callspec.params.get("device") == unwanted
        # A session that is the interpreter runs the kernels itself, so it starts no process for them.
        starts_process = INTERPRETED and item.path.name == "test_interpreter.py"
        (drop if mine and (elsewhere or starts_process) else keep).append(item)
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = keep
