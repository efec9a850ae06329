"""The backend switch, what it says, and a package that imports without Triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import llmnorm_kernels as kernels
from llmnorm_kernels import dispatch


def test_switch_restores_on_exit():
    before = kernels.current_backend()
    with kernels.use_backend("torch"):
        assert kernels.current_backend() == "torch"
        with kernels.use_backend("auto"):
            assert kernels.current_backend() == "auto"
        assert kernels.current_backend() == "torch"
    assert kernels.current_backend() == before


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda' is unknown; choose one of auto, torch, triton"):
        kernels.use_backend("cuda")
    assert kernels.current_backend() == "auto"


def test_triton_on_cpu_tensors_is_refused_not_replaced():
    if dispatch.INTERPRETED:
        pytest.skip("this process interprets Triton on the CPU")
    pytest.importorskip("triton")
    with kernels.use_backend("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        kernels.rms_norm(torch.ones(2, 4))


def test_description_names_every_operator_and_the_reason():
    line = kernels.describe_backends("cpu")
    assert line.startswith("kernels on cpu: torch: ")
    assert "\n" not in line
    functions = {name for name in kernels.__all__ if getattr(kernels, name).__name__ in dispatch._operators}
    assert {"rms_norm", "add_rms_norm", "norm_add", "crms_norm", "layer_norm"} <= functions
    assert all(name in line for name in functions)
    pytest.importorskip("triton")
    assert kernels.describe_backends("cuda").startswith("kernels on cuda: triton: ")
    with kernels.use_backend("torch"):
        assert kernels.describe_backends("cuda").endswith("(kernels: torch)")


def test_imports_and_computes_without_triton():
    """On a machine without Triton the import works, the reference serves, and asking for the kernels is an
    error."""
    program = """
import sys
from importlib.machinery import PathFinder

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
import importlib.util
stock = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else stock(name, package)
sys.meta_path.insert(0, NoTriton())
import torch, llmnorm_kernels as kernels
assert kernels.rms_norm(torch.ones(2, 4)).shape == (2, 4)
assert "triton is not installed" in kernels.describe_backends("cuda")
try:
    kernels.use_backend("triton")
except RuntimeError as error:
    assert "triton >= 3.6" in str(error)
else:
    raise SystemExit("use_backend('triton') was accepted")
assert "llmnorm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_import_does_not_import_triton():
    subprocess.run(
        [sys.executable, "-c", "import sys, llmnorm_kernels; sys.exit('triton' in sys.modules)"], check=True
    )
