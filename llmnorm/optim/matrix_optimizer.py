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
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmnorm.errors import UserError
from llmnorm.optim.matrix import Site, State, local
from llmnorm.optim.roles import Role, RoutedParameter
from llmnorm.optim.update_size import LR_MODES, PLAIN, Size, blocks_of, shape_factor, update_rms

Hyper = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """How the parameters of one role move.

    `update(grad, state, hyper)`, or with `reads_weight` `update(grad, state, hyper, weight)`, returns what
    `lr * c` multiplies; `size` knows c and the RMS of the update. A rule that `decays` applies
    `hyper["weight_decay"]` itself. `project(weight, state)` returns the weight that replaces a moved one.
    `elementwise` rules never look beyond one element; `stacks` rules gain from one call on equal shapes.
    """

    name: str
    update: Callable[..., Tensor]
    size: Size = PLAIN
    elementwise: bool = False
    reads_weight: bool = False
    decays: bool = False
    stacks: bool = False
    project: Callable[[Tensor, State], Tensor] | None = None


def wide(tensor: Tensor) -> Tensor:
    """At least fp32: statistics and norms of bf16 tensors are taken in it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def moment(state: State, key: str, grad: Tensor, hyper: Hyper) -> Tensor:
    """The running average `key`, zeros at first, in the dtype that `state_dtype` asks for."""
    if key not in state:
        dtype = torch.float32 if hyper["state_dtype"] == "fp32" else grad.dtype
        state[key] = torch.zeros_like(grad, dtype=dtype)
    return state[key]


def count(state: State) -> int:
    """Advance and return the number of steps this parameter has made (fp32, as torch keeps it)."""
    step = state.setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
    step += 1
    return int(step.item())


def adam_moments(
    grad: Tensor, state: State, hyper: Hyper, betas: tuple[float, float]
) -> tuple[Tensor, Tensor, float, float]:
    """m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2; returns m, v and both bias corrections 1 - b^t."""
    step = count(state)
    first = moment(state, "exp_avg", grad, hyper)
    second = moment(state, "exp_avg_sq", grad, hyper)
    g = grad.to(first.dtype)
    first.lerp_(g, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    return wide(first), wide(second), 1 - betas[0] ** step, 1 - betas[1] ** step


def adam_direction(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) with the method's own `betas` and `eps`."""
    m, v, bias1, bias2 = adam_moments(grad, state, hyper, hyper["betas"])
    return (m / bias1) / ((v / bias2).sqrt() + hyper["eps"])


def adamw_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """(m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps): Adam as in torch.optim.AdamW."""
    m, v, bias1, bias2 = adam_moments(grad, state, hyper, hyper["adamw_betas"])
    return (m / bias1) / ((v / bias2).sqrt() + hyper["adamw_eps"])


def legacy_adamw_update(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    """sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps): eps meets the uncorrected v, as in HF's old AdamW."""
    m, v, bias1, bias2 = adam_moments(grad, state, hyper, hyper["adamw_betas"])
    return m / (v.sqrt() + hyper["adamw_eps"]) * (bias2**0.5 / bias1)


ADAMW = Rule("adamw", adamw_update, elementwise=True)
LEGACY_ADAMW = Rule("adamw", legacy_adamw_update, elementwise=True)
ADAMW_ELSEWHERE: dict[str, Rule] = {Role.EMBEDDING: ADAMW, Role.LM_HEAD: ADAMW, Role.VECTOR: ADAMW}


class Options(TypedDict, total=False):
    """Options that methods share; `MatrixOptimizer.shared_options` says which of them mean something."""

    cautious_weight_decay: bool
    adamw_lr: float | None
    adamw_betas: tuple[float, float]
    adamw_eps: float
    state_dtype: Literal["param", "fp32"]


SHARED_DEFAULTS = Options(
    cautious_weight_decay=False,
    adamw_lr=None,
    adamw_betas=(0.9, 0.999),
    adamw_eps=1e-8,
    state_dtype="param",
)

_NONNEGATIVE = ("at least 0", lambda value: value >= 0)
_POSITIVE = ("greater than 0", lambda value: value > 0)
_DECAY_RATE = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_DECAY_RATES = ("two numbers, each at least 0 and below 1", lambda pair: all(0 <= beta < 1 for beta in pair))
_COUNT = ("an integer of at least 1", lambda value: value >= 1 and int(value) == value)
# Options with the same name obey the same rule in every method.
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": _NONNEGATIVE,
    "weight_decay": _NONNEGATIVE,
    "adamw_lr": ("greater than 0, or null for the value of lr", lambda value: value is None or value > 0),
    "adamw_betas": _DECAY_RATES,
    "adamw_eps": _POSITIVE,
    "betas": _DECAY_RATES,
    "momentum": _DECAY_RATE,
    "beta2": _DECAY_RATE,
    "eps": _POSITIVE,
    "normalizer_eps": _POSITIVE,
    "alpha": ("greater than 0", lambda value: value is None or value > 0),
    "scale": _POSITIVE,
    "ns_steps": _COUNT,
    "iterations": _COUNT,
    "update_proj_gap": _COUNT,
    "precond_lr": _POSITIVE,
    "max_size_triangular": _COUNT,
    "min_update_probability": ("greater than 0 and at most 1", lambda value: 0 < value <= 1),
    "embedding_radius": _POSITIVE,
    "free_steps": ("an integer of at least 0", lambda value: value >= 0 and int(value) == value),
    "delta": _POSITIVE,
    "wd_ratio": ("between 0 and 1", lambda value: 0 <= value <= 1),
    "max_weight_norm": ("greater than 0, or null for no limit", lambda value: value is None or value > 0),
    "state_dtype": ("param or fp32", lambda value: value in ("param", "fp32")),
    "lr_mode": (f"one of {', '.join(LR_MODES)}", lambda value: value in LR_MODES),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first option outside its range."""
    for key, value in options.items():
        if key in RANGES:
            rule, holds = RANGES[key]
            if not holds(value):
                raise UserError(f"optimizer.{key}={value!r} must be {rule}")


class MatrixOptimizer(Optimizer):
    """One optimizer over all parameters of a model: hidden matrices get the method, other roles what it says.

    `params` is what torch optimizers take. A group may carry `role` (hidden_matrix, embedding, lm_head,
    vector); without one, vectors and matrices with one row or column are `vector` and everything else is
    `hidden_matrix`, so embeddings and heads need theirs: `route_parameters(model)` knows it. Named
    parameters, `(name, tensor)`, are needed where an option or a random number goes by name.

    State is made in `step`, is tensors only and keeps its dtype through `load_state_dict`; `step` never
    writes `p.grad`. Weight decay is decoupled and skips vectors unless their group sets its own.
    """

    # Role -> rule; or, where released code and paper differ, variant -> role -> rule.
    rules: ClassVar[Mapping[str, Rule]] = {}
    variants: ClassVar[Mapping[str, Mapping[str, Rule]]] = {}
    # Stacking equal shapes pays where launches cost; a processor gains nothing and would only copy.
    stack_devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    stack_elements: ClassVar[int] = 2**25

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

    @classmethod
    def shared_options(cls) -> dict[str, Any]:
        """The shared options that do something here, with their defaults.

        AdamW's belong to methods that leave a role to it, cautious decay to those without a decay of their own.
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
        self._check_shapes(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; the others, and their decay, rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = self.rule(group)
            hyper = {**group, "lr": float(group["lr"]), **self.context(group)}
            for names, parameters in self._batches(group, rule):
                self._move(parameters, rule, {**hyper, "name": names[0]})
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state; state keeps its dtype, where torch would cast it to the parameter's."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                device = value.device if key == "step" else parameter.device
                self.state[parameter][key] = value.detach().to(device, copy=True)

    def state_bytes(self, group: Hyper, parameter: Tensor) -> int:
        """Bytes of state that this parameter will have, all processes together, from a run without data."""
        grad = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        state: dict[str, Tensor] = {}
        rule = self.rule(group)
        hyper = {**group, **self.context({**group, "params": []}), "name": ""}
        rule.update(grad, state, hyper, *([grad] if rule.reads_weight else []))
        if rule.project is not None:
            rule.project(grad, state)
        return sum(value.numel() * value.element_size() for value in state.values())

    def update_rms(self, group: Hyper, parameter: Tensor) -> float | None:
        """RMS of this parameter's update per unit of learning rate, None where it depends on the data."""
        return update_rms(self.rule(group).size, parameter.shape, group)

    def _check_shapes(self, group: Hyper) -> None:
        for name, parameter in _named(group):
            if group["role"] != Role.VECTOR and parameter.ndim not in (2, 3):
                raise UserError(
                    f"{name} has role={group['role']} and shape {tuple(parameter.shape)}, but "
                    f"{type(self).__name__} treats matrices and stacks of matrices there; put a vector in a "
                    "group with role=vector, and flatten a convolution to (out, in)"
                )
            blocks_of(name, parameter.shape, group.get("row_blocks"))

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
            if rule.stacks and parameter.device.type in self.stack_devices:
                blocks = blocks_of(name, parameter.shape, group.get("row_blocks"))
                kept = tuple(sorted(self.state.get(parameter, {})))
                key = (parameter.shape, parameter.dtype, parameter.device, blocks, kept)
            buckets.setdefault(key, []).append((name, parameter))
        for bucket in buckets.values():
            size = max(1, self.stack_elements // max(1, bucket[0][1].numel()))
            for start in range(0, len(bucket), size):
                names, parameters = zip(*bucket[start : start + size], strict=True)
                yield list(names), list(parameters)

    def _move(self, parameters: list[Tensor], rule: Rule, hyper: Hyper) -> None:
        shape = parameters[0].shape
        blocks = blocks_of(hyper["name"], shape, hyper.get("row_blocks"))
        hyper = {**hyper, "blocks": blocks}
        sites = [Site(p, self.state.get(p, {}), rule.elementwise) for p in parameters]
        updates = _updates(sites, rule, hyper)
        factor = shape_factor(rule.size, shape, hyper)
        for site, update in zip(sites, updates, strict=True):
            site.store()
            if site.held:
                self.state[site.parameter] = site.held
            if isinstance(factor, Tensor):
                update = update * factor.to(update)
            self._apply(site, update, rule, hyper, 1.0 if isinstance(factor, Tensor) else factor)

    def _apply(self, site: Site, update: Tensor, rule: Rule, hyper: Hyper, factor: float) -> None:
        lr, decay = hyper["lr"], 0.0 if rule.decays else hyper["weight_decay"]
        weight, step = local(site.parameter.detach()), site.shard(update)
        if decay and hyper.get("cautious_weight_decay"):
            # Only where the update shrinks the weight anyway: decay never works against the gradient.
            weight.sub_(lr * decay * weight * (step * weight > 0))
        elif decay:
            weight.mul_(1 - lr * decay)
        weight.add_(step, alpha=-lr * factor)
        if rule.project is not None:
            weight.copy_(site.shard(rule.project(site.weight, site.state)))
            site.store()


def matrix_builder(method: type[MatrixOptimizer]) -> Callable[..., Optimizer]:
    """The row of a method in the registry: builder(parameters with roles, lr, *, options)."""

    def build(parameters: Sequence[RoutedParameter], lr: float, **options: Any) -> Optimizer:
        groups = []
        for role in Role:
            members = [(routed.name, routed.parameter) for routed in parameters if routed.role is role]
            if members:
                groups.append({"params": members, "role": str(role)})
        return method(groups, lr=lr, **options)

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


def _role_by_shape(member: Any) -> Role:
    shape = (member[1] if isinstance(member, tuple) else member).shape
    return Role.VECTOR if len(shape) < 2 or min(shape[-2:]) == 1 else Role.HIDDEN_MATRIX
