"""Which implementation an operator runs, and how its raw library ops are registered.

Every operator has two implementations: a torch reference, which is its specification and differentiates
itself, and Triton kernels behind raw ops of the namespace `llmnorm_kernels`. The choice is made in the public
function, outside the op, so that `torch.compile` fuses the reference like any torch code and sees one opaque
node where a kernel runs. Nothing here imports Triton: a raw op loads its kernels at its first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
NAMESPACE = "llmnorm_kernels"

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton fixes this when it is imported, so a later change of the variable means nothing to us either.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_backend = "auto"
_operators: set[str] = set()
library = torch.library.Library(NAMESPACE, "DEF")


class use_backend:
    """Choose the implementation of every operator: at once and for good, or until the end of a `with` block.

    auto: Triton for CUDA and ROCm tensors, the torch reference elsewhere. torch: the reference everywhere.
    triton: the kernels everywhere; on CPU tensors that needs TRITON_INTERPRET=1 in the environment before
    Triton is imported, and is meant for tests. Raises ValueError for another name, RuntimeError where Triton
    is not installed.
    """

    def __init__(self, name: str) -> None:
        global _backend
        if name not in BACKENDS:
            raise ValueError(f"backend={name!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if name == "triton" and not TRITON_INSTALLED:
            raise RuntimeError(
                "backend='triton' needs the package triton >= 3.6; install it or choose 'auto'"
            )
        self.previous, _backend = _backend, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exception: object) -> None:
        global _backend
        _backend = self.previous


def current_backend() -> str:
    """The name last given to `use_backend`."""
    return _backend


def describe_backends(device: torch.device | str | None = None) -> str:
    """One line that says which operators run as Triton kernels on `device` (default: the accelerator at hand)
    and which as torch."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    on_triton = (
        _backend != "torch"
        and TRITON_INSTALLED
        and (kind == "cuda" or (_backend == "triton" and INTERPRETED))
    )
    fused = sorted(_operators) if on_triton else []
    plain = sorted(name for name in _operators if name not in fused)
    why = ""
    if not fused:
        if _backend == "torch":
            why = " (kernels: torch)"
        elif not TRITON_INSTALLED:
            why = " (triton is not installed)"
        else:
            why = f" (Triton needs a GPU; this device is {kind})"
    parts = []
    if fused:
        parts.append("triton: " + ", ".join(fused))
    if plain:
        parts.append("torch: " + ", ".join(plain) + why)
    return f"kernels on {kind}: " + "; ".join(parts)


def operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a public operator, so that `describe_backends` can name it."""
    _operators.add(function.__name__)
    return function


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels serve this tensor under the current backend."""
    if _backend == "torch" or not TRITON_INSTALLED:
        return False
    if x.is_cuda:
        return True
    if _backend == "auto":
        return False
    if x.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "backend='triton' on CPU tensors needs TRITON_INTERPRET=1 set before triton is imported; "
            "set it, move the tensors to a GPU, or choose use_backend('auto')"
        )
    return x.device.type in ("cpu", "meta")


def register(schema: str, launcher: str, fake: Callable[..., Any]) -> None:
    """Define `schema` as a raw op whose CUDA and CPU kernels are `launcher` ("module:function" of this
    package)."""
    name = schema.partition("(")[0]
    module, _, attribute = launcher.partition(":")

    @functools.cache
    def resolve() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{__package__}.{module}"), attribute)

    def run(*args: Any) -> Any:
        return resolve()(*args)

    library.define(schema)
    # ROCm tensors dispatch under the CUDA key.
    for key in ("CUDA", "CPU"):
        library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and sums are kept: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; this makes it the tensor's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; a small constant for the interpreter."""
    return _multiprocessors(x.device.index) if x.is_cuda else 4
