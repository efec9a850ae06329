"""The base of every matrix method: roles choose rules, rules turn gradients into updates.

    w <- w - lr wd w - lr c(m, n) update(g)          c: the factor of the shape, see `update_size.py`

A method is one pure function on whole logical matrices, `update(grad, state, hyper) -> update`, wrapped in
a `Rule`, and a class that says which role gets which rule. The function may write to and extend `state`
(tensors only), never to `grad`; it acts on the last two dimensions, so that a stack of equal shapes is one
call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.tensor as dtensor
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llmnorm.errors import UserError
from llmnorm.int8 import Int8Weight
from llmnorm.optim.foreign_state import check_methods, check_shapes
from llmnorm.optim.local_step import batches, move_here
from llmnorm.optim.matrix import RowLayout
from llmnorm.optim.moves import Move, Path, path_of
from llmnorm.optim.option_ranges import SHARED_DEFAULTS, Options, check_options
from llmnorm.optim.owners import assign_owners, matrix_cost
from llmnorm.optim.roles import Role, RoutedParameter, group_by_role
from llmnorm.optim.row_shards import ByRows
from llmnorm.optim.rules import ADAMW, LEGACY_ADAMW, Hyper, Rule
from llmnorm.optim.sharded_step import OwnedMoves, move_by_rows
from llmnorm.optim.stochastic_rounding import COUNTER as ROUNDING_COUNTER
from llmnorm.optim.stochastic_rounding import next_rounding, rounds
from llmnorm.optim.update_size import blocks_of, update_rms, usual_rms


class MatrixOptimizer(Optimizer):
    """One optimizer over all parameters of a model: hidden matrices get the method, other roles what it says.

    `params` is what torch optimizers take. A group may carry `role` (hidden_matrix, embedding, lm_head,
    vector); without one, vectors and matrices with one row or column are `vector` and everything else is
    `hidden_matrix`, so embeddings and heads need theirs: `group_by_role(route_parameters(model))` gives it.
    Named parameters, `(name, tensor)`, are needed where an option or a random number goes by name.

    State is made in `step`, is tensors only and keeps its dtype through `load_state_dict`; `step` never
    writes `p.grad`. Weight decay is decoupled and skips vectors unless their group sets its own.
    """

    # Role -> rule; or, where released code and paper differ, variant -> role -> rule.
    rules: ClassVar[Mapping[str, Rule]] = {}
    variants: ClassVar[Mapping[str, Mapping[str, Rule]]] = {}
    # Stacking equal shapes pays where launches cost; a processor gains nothing and would only copy.
    stack_devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    # Not set in the constructor: torch's Optimizer copies and pickles without such attributes.
    _shared: RowLayout | None = None
    _owners: Mapping[Tensor, int] = MappingProxyType({})
    _routed: tuple[int, ...] | None = None  # the parameters that `_owners` was made for
    # How often a step brings whole gradients to the owners of matrices.
    gradient_trips: ClassVar[int] = 1
    # State that the processor reads in each step: it stays where it is, so that no step waits for a device.
    host_state: ClassVar[frozenset[str]] = frozenset({"step", ROUNDING_COUNTER})
    # State that says which subspace moments live in: what plans show apart.
    projectors: ClassVar[frozenset[str]] = frozenset(
        {"basis", "basis_codes", "basis_scale", "basis_zero", "frequencies"}
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        options: Mapping[str, Any],
        shared: Options,
    ):
        common = self.shared_options()
        unknown = [key for key in shared if key not in common]
        if unknown:
            known = ", ".join(["lr", "weight_decay", *options, *common])
            raise UserError(
                f"optimizer.{unknown[0]}={shared[unknown[0]]!r} is not an option of "  # type: ignore[literal-required]
                f"{type(self).__name__}; it takes {known}"
            )
        defaults = {"lr": lr, "weight_decay": weight_decay, **common, **shared, **options}
        check_options(defaults)
        super().__init__(params, defaults)
        self._check_row_blocks()
        self._check_rounding()

    @classmethod
    def shared_options(cls) -> dict[str, Any]:
        """The shared options that do something here, with their defaults.

        AdamW's belong to methods that leave a role to it, cautious decay to those without one of their own.
        """
        rules = [rule for table in (*cls.variants.values(), cls.rules) for rule in table.values()]
        with_adamw = any(rule in (ADAMW, LEGACY_ADAMW) for rule in rules)
        leaves_decay = not any(rule.decays for rule in rules)
        return {
            key: value
            for key, value in SHARED_DEFAULTS.items()
            if (with_adamw or not key.startswith("adamw_"))
            and (leaves_decay or key != "cautious_weight_decay")
        }

    def rule(self, group: Hyper) -> Rule:
        """The rule of a group, by its role and variant."""
        rules = self.variants[group["variant"]] if self.variants else self.rules
        return rules[group["role"]]

    def context(self, group: Hyper) -> dict[str, Any]:
        """What the rule of this step must know about the group as a whole, beside its options."""
        return {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; one without `role` is split into hidden matrices and vectors by shape."""
        if "role" not in param_group:
            members = param_group["params"]
            members = [members] if isinstance(members, Tensor) else list(members)
            for role in (Role.HIDDEN_MATRIX, Role.VECTOR):
                part = [member for member in members if _role_by_shape(member) is role]
                if part:
                    self.add_param_group({**param_group, "params": part, "role": str(role)})
            return
        group = dict(param_group)
        group["role"] = str(Role(group["role"]))
        check_options(group)
        rule = self.rule({**self.defaults, **group})
        group["method"] = rule.name
        if group["role"] == Role.VECTOR:
            group.setdefault("weight_decay", 0.0)
        adamw_lr = group.get("adamw_lr", self.defaults.get("adamw_lr"))
        if rule in (ADAMW, LEGACY_ADAMW) and adamw_lr is not None:
            group.setdefault("lr", adamw_lr)
        super().add_param_group(group)
        try:
            self._check_group(self.param_groups[-1])
        except UserError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; the others, and their decay, rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._run(self.moves(self.param_groups))
        return loss

    def move_group(self, group: Hyper) -> None:
        """The step of a group, or of a part of it under `params` and `param_names`."""
        self._run(self.moves([group]))

    def _run(self, moves: Sequence[Move]) -> None:
        for batch in self._batches(move for move in moves if move.path is Path.HERE):
            move_here(batch, self.state)
        move_by_rows([move for move in moves if move.path is Path.ROWS], self.state)
        self.owned_moves(moves).step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state; state keeps its dtype, where torch would cast it to the parameter's.

        Raises `UserError` for the state of another method, naming both, and of other shapes.
        """
        check_methods(self, state_dict)
        check_shapes(self, state_dict)
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                device = "cpu" if key in self.host_state else parameter.device
                self.state[parameter][key] = value.detach().to(device, copy=True)

    def empty_state(
        self, parameter: Tensor, key: str, shape: Sequence[int], dtype: torch.dtype, device: Any
    ) -> Tensor | None:
        """Memory for the state `key` of whole shape `shape`, as this process holds it under the present
        layout: rows of it, all of it, or None where another process owns the parameter. Checkpoints of any
        layout are read into it."""
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        path, layout = self.path(group, parameter), self.owner_layout(parameter)
        others = path is Path.OWNER and layout is not None and self.owners()[parameter] != layout.rank
        if others and key != ROUNDING_COUNTER:  # every holder rounds its own rows
            return None
        rule, hyper = self.rule(group).update, {**group, **self.context({**group, "params": []})}
        by_rows = (
            path is Path.ROWS
            and isinstance(rule, ByRows)
            and key not in rule.whole_state(parameter.shape, hyper)
        )
        like_parameter = path is Path.HERE and tuple(shape) == tuple(parameter.shape)
        if isinstance(parameter, DTensor) and len(shape) > 0 and (by_rows or like_parameter):
            mesh, placements = parameter.device_mesh, parameter.placements
            return dtensor.zeros(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
        return torch.zeros(shape, dtype=dtype, device=device)

    def keeps_state_apart(self) -> bool:
        """Whether some state is with one process only; whoever saves must then ask them all."""
        return bool(self.owners())

    def state_bytes(self, group: Hyper, parameter: Tensor) -> int:
        """Bytes of state that this parameter will have, all processes together."""
        return sum(v.numel() * v.element_size() for v in self.planned_state(group, parameter).values())

    def planned_state(self, group: Hyper, parameter: Tensor) -> dict[str, Tensor]:
        """The state that this parameter will have, without memory, from a run without data."""
        grad = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        state: dict[str, Tensor] = {}
        rule = self.rule(group)
        hyper = {**group, **self.context({**group, "params": []}), "name": ""}
        rule.update(grad, state, hyper, *([grad] if rule.reads_weight else []))
        if rule.project is not None:
            rule.project(grad, state)
        if rounds(parameter, group):
            next_rounding("", grad, state, group)
        return state

    def update_rms(self, group: Hyper, parameter: Tensor, name: str = "") -> float | None:
        """RMS of this parameter's update per unit of learning rate, None where it depends on the data."""
        hyper = {**group, "blocks": _blocks(group, name, parameter)}
        return update_rms(self.rule(group).size, parameter.shape, hyper)

    def usual_rms(self, group: Hyper, parameter: Tensor) -> float | None:
        """The RMS per unit of learning rate that noisy gradients give, None where nothing is known."""
        return usual_rms(self.rule(group).size, parameter.shape, group)

    def _check_group(self, group: Hyper) -> None:
        for name, parameter in _named(group):
            if group["role"] != Role.VECTOR and parameter.ndim not in (2, 3):
                raise UserError(
                    f"{name} has role={group['role']} and shape {tuple(parameter.shape)}, but "
                    f"{type(self).__name__} treats matrices and stacks of matrices there; put a vector in a "
                    "group with role=vector, and flatten a convolution to (out, in)"
                )
            if isinstance(parameter, Int8Weight) and group.get("weights") != "int8":
                raise UserError(
                    f"{name} holds INT8 codes, which {type(self).__name__} moves only with "
                    "optimizer.weights=int8 where it has that option; give it, or plain weights"
                )
            _blocks(group, name, parameter)

    def _check_rounding(self) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if self.defaults["stochastic_rounding"] and not any(rounds(p, self.defaults) for p in parameters):
            raise UserError(
                "optimizer.stochastic_rounding=true rounds bf16 weights, and these are "
                f"{parameters[0].dtype}; train with train.precision: bf16_pure, or set "
                "optimizer.stochastic_rounding: false"
            )

    def _check_row_blocks(self) -> None:
        """Every key of `row_blocks` must be part of some hidden matrix's name."""
        hidden = [group for group in self.param_groups if group["role"] == Role.HIDDEN_MATRIX]
        parts = {part for group in hidden for name, _ in _named(group) for part in name.split(".")}
        for key in self.defaults.get("row_blocks") or {}:
            if key not in parts:
                raise UserError(
                    f"optimizer.row_blocks.{key} is no part of any hidden matrix's name; give one such as "
                    "q_proj, and named parameters"
                )

    def share_whole_matrices(self, group: dist.ProcessGroup | None) -> None:
        """Among replicas (DDP), compute each whole-matrix update at one owner, who sends it to the others and
        alone keeps its state. None, and a group of one process, ends that; call it before state exists."""
        assert not self.state
        several = group is not None and dist.get_world_size(group) > 1
        self._shared = (
            RowLayout(group, dist.get_rank(group), dist.get_world_size(group))  # type: ignore[arg-type]
            if several
            else None
        )
        self._routed = None

    def gradients_lie_apart(self, shapes: Mapping[Tensor, torch.Size]) -> None:
        """Each parameter will have its gradient on one process only (owners under ZeRO), of the whole shape
        given here. A method that looks at several parameters must ask the others; most do not."""

    def path(self, group: Hyper, parameter: Tensor) -> Path:
        """Where the update of this parameter is computed."""
        hyper = {**group, **self.context({**group, "params": []})}
        return path_of(parameter, self.rule(group), hyper, self._shared is not None)

    def owner_layout(self, parameter: Tensor) -> RowLayout | None:
        """The processes that share the ownership of whole matrices with this one."""
        return RowLayout.of(parameter) or self._shared

    def owners(self) -> Mapping[Tensor, int]:
        """The owner of every parameter whose update is computed by one, with a gradient or not: its rank in
        `owner_layout`."""
        members = tuple(id(parameter) for group in self.param_groups for parameter in group["params"])
        if self._routed == members:
            return self._owners
        layouts: dict[str, RowLayout] = {}
        owned: dict[str, list[Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                layout = self.owner_layout(parameter)
                if layout is not None and self.path(group, parameter) is Path.OWNER:
                    layouts[layout.group.group_name] = layout
                    owned.setdefault(layout.group.group_name, []).append(parameter)
        self._routed = members
        self._owners = {
            parameter: owner
            for name, parameters in owned.items()
            for parameter, owner in zip(
                parameters,
                assign_owners([matrix_cost(p.shape) for p in parameters], layouts[name].processes),
                strict=True,
            )
        }
        return self._owners

    def moves(self, groups: Iterable[Hyper]) -> list[Move]:
        """Every parameter of `groups` with a gradient, with what its rule reads and where it runs."""
        found = []
        for number, group in enumerate(groups):
            rule = self.rule(group)
            hyper = {**group, "lr": float(group["lr"]), **self.context(group)}
            for name, parameter in _named(group):
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse or parameter.is_complex():
                    raise UserError(
                        f"{name} has a sparse or complex gradient, which {type(self).__name__} cannot "
                        "treat; use dense real parameters (nn.Embedding with sparse=False)"
                    )
                own = {**hyper, "name": name, "blocks": _blocks(group, name, parameter)}
                path = path_of(parameter, rule, own, self._shared is not None)
                found.append(Move(name, parameter, rule, own, path, number))
        return found

    def owned_moves(self, moves: Sequence[Move]) -> OwnedMoves:
        """Those of `moves` that are computed by owners."""
        owned = [move for move in moves if move.path is Path.OWNER]
        owners = self.owners() if owned else {}
        return OwnedMoves(owned, self.state, owners, self._shared, self._batches)

    def _batches(self, moves: Iterable[Move]) -> Iterator[list[Move]]:
        return batches(moves, self.state, self.stack_devices)


def matrix_builder(method: type[MatrixOptimizer]) -> Callable[..., Optimizer]:
    """The row of a method in the registry: builder(parameters with roles, lr, *, options)."""

    def build(parameters: Sequence[RoutedParameter], lr: float, **options: Any) -> Optimizer:
        return method(group_by_role(parameters), lr=lr, **options)

    keyword = inspect.Parameter.KEYWORD_ONLY
    own = inspect.signature(method).parameters.values()
    options = [parameter.name for parameter in own if parameter.kind is keyword]
    names = ["weight_decay", *options, *method.shared_options()]
    head = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("parameters", "lr")]
    tail = [inspect.Parameter(name, keyword) for name in names]
    build.__signature__ = inspect.Signature([*head, *tail])  # type: ignore[attr-defined]
    return build


def _named(group: Hyper) -> Iterator[tuple[str, Tensor]]:
    names = group.get("param_names") or [f"parameter {index}" for index in range(len(group["params"]))]
    return zip(names, group["params"], strict=True)


def _blocks(group: Hyper, name: str, parameter: Tensor) -> tuple[int, ...] | None:
    """Row blocks are for hidden matrices: the bias of a projection shares its name."""
    if group["role"] != Role.HIDDEN_MATRIX:
        return None
    return blocks_of(name, parameter.shape, group.get("row_blocks"))


def _role_by_shape(member: Any) -> Role:
    shape = (member[1] if isinstance(member, tuple) else member).shape
    return Role.VECTOR if len(shape) < 2 or min(shape[-2:]) == 1 else Role.HIDDEN_MATRIX
