"""A handful of parameters with roles, and gradients for them: what the tests of every matrix method share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "layers.0.q_proj.weight": ("hidden_matrix", (12, 12)),
    "layers.0.up_proj.weight": ("hidden_matrix", (24, 12)),
    "layers.0.down_proj.weight": ("hidden_matrix", (12, 24)),
    "layers.1.up_proj.weight": ("hidden_matrix", (24, 12)),
    "experts.weight": ("hidden_matrix", (2, 10, 6)),
    "embed_tokens.weight": ("embedding", (21, 12)),
    "lm_head.weight": ("lm_head", (21, 12)),
    "norm.weight": ("vector", (12,)),
}
HIDDEN = [name for name, (role, _) in SHAPES.items() if role == "hidden_matrix"]


def make_parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).mul_(0.1).to(dtype).requires_grad_()
        for name, (_, shape) in SHAPES.items()
    }


def groups(parameters: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    by_role: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in parameters.items():
        by_role.setdefault(SHAPES[name][0], []).append((name, parameter))
    return [{"params": members, "role": role} for role, members in by_role.items()]


def gradients(steps: int, seed: int = 1, scale: float = 1.0) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients with a common part, so that averages over steps differ from any one of them."""
    generator = torch.Generator().manual_seed(seed)
    common = {name: torch.randn(shape, generator=generator) for name, (_, shape) in SHAPES.items()}
    for _ in range(steps):
        yield {
            name: scale * (part + torch.randn(part.shape, generator=generator))
            for name, part in common.items()
        }


def run(optimizer: Optimizer, parameters: dict[str, torch.Tensor], steps: int, seed: int = 1) -> None:
    for grads in gradients(steps, seed):
        for name, parameter in parameters.items():
            parameter.grad = grads[name].to(parameter.dtype)
        optimizer.step()
