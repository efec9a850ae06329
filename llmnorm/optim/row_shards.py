"""Rules that need no more of other rows than sums: they run where the rows are, their sums travel together.

FSDP2 cuts a matrix by rows, so a norm of a row is at home on one process, and a norm of a column or of the
whole matrix is a sum over the rows of all. A rule of that kind is written once, as a generator that yields
what it needs summed over its rows and receives the sum over all rows:

    @by_rows()
    def normalized_columns(grad, state, hyper):
        squares, = yield sums(grad.square().sum(0))
        return grad / (squares / rows_of(grad, hyper)).sqrt()

Called like any rule, with a whole matrix, the sums are what it yielded. On shards, `in_lockstep` runs the
generators of all matrices at once and sends what they yield in one message per round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmnorm.optim.matrix import RowLayout, State, local, scatter


@dataclass(frozen=True)
class Request:
    """Tensors to be reduced over the shards of a matrix: "sum" or "max"."""

    values: tuple[Tensor, ...]
    operation: str


def sums(*partial: Tensor) -> Request:
    """Ask for the sums over all rows of what was summed over this process's rows."""
    return Request(partial, "sum")


def maxima(*partial: Tensor) -> Request:
    """Ask for the largest over all rows of what is the largest over this process's rows."""
    return Request(partial, "max")


Parts = Generator[Request, tuple[Tensor, ...], Tensor]
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def rows_of(grad: Tensor, hyper: Mapping[str, Any]) -> int:
    """m of the whole matrix of which `grad` holds some rows."""
    return hyper.get("rows", grad.shape[-2])


def shape_of(grad: Tensor, hyper: Mapping[str, Any]) -> tuple[int, int]:
    """(m, n) of the whole matrix of which `grad` holds some rows."""
    return rows_of(grad, hyper), grad.shape[-1]


def largest(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """max x, of values that are not negative: 0 of no rows at all. Over `dim`, which is kept, or over all."""
    dims = tuple(range(x.ndim)) if dim is None else dim
    if any(x.shape[d] == 0 for d in dims):
        shape = [1 if d in dims or d - x.ndim in dims else size for d, size in enumerate(x.shape)]
        return x.new_zeros(() if dim is None else shape)
    return x.amax() if dim is None else x.amax(dim, keepdim=True)


class ByRows:
    """A rule as a generator. Calling it runs it on whole matrices, `parts` on the rows of one process.

    State has a row per row of the matrix, but for scalars and the keys in `whole_state(shape, hyper)`, which
    every process holds alike. `serves(shape, hyper)` says whether the rule can run by rows at all. Both are
    given the shape of the whole matrix.
    """

    def __init__(
        self,
        parts: Callable[..., Parts],
        whole_state: Callable[[Sequence[int], Mapping[str, Any]], Collection[str]],
        serves: Callable[[Sequence[int], Mapping[str, Any]], bool],
    ) -> None:
        self.parts = parts
        self.whole_state = whole_state
        self.serves = serves
        functools.update_wrapper(self, parts)

    def __call__(self, *arguments: Any) -> Tensor:
        parts = self.parts(*arguments)
        answer: Any = None
        try:
            while True:
                answer = parts.send(answer).values
        except StopIteration as stop:
            return stop.value


def by_rows(
    whole_state: Collection[str] | Callable[[Sequence[int], Mapping[str, Any]], Collection[str]] = (),
    serves: Callable[[Sequence[int], Mapping[str, Any]], bool] = lambda shape, hyper: True,
) -> Callable[[Callable[..., Parts]], ByRows]:
    """Make a `ByRows` of a generator function `(grad, state, hyper[, weight])`."""
    whole = whole_state if callable(whole_state) else lambda shape, hyper: whole_state
    return lambda parts: ByRows(parts, whole, serves)


def in_lockstep(parts: Sequence[Parts], groups: Sequence[dist.ProcessGroup]) -> list[Tensor]:
    """Run generators, one per matrix, side by side; returns what each returns.

    Round by round, everything they ask for travels in one all-reduce per process group, operation, dtype and
    device. Every process must pass the same matrices in the same order.
    """
    results: dict[int, Tensor] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(parts)))
    while answers:
        requests: dict[int, Request] = {}
        for index, answer in answers.items():
            try:
                requests[index] = parts[index].send(answer)
            except StopIteration as stop:
                results[index] = stop.value
        answers = _reduced(requests, groups)
    return [results[index] for index in range(len(parts))]


def _reduced(
    requests: Mapping[int, Request], groups: Sequence[dist.ProcessGroup]
) -> dict[int, tuple[Tensor, ...]]:
    messages: dict[tuple[str, str, torch.dtype, torch.device], list[tuple[int, int, Tensor]]] = {}
    for index, request in requests.items():
        for place, value in enumerate(request.values):
            key = (groups[index].group_name, request.operation, value.dtype, value.device)
            messages.setdefault(key, []).append((index, place, value))
    answers: dict[int, dict[int, Tensor]] = {index: {} for index in requests}
    for (_, operation, _, _), members in messages.items():
        flat = torch.cat([value.reshape(-1) for _, _, value in members])
        dist.all_reduce(flat, _OPERATIONS[operation], group=groups[members[0][0]])
        pieces = flat.split([value.numel() for _, _, value in members])
        for (index, place, value), piece in zip(members, pieces, strict=True):
            answers[index][place] = piece.view(value.shape)
    return {index: tuple(found[place] for place in range(len(found))) for index, found in answers.items()}


class RowSite:
    """The rows of one parameter that this process holds, on their way through a step of a `ByRows` rule."""

    def __init__(
        self, parameter: DTensor, held: State, rule: ByRows, hyper: Mapping[str, Any], layout: RowLayout
    ) -> None:
        assert isinstance(parameter.grad, DTensor)
        self.parameter = parameter
        self.held = held
        self.whole_state = rule.whole_state(parameter.shape, hyper)
        self.layout = layout
        self.grad = parameter.grad.to_local()
        self.weight = local(parameter.detach())
        self.state = {key: self._rows(key, value) for key, value in held.items()}

    def _keeps_rows(self, key: str, value: Tensor) -> bool:
        return value.ndim > 0 and key not in self.whole_state

    def _rows(self, key: str, value: Tensor) -> Tensor:
        if self._keeps_rows(key, value) and not isinstance(value, DTensor):
            return local(scatter(value, self.parameter))  # whole, as another layout had it
        return local(value)

    def store(self) -> None:
        """Write the state back into `held`: rows as a DTensor cut like the parameter."""
        for key, value in self.state.items():
            held = self.held.get(key)
            if self._keeps_rows(key, value):
                same = isinstance(held, DTensor) and held.to_local().data_ptr() == value.data_ptr()
                if not same or value.numel() == 0:
                    self.held[key] = self.layout.distributed(value, self.parameter)
            elif held is not value:
                self.held[key] = value
