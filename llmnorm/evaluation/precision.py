"""Run a model in fp32 for a measurement, and leave it exactly as it was found.

A perplexity is compared across runs to three digits, so it must not depend on the autocast region it was
computed in, on TF32, on dropout or on the dtype in which the weights happen to be held.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmnorm.evaluation.gathering import gathered_float32, is_sharded


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel.

    DDP broadcasts buffers in every forward, even in eval mode, which would hang processes that hold different
    numbers of batches.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs of `model` belong: the device of its first parameter."""
    return next(model.parameters()).device


def is_float32(model: nn.Module) -> bool:
    """Whether every floating-point parameter and buffer is held in fp32."""
    held = [*model.parameters(), *model.buffers()]
    return all(tensor.dtype == torch.float32 for tensor in held if tensor.is_floating_point())


@contextmanager
def inference(model: nn.Module, float32: bool = True) -> Iterator[nn.Module]:
    """Yield a module that measures `model`: eval mode, no gradients, fp32 if `float32`; restore afterwards.

    Autocast is off, fp32 matrix products are not TF32, and flash attention, which knows no fp32, gives way to
    sdpa. Weights that are not fp32 are read from an fp32 copy (a sharded model's from one block at a time),
    so `model` keeps its parameters, dtypes and per-module train/eval modes. With float32=False nothing but
    the mode changes.
    """
    module: Any = unwrap(model)
    if float32 and is_sharded(module):
        module = gathered_float32(module)
    elif float32 and not is_float32(module):
        module = copy.deepcopy(module).float()
    training = {part: part.training for part in module.modules()}
    matmul_precision = torch.get_float32_matmul_precision()
    attention = getattr(getattr(module, "config", None), "_attn_implementation", None) or ""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if float32:
            stack.enter_context(torch.autocast(device_of(module).type, enabled=False))
            torch.set_float32_matmul_precision("highest")
            if "flash" in attention:
                module.set_attn_implementation("sdpa")
        module.eval()
        try:
            yield module
        finally:
            torch.set_float32_matmul_precision(matmul_precision)
            if float32 and "flash" in attention:
                module.set_attn_implementation(attention)
            for part, was_training in training.items():
                part.training = was_training


def compute_dtype(module: nn.Module, float32: bool) -> str:
    """The precision that a forward inside `inference` uses: "float32", "bfloat16", ..."""
    if float32:
        return "float32"
    device = device_of(module).type
    if torch.is_autocast_enabled(device):
        return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    return str(next(module.parameters()).dtype).removeprefix("torch.")
