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
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import llmnorm_kernels as kernels
from llmnorm.errors import UserError
from llmnorm.int8 import Int8Weight
from llmnorm.optim.matrix import Site, local
from llmnorm.optim.option_ranges import SHARED_DEFAULTS, Options, check_options
from llmnorm.optim.random_numbers import seed_of, uniform_like
from llmnorm.optim.roles import Role, RoutedParameter, group_by_role
from llmnorm.optim.rules import ADAMW, LEGACY_ADAMW, Hyper, Rule
from llmnorm.optim.stochastic_rounding import COUNTER as ROUNDING_COUNTER
from llmnorm.optim.stochastic_rounding import Rounding, next_rounding, rounds
from llmnorm.optim.update_size import blocks_of, shape_factor, update_rms, usual_rms


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
    stack_elements: ClassVar[int] = 2**25
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
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {unknown[0]!r}")
        defaults = {"lr": lr, "weight_decay": weight_decay, **common, **shared, **options}
        check_options(defaults)
        if self.variants and defaults["variant"] not in self.variants:
            raise UserError(
                f"optimizer.variant={defaults['variant']!r} must be one of {', '.join(self.variants)}"
            )
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
            self._check_shapes(self.param_groups[-1])
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
        for group in self.param_groups:
            self.move_group(group)
        return loss

    def move_group(self, group: Hyper) -> None:
        """The step of a group, or of a part of it under `params` and `param_names`."""
        rule = self.rule(group)
        hyper = {**group, "lr": float(group["lr"]), **self.context(group)}
        for names, parameters in self._batches(group, rule):
            self._move(names, parameters, rule, {**hyper, "name": names[0]})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state; state keeps its dtype, where torch would cast it to the parameter's.

        Raises `UserError` for the state of another method, naming both.
        """
        check_methods(self, state_dict)
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                device = "cpu" if key in self.host_state else parameter.device
                self.state[parameter][key] = value.detach().to(device, copy=True)

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

    def _check_shapes(self, group: Hyper) -> None:
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

    def _batches(self, group: Hyper, rule: Rule) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Parameters with a gradient, equal shapes together where the rule and the device gain from it."""
        buckets: dict[Any, list[tuple[str, Tensor]]] = {}
        for name, parameter in _named(group):
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse or parameter.is_complex():
                raise UserError(
                    f"{name} has a sparse or complex gradient, which {type(self).__name__} cannot treat; "
                    "use dense real parameters (nn.Embedding with sparse=False)"
                )
            key: Any = name
            if rule.fused_many is not None and _moves_with_many(parameter, rule, group):
                key = parameter.device
            elif rule.stacks and parameter.device.type in self.stack_devices:
                blocks = _blocks(group, name, parameter)
                kept = tuple(sorted(self.state.get(parameter, {})))
                key = (parameter.shape, parameter.dtype, parameter.device, blocks, kept)
            buckets.setdefault(key, []).append((name, parameter))
        for key, bucket in buckets.items():
            size = max(1, self.stack_elements // max(1, bucket[0][1].numel()))
            if isinstance(key, torch.device):
                size = len(bucket)
            for start in range(0, len(bucket), size):
                names, parameters = zip(*bucket[start : start + size], strict=True)
                yield list(names), list(parameters)

    def _move(self, names: list[str], parameters: list[Tensor], rule: Rule, hyper: Hyper) -> None:
        if rule.fused_many is not None and all(_moves_with_many(p, rule, hyper) for p in parameters):
            self._move_many(parameters, rule, hyper)
            return
        shape = parameters[0].shape
        hyper = {**hyper, "blocks": _blocks(hyper, hyper["name"], parameters[0])}
        if all(_is_fused(parameter, rule, hyper) for parameter in parameters):
            for name, parameter in zip(names, parameters, strict=True):
                self._move_fused(name, parameter, rule, hyper)
            return
        sites = [Site(p, self.state.get(p, {}), rule.elementwise) for p in parameters]
        updates = _updates(sites, rule, hyper)
        factor = shape_factor(rule.size, shape, hyper)
        for name, site, update in zip(names, sites, updates, strict=True):
            site.store()
            rounding = next_rounding(name, site.parameter, site.held, hyper)
            if site.held:
                self.state[site.parameter] = site.held
            if isinstance(factor, Tensor):
                update = update * factor.to(update)
            self._apply(site, update, rule, hyper, 1.0 if isinstance(factor, Tensor) else factor, rounding)

    def _move_fused(self, name: str, parameter: Tensor, rule: Rule, hyper: Hyper) -> None:
        assert rule.fused is not None
        factor = shape_factor(rule.size, parameter.shape, hyper)
        assert isinstance(factor, float)
        if hyper["lr"] == 0.0 or factor == 0.0:
            factor = 1.0
        held = self.state.get(parameter, {})
        rounding = next_rounding(name, parameter, held, hyper)
        noise = {} if rounding is None else {"seed": rounding.seed, "step": rounding.step}
        site = Site(parameter, held, rule.elementwise)
        # The kernels' decay is (1 - lr wd), and theirs is the lr with the factor of the shape.
        lr, decay = hyper["lr"] * factor, hyper["weight_decay"] / factor
        rule.fused(local(parameter.detach()), site.grad, site.state, {**hyper, "noise": noise}, lr, decay)
        site.store()
        if site.held:
            self.state[parameter] = site.held

    def _move_many(self, parameters: list[Tensor], rule: Rule, hyper: Hyper) -> None:
        assert rule.fused_many is not None
        sites = [Site(p, self.state.get(p, {}), rule.elementwise) for p in parameters]
        weights = [local(parameter.detach()) for parameter in parameters]
        rule.fused_many(weights, [site.grad for site in sites], [site.state for site in sites], hyper)
        for site in sites:
            site.store()
            self.state[site.parameter] = site.held

    def _apply(
        self, site: Site, update: Tensor, rule: Rule, hyper: Hyper, factor: float, rounding: Rounding | None
    ) -> None:
        lr, decay = hyper["lr"], 0.0 if rule.decays else hyper["weight_decay"]
        weight, step = local(site.parameter.detach()), site.shard(update)
        # What is to be rounded once, at the end, moves in fp32.
        if isinstance(weight, Int8Weight):
            moved = weight.decoded(torch.float32)
        else:
            moved = weight if rounding is None else weight.float()
        if decay and hyper.get("cautious_weight_decay"):
            # Only where the update shrinks the weight anyway: decay never works against the gradient.
            moved.sub_(lr * decay * moved * (step * moved > 0))
        elif decay:
            moved.mul_(1 - lr * decay)
        moved.add_(step, alpha=-lr * factor)
        if rule.project is not None:
            moved.copy_(site.shard(rule.project(site.whole(moved), site.state)))
            site.store()
        if isinstance(weight, Int8Weight):
            seed = seed_of("int8", hyper["seed"], hyper["name"], int(site.state["step"]))
            weight.requantize_(moved, uniform_like(moved, seed))
        elif rounding is not None:
            rounding.store(weight, moved)


def _is_fused(parameter: Tensor, rule: Rule, hyper: Hyper) -> bool:
    """Whether the kernels make this step: they take what a process holds whole, and decay plainly."""
    if rule.fused is None or hyper.get("cautious_weight_decay") or isinstance(parameter, Int8Weight):
        return False
    if not rule.fuses(hyper):
        return False
    if isinstance(parameter, DTensor) and (not rule.elementwise or rounds(parameter, hyper)):
        return False
    weight, grad = local(parameter), local(parameter.grad)  # type: ignore[arg-type]
    takes = (weight.is_contiguous() and grad.is_contiguous()) and (rule.elementwise or weight.ndim == 2)
    return takes and weight.numel() > 0 and weight.dtype != torch.float64 and kernels.runs_triton(weight)


def _moves_with_many(parameter: Tensor, rule: Rule, hyper: Hyper) -> bool:
    """Whether one launch moves it with others of its group; stochastic rounding is a launch of its own."""
    return _is_fused(parameter, rule, hyper) and not rounds(parameter, hyper)


def check_methods(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise `UserError` where a group of `state_dict` was saved by another method than it would go to."""
    for number, (own, saved) in enumerate(
        zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    ):
        theirs = saved.get("method", "an optimizer that names no method")
        if theirs != own["method"]:
            raise UserError(
                f"this state_dict was saved by {theirs}, and this optimizer is {own['method']} (group "
                f"{number}, role {own['role']}); create the method that saved it, or start with fresh state"
            )


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


def _updates(sites: list[Site], rule: Rule, hyper: Hyper) -> list[Tensor]:
    if len(sites) == 1:
        site = sites[0]
        return [rule.update(site.grad, site.state, hyper, *([site.weight] if rule.reads_weight else []))]
    state = {key: torch.stack([site.state[key] for site in sites]) for key in sites[0].state}
    weights = [torch.stack([site.weight for site in sites])] if rule.reads_weight else []
    update = rule.update(torch.stack([site.grad for site in sites]), state, hyper, *weights)
    for index, site in enumerate(sites):
        # New state is copied out of the stack, which it would otherwise keep alive as a whole.
        site.state = {
            key: value[index] if key in site.state else value[index].clone() for key, value in state.items()
        }
    return list(update.unbind(0))


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
