"""How many bytes of optimizer state each process will hold: all of it, its rows, or that of what it owns.

    none, DDP            all; of whole-matrix rules under DDP with `share_updates`, what the process owns
    FSDP2                vectors whole; of matrices its rows (`moves.py` says which rules run there), and all
                         of the state without rows; of whole-matrix rules what the process owns
    ZeRO                 AdamW an equal slice; other methods what the process owns

Owners follow from shapes alone, as in a run, so their shares are those of a run: uneven, and few matrices may
leave a process none. Nothing is allocated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from llmnorm.optim import Role, route_parameters
from llmnorm.optim.matrix import rows_by_process
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.moves import Path, path_of, sharded_path
from llmnorm.optim.owners import assign_owners, matrix_cost
from llmnorm.optim.registry import cache_by_shape, planned_state_bytes
from llmnorm.optim.row_shards import ByRows
from llmnorm.optim.stochastic_rounding import COUNTER

logger = logging.getLogger("llmnorm.training")


@dataclass(frozen=True)
class Layout:
    """How a run lies on its processes; FSDP2 cuts the model over `shards` of them."""

    strategy: str = "none"
    processes: int = 1
    replicas: int = 1
    share_updates: bool = True

    @property
    def shards(self) -> int:
        return self.processes // self.replicas if self.strategy == "fsdp2" else self.processes


class StateBytes(NamedTuple):
    """Bytes of one process: moments, counters and statistics; and the bases of moments."""

    states: int = 0
    projectors: int = 0

    def plus(self, other: StateBytes) -> StateBytes:
        return StateBytes(self.states + other.states, self.projectors + other.projectors)


def state_by_rank(model: nn.Module, optimizer: Optimizer, layout: Layout) -> list[dict[str, StateBytes]]:
    """role -> bytes, for each process of a replica; warns of state that nobody knows before a step."""
    table = [{group["role"]: StateBytes() for group in optimizer.param_groups} for _ in range(layout.shards)]
    shares: _MatrixShares | _OtherShares = (
        _MatrixShares(model, optimizer, layout)
        if isinstance(optimizer, MatrixOptimizer)
        else _OtherShares(optimizer, layout)
    )
    for group in optimizer.param_groups:
        known = [shares(group, parameter) for parameter in group["params"]]
        if not all(known):
            logger.warning("the state of %s on %s is not in this plan", group["method"], group["role"])
        for each in known:
            for rank, held in enumerate(each):
                table[rank][group["role"]] = table[rank][group["role"]].plus(held)
    return table


def largest(table: Iterable[dict[str, StateBytes]]) -> dict[str, StateBytes]:
    """The process that holds most, all roles together."""

    def total(roles: dict[str, StateBytes]) -> int:
        return sum(held.states + held.projectors for held in roles.values())

    return max(table, key=total)


def _of_rows(parameter: Tensor, bytes_: int, ranks: int) -> list[int]:
    return [bytes_ * rows // parameter.shape[0] for rows in rows_by_process(parameter.shape[0], ranks)]


class _OtherShares:
    """The shares of AdamW as torch has it, and of classes of the user's own: bytes in proportion to what a
    process has of the parameter."""

    def __init__(self, optimizer: Optimizer, layout: Layout) -> None:
        self.layout = layout
        self.sizes = {
            group["role"]: cache_by_shape(partial(planned_state_bytes, optimizer, group))
            for group in optimizer.param_groups
        }

    def __call__(self, group: Mapping[str, Any], parameter: Tensor) -> list[StateBytes]:
        ranks, bytes_ = self.layout.shards, self.sizes[group["role"]](parameter)
        if bytes_ is None:
            return []
        if self.layout.strategy == "deepspeed":
            return [StateBytes(-(-bytes_ // ranks))] * ranks
        if self.layout.strategy == "fsdp2" and group["role"] != Role.VECTOR:
            return [StateBytes(part) for part in _of_rows(parameter, bytes_, ranks)]
        return [StateBytes(bytes_)] * ranks


class _MatrixShares:
    """The share of each process in the state of a parameter of a `MatrixOptimizer`."""

    def __init__(self, model: nn.Module, optimizer: MatrixOptimizer, layout: Layout) -> None:
        self.optimizer = optimizer
        self.layout = layout
        self.known: dict[Any, dict[str, Tensor]] = {}  # a model has hundreds of matrices and ten shapes
        if layout.strategy == "deepspeed":
            members: list[Tensor] = [routed.parameter for routed in route_parameters(model)]
            cost: Callable[[Tensor], float] = Tensor.numel
        else:
            groups = optimizer.param_groups
            members = [p for g in groups for p in g["params"] if self._path(g, p) is Path.OWNER]
            cost = _cost
        owners = assign_owners([cost(parameter) for parameter in members], layout.shards)
        self.owners = dict(zip(members, owners, strict=True))

    def _hyper(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {**group, **self.optimizer.context({**group, "params": []})}

    def _path(self, group: Mapping[str, Any], parameter: Tensor) -> Path:
        rule, hyper, layout = self.optimizer.rule(group), self._hyper(group), self.layout
        if layout.strategy == "fsdp2" and group["role"] != Role.VECTOR:
            return sharded_path(parameter.shape, rule, hyper)
        shared = layout.strategy == "ddp" and layout.share_updates and layout.processes > 1
        return path_of(parameter, rule, hyper, shared)

    def __call__(self, group: Mapping[str, Any], parameter: Tensor) -> list[StateBytes]:
        key = (id(group), parameter.shape, parameter.dtype)
        if key not in self.known:
            self.known[key] = self.optimizer.planned_state(group, parameter)
        total = [StateBytes()] * self.layout.shards
        for name, value in self.known[key].items():
            parts = self._parts(group, parameter, name, value)
            kind = StateBytes._fields[name in self.optimizer.projectors]
            total = [held.plus(StateBytes(**{kind: part})) for held, part in zip(total, parts, strict=True)]
        return total

    def _parts(self, group: Mapping[str, Any], parameter: Tensor, name: str, value: Tensor) -> list[int]:
        """Bytes of one state of the parameter, by process."""
        ranks, bytes_ = self.layout.shards, value.numel() * value.element_size()
        owner = self.owners.get(parameter)
        if owner is not None and name != COUNTER:  # every holder rounds its own rows
            return [bytes_ if rank == owner else 0 for rank in range(ranks)]
        cut = self.layout.strategy == "fsdp2" and group["role"] != Role.VECTOR and value.ndim > 0
        rule = self.optimizer.rule(group).update
        if cut and self._path(group, parameter) is Path.ROWS:
            assert isinstance(rule, ByRows)
            cut = name not in rule.whole_state(parameter.shape, self._hyper(group))
        elif cut:
            cut = value.shape == parameter.shape
        return _of_rows(parameter, bytes_, ranks) if cut else [bytes_] * ranks


def _cost(parameter: Tensor) -> float:
    return matrix_cost(parameter.shape)
