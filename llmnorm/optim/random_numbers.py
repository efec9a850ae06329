"""Random numbers that depend on what they are for and on nothing else.

A seed is a hash of (seed, parameter name, step or refresh): the order of parameters, other draws and the
number of processes do not enter, so that a resumed run draws what it would have drawn. The streams of a CPU
and of a GPU differ.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """A seed that is the same on every process and in every run of the same parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def normal_like(x: Tensor, seed: int) -> Tensor:
    """Independent normals of the shape of x; on the meta device, which has no numbers, none are drawn."""
    if x.is_meta:
        return torch.empty_like(x)
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def uniform_like(x: Tensor, seed: int) -> Tensor:
    """Independent fp32 numbers in [0, 1) of the shape of x; none are drawn on the meta device."""
    if x.is_meta:
        return torch.empty_like(x, dtype=torch.float32)
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.rand(x.shape, generator=generator, dtype=torch.float32, device=x.device)
