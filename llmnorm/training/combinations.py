"""Which optimizer runs under which strategy, and how: the table that a start enforces, that the parity tests
run over, and from which docs/distributed.md is made.

A cell is supported, with the way its matrices take, or refused with the reason. Nothing is swapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmnorm.errors import UserError
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.moves import Path, sharded_path
from llmnorm.optim.registry import MATRIX_METHODS, METHODS
from llmnorm.optim.roles import Role
from llmnorm.optim.row_shards import ByRows
from llmnorm.optim.rules import Hyper, Rule
from llmnorm.training.zero_checks import JOINED


@dataclass(frozen=True)
class Cell:
    """One combination: `how` it runs, or `refused` and why."""

    how: str = ""
    refused: str = ""

    @property
    def supported(self) -> bool:
        return not self.refused


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


def _alone(name: str) -> Cell:
    return Cell("local")


def _under_ddp(name: str) -> Cell:
    if name not in MATRIX_METHODS:
        return Cell("local")
    rule, _ = _try_out(name)
    return Cell("local" if rule.elementwise or isinstance(rule.update, ByRows) else "owner")


def _under_fsdp2(name: str) -> Cell:
    if name not in MATRIX_METHODS:
        return Cell("local")
    rule, hyper = _try_out(name)
    return Cell(", ".join(dict.fromkeys(_WAYS[sharded_path(shape, rule, hyper)] for shape in _SHAPES)))


def _under_deepspeed(name: str) -> Cell:
    """On flat partitions, element by element, or on whole parameters with owners (`zero_step.py`)."""
    if name in JOINED:
        return Cell(refused=f"it {JOINED[name]}, and the layers' states lie with their owners")
    return Cell("local" if name not in MATRIX_METHODS else "owner")


# strategy -> what it makes of a method.
STRATEGIES: dict[str, Callable[[str], Cell]] = {
    "none": _alone,
    "ddp": _under_ddp,
    "fsdp2": _under_fsdp2,
    "zero1": _under_deepspeed,
    "zero2": _under_deepspeed,
    "zero3": _under_deepspeed,
}


def combinations() -> dict[str, dict[str, Cell]]:
    """method -> strategy -> cell, of every method of `create_optimizer`."""
    return {name: {strategy: cell(name) for strategy, cell in STRATEGIES.items()} for name in sorted(METHODS)}


def check_combination(method: str, strategy: str) -> None:
    """Raise `UserError` for a method that `strategy` refuses; a class path is checked by its own rules."""
    if method not in METHODS:
        return
    cell = STRATEGIES[strategy](method)
    if not cell.supported:
        keys = strategy.replace("zero", "deepspeed, parallel.zero_stage=")
        others = [name for name, make in STRATEGIES.items() if make(method).supported and "zero" not in name]
        raise UserError(
            f"optimizer.name={method} does not run with parallel.strategy={keys}: {cell.refused}; set "
            f"parallel.strategy to one of {', '.join(others)}, or choose another optimizer.name"
        )


def combination_table() -> str:
    """The table of docs/distributed.md, as Markdown."""
    lines = [
        f"| optimizer | {' | '.join(STRATEGIES)} |",
        f"|---|{'---|' * len(STRATEGIES)}",
    ]
    for name, cells in combinations().items():
        texts = [cell.how if cell.supported else f"refused: {cell.refused}" for cell in cells.values()]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)
