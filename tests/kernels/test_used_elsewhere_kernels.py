"""What another codebase does with an operator: `torch.compile(fullgraph=True)`, activation checkpointing and
autocast, for every exported name; and the package by itself, with no llmnorm to import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import relative_error
from operator_calls import CALLS, arguments, call
from torch.utils.checkpoint import checkpoint

PACKAGE = Path(__file__).resolve().parents[2] / "kernels" / "llmnorm_kernels"
# They write their first tensors and have no gradients.
STEPS = {name for name in CALLS if name.endswith("_")}
WITHOUT_GRADIENT = STEPS | {"symmetric_product", "newton_schulz"}
DIFFERENTIABLE = [name for name in CALLS if name not in WITHOUT_GRADIENT]
CONSTANT = {"cos", "sin"}  # of the rotary operators, which refuse to be asked for their gradients
# One of each kind; the others are slow, and compiled beside their own tests.
COMPILED_FAST = {"sandwich_add", "adamw_"}


def given(name: str, device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {key: tensor.to(device) for key, tensor in arguments(name).items()}


def run(name: str, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the operator returns and what it leaves in its arguments, which are copied first."""
    held = {key: tensor.clone() if name in STEPS else tensor for key, tensor in tensors.items()}
    result = call(name, held)
    outputs = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    return outputs + (list(held.values()) if name in STEPS else [])


def differentiated(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [x for key, x in tensors.items() if x.is_floating_point() and key not in CONSTANT]


def results(name: str, tensors: dict[str, torch.Tensor], how: Any) -> tuple[list[Any], list[Any]]:
    """Outputs and gradients of the operator as `how` runs it."""
    leaves = {key: x.detach().clone() for key, x in tensors.items()}
    wanted = differentiated(leaves) if name in DIFFERENTIABLE else []
    for x in wanted:
        x.requires_grad_()
    outputs = how(leaves)
    if not wanted:
        return outputs, []
    return outputs, list(torch.autograd.grad([o.float().square().sum() for o in outputs], wanted))


def test_every_operator_is_of_one_kind():
    assert set(DIFFERENTIABLE) | WITHOUT_GRADIENT == set(CALLS)
    assert {"adamw_", "rms_norm", "linear_attention"} <= set(CALLS) and "rms_norm" in DIFFERENTIABLE


@pytest.mark.parametrize(
    "name", [n if n in COMPILED_FAST else pytest.param(n, marks=pytest.mark.slow) for n in CALLS]
)
def test_compiles_to_one_graph_and_the_same_numbers(device, name):
    tensors = given(name, device)
    eager = results(name, tensors, lambda leaves: run(name, leaves))
    torch._dynamo.reset()
    compiled = torch.compile(lambda leaves: run(name, leaves), fullgraph=True, backend="aot_eager")
    traced = results(name, tensors, compiled)
    for a, b in zip(eager[0] + eager[1], traced[0] + traced[1], strict=True):
        # The kernels are the same; what stands around them is fused in another order.
        assert a.dtype == b.dtype and relative_error(b, a) < 1e-6


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_checkpointed_to_the_last_bit(device, name):
    tensors = given(name, device)
    plain = results(name, tensors, lambda leaves: run(name, leaves))
    again = results(name, tensors, lambda leaves: checkpoint(run, name, leaves, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain[0] + plain[1], again[0] + again[1], strict=True))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autocast_leaves_gradients_in_the_dtype_of_their_tensor(device, name):
    """An operator computes in the dtype it is given, or in bfloat16 where it multiplies matrices."""
    tensors = given(name, device)

    def cast(leaves: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return run(name, leaves)

    plain = results(name, tensors, lambda leaves: run(name, leaves))
    outputs, gradients = results(name, tensors, cast)
    wanted = differentiated(tensors)
    assert [g.dtype for g in gradients] == [x.dtype for x in wanted]
    matrices = name == "linear_cross_entropy"
    for a, b in zip(plain[0] + plain[1], outputs + gradients, strict=True):
        # Products of bfloat16 operands: a few roundings of 2^-9 each.
        assert relative_error(b, a) < (2e-2 if matrices else 1e-6)


def test_the_package_alone(tmp_path):
    """Copied to an empty folder and imported there, module by module: nothing of this project is asked
    for."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    program = """
import importlib, pkgutil, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llmnorm", "transformers", "accelerate"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch, llmnorm_kernels as kernels
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
for name in names:
    if importlib.util.find_spec("triton") or not name.endswith(("_kernels", "_launch", "_wide")):
        importlib.import_module("llmnorm_kernels." + name)
assert len(names) > 20 and "llmnorm" not in sys.modules
x = torch.randn(4, 8, requires_grad=True)
kernels.rms_norm(x, torch.ones(8)).square().mean().backward()
assert x.grad.shape == x.shape
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
