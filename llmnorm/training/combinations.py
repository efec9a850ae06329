"""How each optimizer runs under each strategy: the table that the parity tests run over, and from which
docs/distributed.md is made.

A cell names the way the method's matrices take: local, rows or owner, two where their shapes decide. Every
method runs everywhere; settings that a strategy refuses are in `zero_checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.moves import Path, sharded_path
from llmnorm.optim.registry import MATRIX_METHODS, METHODS
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import ByRows
from llmnorm.optim.rules import Hyper, Rule

# Shapes that tell the ways of a projection apart: taller than wide, square, wider than tall.
_SHAPES = ((32, 16), (16, 16), (16, 32))
_WAYS = {Path.HERE: "local", Path.ROWS: "rows", Path.OWNER: "owner"}


def _try_out(name: str) -> tuple[Rule, Hyper]:
    """The rule of the method's hidden matrices, and what it reads, by its defaults."""
    like = torch.empty(_SHAPES[0], device="meta")
    method: Callable[..., MatrixOptimizer] = MATRIX_METHODS[name]
    optimizer = method([{"params": [("weight", like)], "role": str(Role.HIDDEN_MATRIX)}])
    group = optimizer.param_groups[0]
    return optimizer.rule(group), {**group, **optimizer.context({**group, "params": []})}


def _alone(name: str) -> str:
    return "local"


def _under_ddp(name: str) -> str:
    if name not in MATRIX_METHODS:
        return "local"
    rule, _ = _try_out(name)
    return "local" if rule.elementwise or isinstance(rule.update, ByRows) else "owner"


def _under_fsdp2(name: str) -> str:
    if name not in MATRIX_METHODS:
        return "local"
    rule, hyper = _try_out(name)
    return ", ".join(dict.fromkeys(_WAYS[sharded_path(shape, rule, hyper)] for shape in _SHAPES))


def _under_deepspeed(name: str) -> str:
    """On flat partitions, element by element, or on whole parameters with owners (`zero_step.py`)."""
    return "local" if name not in MATRIX_METHODS else "owner"


# strategy -> what it makes of a method.
STRATEGIES: dict[str, Callable[[str], str]] = {
    "none": _alone,
    "ddp": _under_ddp,
    "fsdp2": _under_fsdp2,
    "zero1": _under_deepspeed,
    "zero2": _under_deepspeed,
    "zero3": _under_deepspeed,
}


def combinations() -> dict[str, dict[str, str]]:
    """method -> strategy -> cell, of every method of `create_optimizer`."""
    return {name: {strategy: cell(name) for strategy, cell in STRATEGIES.items()} for name in sorted(METHODS)}


def combination_table() -> str:
    """The table of docs/distributed.md, as Markdown."""
    lines = [
        f"| optimizer | {' | '.join(STRATEGIES)} |",
        f"|---|{'---|' * len(STRATEGIES)}",
    ]
    for name, cells in combinations().items():
        lines.append(f"| {name} | {' | '.join(cells.values())} |")
    return "\n".join(lines)
