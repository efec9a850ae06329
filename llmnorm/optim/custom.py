"""Any `torch.optim.Optimizer` class by its path: `optimizer.class_path: torch.optim.Adafactor`.

Its options pass through. Roles decide its groups as they do for AdamW: weight decay is off on vectors. What a
class can do is not declared anywhere, so it is tried out before the run, on a matrix and a vector of a few
elements: three steps with these options must work and leave state that a checkpoint can hold. The same trial
finds three traits that several processes care about:

    whole     the update of a matrix changes when its rows are cut in two, each half with an optimizer of its
              own; so it cannot work on the shards of FSDP2
    random    the update changes with torch's global seed, which differs between processes
    joint     the update of one parameter changes when another is left out; so it cannot work under DeepSpeed,
              where each parameter is moved by the process that owns it
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llmnorm.errors import UserError
from llmnorm.optim.roles import Role, RoutedParameter, group_by_role

Shape = tuple[int, ...]
STEPS = 3
TRIED: tuple[Shape, ...] = ((8, 4), (5,))
# Shapes whose state sizes determine a + b m + c n + d m n + e m^2 + f n^2, and one more to prove it.
SIZED: tuple[Shape, ...] = ((4, 6), (8, 6), (4, 10), (8, 10), (12, 6), (4, 14), (10, 12))


@dataclass(frozen=True)
class Custom:
    """A class, the name it was given by and its options, checked against its signature and tried out."""

    path: str
    method: Any  # a class of Optimizer, whose constructor has a signature of its own
    options: Mapping[str, Any]
    weight_decay: float

    @property
    def decays(self) -> bool:
        return "weight_decay" in _keywords(self.method) or _takes_any(self.method)

    def groups(self, parameters: Sequence[RoutedParameter]) -> list[dict[str, Any]]:
        """One named group per role, with `method` and, if the class knows it, `weight_decay`."""
        groups = group_by_role(parameters)
        for group in groups:
            group["method"] = self.method.__name__
            if self.decays:
                group["weight_decay"] = 0.0 if group["role"] == Role.VECTOR else self.weight_decay
        return groups

    def build(self, parameters: Sequence[RoutedParameter], lr: float) -> Optimizer:
        """The optimizer over `parameters`; whatever the class objects to becomes a UserError."""
        decay = {"weight_decay": self.weight_decay} if self.decays else {}
        try:
            return self.method(self.groups(parameters), lr=lr, **decay, **self.options)
        except Exception as error:
            raise UserError(
                f"optimizer.class_path={self.path} does not take these options: {error}"
            ) from error

    def try_out(self, tensors: Sequence[Tensor], seed: int = 0) -> tuple[list[Tensor], Optimizer]:
        """The tensors after STEPS updates with gradients that depend on their values alone, and the
        optimizer.
        """
        parameters = [nn.Parameter(tensor.clone()) for tensor in tensors]
        routed = [
            RoutedParameter(f"parameter_{i}", p, Role.VECTOR if p.ndim < 2 else Role.HIDDEN_MATRIX)
            for i, p in enumerate(parameters)
        ]
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            optimizer = self.build(routed, 1e-2)
            for step in range(1, STEPS + 1):
                for parameter in parameters:
                    parameter.grad = (step * 3.0 * parameter.detach()).sin() + 0.1
                self._step(optimizer)
        return [parameter.detach() for parameter in parameters], optimizer

    def _step(self, optimizer: Optimizer) -> None:
        try:
            optimizer.step()
        except Exception as error:
            raise UserError(
                f"optimizer.class_path={self.path} cannot make a step on a matrix and a vector with dense "
                f"gradients ({type(error).__name__}: {error}), as a model has; choose another class, or a "
                "method of our own by optimizer.name"
            ) from error


def custom_optimizer(
    path: str, parameters: Sequence[RoutedParameter], lr: float, weight_decay: float = 0.0, **options: Any
) -> Optimizer:
    """The optimizer of the class at `path` (package.module.Class) over all parameters.

    Raises UserError for a class that is not there or no optimizer, for options its signature does not have,
    for one that cannot train a model here, and for one that cannot work on sharded or replicated parameters
    when they are.
    """
    custom = Custom(path, load_class(path), options, weight_decay)
    custom = Custom(path, custom.method, _checked(custom), weight_decay)
    before = _examples()
    after, tried = custom.try_out(before)
    _require_saveable(custom, tried)
    _require_fitting(custom, parameters, before, after)
    optimizer = custom.build(parameters, lr)
    optimizer.custom = custom  # type: ignore[attr-defined]  # for the routing table
    return optimizer


def load_class(path: str) -> type[Optimizer]:
    """The optimizer class that `optimizer.class_path` names; a plugin's module goes by its file's name."""
    module_name, _, name = path.replace(".py:", ".").rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"optimizer.class_path={path}: module {module_name} cannot be imported ({error}); install it, or "
            f"list its file in plugins, as plugins: [{module_name.replace('.', '/')}.py]"
        ) from error
    method = getattr(module, name, None)
    if not (inspect.isclass(method) and issubclass(method, Optimizer)) or method is Optimizer:
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, Optimizer)]
        near = difflib.get_close_matches(name, classes, n=1)
        remedy = f"did you mean {module_name}.{near[0]}?" if near else "name one"
        raise UserError(f"optimizer.class_path={path} is no torch.optim.Optimizer class; {remedy}")
    _require_plain_step(path, method)
    return method


def _require_plain_step(path: str, method: type[Optimizer]) -> None:
    closure = inspect.signature(method.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"optimizer.class_path={path} needs a closure that computes the loss again in each step, which "
            "the training loop does not give; choose a method that needs one gradient per step"
        )
    if callable(getattr(method, "train", None)) and callable(getattr(method, "eval", None)):
        raise UserError(
            f"optimizer.class_path={path} keeps other weights for training than for evaluation (it has "
            "train() and eval()), which checkpoints and evaluations here do not switch; choose another class"
        )


def _keywords(method: type[Optimizer]) -> dict[str, inspect.Parameter]:
    """What the constructor takes by name, but for the parameters themselves."""
    parameters = list(inspect.signature(method).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p for p in parameters[1:] if p.kind in kinds}


def _takes_any(method: type[Optimizer]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method).parameters.values())


def _checked(custom: Custom) -> dict[str, Any]:
    """The options by the signature; lists become tuples, where YAML has no other way to say them."""
    known, path = _keywords(custom.method), custom.path
    names = [name for name in known if name != "lr"]
    if "lr" not in known and not _takes_any(custom.method):
        raise UserError(
            f"optimizer.class_path={path} takes no lr, which schedules multiply; choose another class"
        )
    given = {**custom.options, **({"weight_decay": custom.weight_decay} if custom.weight_decay else {})}
    for name, value in given.items():
        if name not in known and not _takes_any(custom.method):
            near = difflib.get_close_matches(name, names, n=1)
            raise UserError(
                f"optimizer.{name}={value!r} is not an option of {path}; it takes {', '.join(names)}"
                f"{f'; did you mean {near[0]}?' if near else ''}"
            )
    needed = [name for name in names if known[name].default is inspect.Parameter.empty and name not in given]
    if needed:
        raise UserError(f"optimizer.{needed[0]} is required by {path}; add it to the optimizer section")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in custom.options.items()}


def _examples() -> list[Tensor]:
    """Tensors of TRIED with values in (-1, 1), the same every time and no two alike."""
    return [torch.linspace(0.3, 7.0, int(torch.tensor(shape).prod())).sin().view(shape) for shape in TRIED]


def _require_saveable(custom: Custom, optimizer: Optimizer) -> None:
    for key, state in optimizer.state.items():
        if not isinstance(key, Tensor):
            raise UserError(
                f"optimizer.class_path={custom.path} keeps state under {key!r}, which is no parameter, so a "
                "checkpoint could not hold it; choose another class"
            )
        for name, value in state.items():
            if not _is_saveable(value):
                raise UserError(
                    f"optimizer.class_path={custom.path} keeps a {type(value).__name__} as {name!r}, which a "
                    "checkpoint cannot hold; state must be tensors, numbers, text, and lists or dicts of them"
                )


def _is_saveable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_saveable(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_saveable(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _require_fitting(
    custom: Custom, parameters: Sequence[RoutedParameter], before: list[Tensor], after: list[Tensor]
) -> None:
    """Refuse, by name, what several processes would compute wrongly."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and not all(map(_same, after, custom.try_out(before, seed=1)[0])):
        raise UserError(
            f"optimizer.class_path={custom.path} draws random numbers from torch's global generator, which "
            "differs between processes, so their weights would drift apart; train with one process, or draw "
            "from a torch.Generator seeded alike"
        )
    if any(isinstance(routed.parameter, DTensor) for routed in parameters):
        _require_cuttable(custom, before, after)


def _require_cuttable(custom: Custom, before: list[Tensor], after: list[Tensor]) -> None:
    if _is_whole(custom, before, after):
        raise UserError(
            f"optimizer.class_path={custom.path} looks beyond the rows of a shard (its update of a matrix "
            "changes when the matrix is cut in two), so it cannot work with parallel.strategy=fsdp2; set "
            "parallel.strategy: ddp, or write it as an llmnorm.optim.MatrixOptimizer, which gets whole "
            "matrices"
        )


def require_cuttable(optimizer: Optimizer) -> None:
    """Refuse a class of the user's own that cannot work on rows, before its parameters are cut."""
    custom: Custom | None = getattr(optimizer, "custom", None)
    if custom is not None:
        before = _examples()
        _require_cuttable(custom, before, custom.try_out(before)[0])


def require_separable(optimizer: Optimizer) -> None:
    """Refuse a class of the user's own that updates a parameter by what it knows of others."""
    custom: Custom | None = getattr(optimizer, "custom", None)
    if custom is None:
        return
    before = _examples()
    alone = [custom.try_out([part])[0][0] for part in before]
    if not all(map(_same, alone, custom.try_out(before)[0])):
        raise UserError(
            f"optimizer.class_path={custom.path} updates one parameter by what it knows of others (the "
            "update changes when they are left out), so it cannot run with parallel.strategy=deepspeed, "
            "where each parameter has an owner; set parallel.strategy: ddp"
        )


def _is_whole(custom: Custom, before: list[Tensor], after: list[Tensor]) -> bool:
    matrix, vector = before
    alone = [custom.try_out([part])[0][0] for part in (*matrix.chunk(2), vector)]
    return not (_same(torch.cat(alone[:2]), after[0]) and _same(alone[2], after[1]))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def custom_state_bytes(optimizer: Optimizer, parameter: Tensor) -> int | None:
    """Bytes of state for one parameter, fitted to those of small ones; None where no polynomial fits them."""
    custom: Custom = optimizer.custom  # type: ignore[attr-defined]
    if parameter.ndim != 2:
        small, large = (_bytes(custom, (n,), parameter.dtype) for n in (4, 8))
        return small + (large - small) * (parameter.numel() - 4) // 4
    terms = torch.tensor([_terms(*shape) for shape in SIZED], dtype=torch.float64)
    sizes = torch.tensor([_bytes(custom, shape, parameter.dtype) for shape in SIZED], dtype=torch.float64)
    factors = torch.linalg.lstsq(terms[:-1], sizes[:-1, None]).solution[:, 0]
    if float((terms[-1] @ factors - sizes[-1]).abs()) > 0.5:
        return None
    rounded = factors.mul(2).round().div(2)
    return round(float(torch.tensor(_terms(*parameter.shape), dtype=torch.float64) @ rounded))


def _terms(m: int, n: int) -> list[float]:
    return [1.0, m, n, m * n, m * m, n * n]


def _bytes(custom: Custom, shape: Shape, dtype: torch.dtype) -> int:
    _, optimizer = custom.try_out([torch.ones(shape, dtype=dtype)])
    tensors = [value for state in optimizer.state.values() for value in _tensors_in(state)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors_in(item)]
