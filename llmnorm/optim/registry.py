"""`create_optimizer`: the table of methods, and the routing table that is printed when a run starts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.optim import Optimizer

from llmnorm.errors import UserError
from llmnorm.optim.adamp import AdamP
from llmnorm.optim.adamw import adamw_state_bytes, build_adamw
from llmnorm.optim.adamw8bit import AdamW8bit
from llmnorm.optim.apollo import APOLLO, APOLLOMini
from llmnorm.optim.conda import Conda
from llmnorm.optim.custom import Custom, custom_optimizer, custom_state_bytes
from llmnorm.optim.dct_adamw import DCTAdamW
from llmnorm.optim.fira import Fira
from llmnorm.optim.foreign_state import check_methods
from llmnorm.optim.fused_backward import FusedBackward
from llmnorm.optim.galore import GaLore
from llmnorm.optim.gradnorm_lorp import GradNormLoRP
from llmnorm.optim.int8_weights import quantize_weights
from llmnorm.optim.lamb import LAMB
from llmnorm.optim.lanton import LANTON
from llmnorm.optim.lawn import LAWN
from llmnorm.optim.lowrank_optimizer import LowRankOptimizer
from llmnorm.optim.matrix_optimizer import MatrixOptimizer, matrix_builder
from llmnorm.optim.muon import Muon
from llmnorm.optim.mup import apply_mup
from llmnorm.optim.normuon import NorMuon
from llmnorm.optim.novograd import NovoGrad
from llmnorm.optim.option_ranges import is_number
from llmnorm.optim.psgd_kron import PSGDKron
from llmnorm.optim.qk_clip import QKClip
from llmnorm.optim.roles import route_parameters
from llmnorm.optim.scale import SCALE
from llmnorm.optim.sinkgd import SinkGD
from llmnorm.optim.spam import SPAM
from llmnorm.optim.stable_spam import StableSPAM
from llmnorm.optim.swan import SWAN
from llmnorm.optim.update_size import ADAM_RMS

MATRIX_METHODS: dict[str, type[MatrixOptimizer]] = {
    "adamp": AdamP,
    "adamw8bit": AdamW8bit,
    "apollo": APOLLO,
    "apollo_mini": APOLLOMini,
    "conda": Conda,
    "dct_adamw": DCTAdamW,
    "fira": Fira,
    "galore": GaLore,
    "gradnorm_lorp": GradNormLoRP,
    "lamb": LAMB,
    "lanton": LANTON,
    "lawn": LAWN,
    "muon": Muon,
    "normuon": NorMuon,
    "novograd": NovoGrad,
    "psgd_kron": PSGDKron,
    "scale": SCALE,
    "sinkgd": SinkGD,
    "spam": SPAM,
    "stable_spam": StableSPAM,
    "swan": SWAN,
}
# name -> builder(parameters with roles, lr, *, options) -> one Optimizer; the keyword-only arguments are the
# options that a user may give.
METHODS: dict[str, Callable[..., Optimizer]] = {
    "adamw": build_adamw,
    **{name: matrix_builder(method) for name, method in MATRIX_METHODS.items()},
}
# Methods of which `qk_clip` is an option: orthogonal updates grow every singular value of W_q and W_k alike,
# and attention logits with them.
CLIPPED_METHODS = ("lanton", "muon", "normuon")
# Methods that `fused_backward` cannot serve, and why: their update of one parameter needs all gradients.
# Every other row of METHODS moves each parameter by itself.
UNFUSED: dict[str, str] = {
    "lanton": "the rate of a layer depends on the gradient noise of its whole family",
}
# method of a parameter group -> bytes of state it keeps for one parameter.
STATE_BYTES: dict[str, Callable[[torch.Tensor], int]] = {
    "adamw": adamw_state_bytes,
}


class OptimizerFactory:
    """`create_optimizer(name, model, lr, **options)`: one optimizer over all trainable parameters of a model.

    A name with a dot is the path of any `torch.optim.Optimizer` class, such as `torch.optim.Adafactor`; see
    `custom.py`.

    Each parameter is in exactly one group; groups carry `role`, `method`, `param_names` and `initial_lr` (the
    peak that a schedule multiplies). `lr_multipliers={"embedding": 4.0}` scales the rate of a role, on top of
    whatever the method does to it. `step()` never writes `p.grad`. Under FSDP2 call it after
    `fully_shard`. With `weights="int8"` the hidden matrices of the model become INT8 weights; with
    `fused_backward=True` backward passes move the parameters, see `fused_backward.py`.

    Raises `UserError` for an unknown method or option and for lr <= 0.
    """

    def names(self) -> list[str]:
        """Every method, sorted."""
        return sorted(METHODS)

    def options(self, name: str) -> list[str]:
        """The options that a method takes besides the model and lr."""
        parameters = inspect.signature(self._builder(name)).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        names += ["fused_backward", "lr_multipliers"]
        return [*names, "qk_clip"] if name in CLIPPED_METHODS else names

    def __call__(self, name: str, model: nn.Module, lr: float, **options: Any) -> Optimizer:
        if not (is_number(lr) and lr > 0):
            raise UserError(
                f"optimizer.lr={lr} must be a number greater than 0; choose a peak learning rate such as 1e-3"
            )
        builder = partial(custom_optimizer, name) if "." in name else self._checked(name, options)
        fused = options.pop("fused_backward", False)
        multipliers = options.pop("lr_multipliers", None) or {}
        if fused:
            _require_fusable(name)
        if options.get("weights") == "int8":
            method = MATRIX_METHODS[name]
            assert issubclass(method, LowRankOptimizer)
            quantize_weights(model, method.weight_block)
        parameters = route_parameters(model)
        if not parameters:
            raise UserError(
                f"optimizer {name}: the model has no trainable parameter; set requires_grad on some"
            )
        threshold = options.pop("qk_clip", None)
        clip = None if threshold is None else QKClip(model, threshold)
        optimizer = builder(parameters, lr, **options)
        if clip is not None:
            clip.follow(optimizer)
        if not isinstance(optimizer, MatrixOptimizer):
            optimizer.register_load_state_dict_pre_hook(check_methods)
        apply_mup(optimizer, name, options, model)
        _multiply(optimizer, multipliers)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if fused:
            FusedBackward(optimizer)
        return optimizer

    def _checked(self, name: str, options: dict[str, Any]) -> Callable[..., Optimizer]:
        builder, known = self._builder(name), self.options(name)
        unknown = [option for option in options if option not in known]
        if unknown:
            raise UserError(
                f"optimizer.{unknown[0]}={options[unknown[0]]!r} is not an option of {name}; it takes "
                f"{', '.join(known)}{_suggestion(unknown[0], known)}"
            )
        return builder

    def _builder(self, name: str) -> Callable[..., Optimizer]:
        if name not in METHODS:
            raise UserError(
                f"optimizer.name={name!r} is not a known method; choose one of {', '.join(self.names())}"
                f"{_suggestion(name, self.names())}"
            )
        return METHODS[name]


create_optimizer = OptimizerFactory()


def _multiply(optimizer: Optimizer, multipliers: dict[str, float]) -> None:
    """Scale the learning rate of each role that `multipliers` names."""
    roles = sorted({group["role"] for group in optimizer.param_groups})
    for role, factor in multipliers.items():
        if role not in roles:
            raise UserError(
                f"optimizer.lr_multipliers names the role {role!r}, which no parameter of this model has; "
                f"its roles are {', '.join(roles)} (a head tied to the embedding counts as lm_head)"
            )
        if not factor > 0:
            raise UserError(
                f"optimizer.lr_multipliers.{role}={factor} must be greater than 0; freeze parameters with "
                "requires_grad instead"
            )
        for group in optimizer.param_groups:
            group["lr"] *= factor if group["role"] == role else 1.0


def _require_fusable(name: str) -> None:
    reason = UNFUSED.get(name)
    if "." in name:
        reason = "nothing says whether its class moves each parameter by itself"
    if reason is not None:
        able = ", ".join(sorted(METHODS.keys() - UNFUSED.keys()))
        raise UserError(
            f"optimizer.fused_backward=true does not work with {name}: {reason}; remove it, or choose one of "
            f"{able}"
        )


def sums_projections(name: str) -> bool:
    """Whether `fused_backward` can accumulate several backward passes for this method (`projected_sums`)."""
    method = MATRIX_METHODS.get(name)
    return method is not None and issubclass(method, LowRankOptimizer) and method.sums_projections


def _suggestion(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


@dataclass(frozen=True)
class Route:
    """One line of the routing table: what happens to the parameters of one role."""

    role: str
    method: str
    parameters: int
    elements: int
    state_bytes: int | None  # None: nobody knows before the first step
    lr: str  # the peak
    update_rms: str  # of one update at the peak learning rate


def _update_rms(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """The RMS an update of this group has at the peak learning rate, as a range over its matrices.

    What noisy gradients give is marked ~, such as the 0.2 lr of Adam; a dash where only the data knows.
    """
    if not isinstance(optimizer, MatrixOptimizer):
        return f"~{ADAM_RMS * group['lr']:.1e}" if group["method"] == "adamw" else "-"
    named = list(zip(group["params"], group["param_names"], strict=True))
    sizes, mark = [optimizer.update_rms(group, parameter, name) for parameter, name in named], ""
    if None in sizes:
        sizes, mark = [optimizer.usual_rms(group, parameter) for parameter, _ in named], "~"
    known = [size * group["lr"] for size in sizes if size is not None]
    if len(known) < len(sizes):
        return "-"
    low, high = f"{mark}{min(known):.1e}", f"{max(known):.1e}"
    return low if low == f"{mark}{high}" else f"{low}..{high}"


def routing_table(optimizer: Optimizer) -> list[Route]:
    """Role -> method -> parameters -> elements -> bytes of state, summed over processes -> update size."""
    routes = []
    for group in optimizer.param_groups:
        members = group["params"]
        elements = sum(parameter.numel() for parameter in members)
        sizes = (len(members), elements, _group_bytes(optimizer, group))
        lr, rms = f"{group['lr']:.2g}", _update_rms(optimizer, group)
        routes.append(Route(group["role"], group["method"], *sizes, lr, rms))
    return routes


def _group_bytes(optimizer: Optimizer, group: Mapping[str, Any]) -> int | None:
    size = cache_by_shape(partial(planned_state_bytes, optimizer, group))
    sizes = [size(parameter) for parameter in group["params"]]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def planned_state_bytes(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: torch.Tensor
) -> int | None:
    """Bytes of state of one parameter, all processes together; None where nobody knows before the first
    step."""
    if isinstance(optimizer, MatrixOptimizer):
        return optimizer.state_bytes(group, parameter)
    if isinstance(getattr(optimizer, "custom", None), Custom):
        return custom_state_bytes(optimizer, parameter)
    return STATE_BYTES[group["method"]](parameter)


def cache_by_shape(size: Callable[[torch.Tensor], int | None]) -> Callable[[torch.Tensor], int | None]:
    """`size`, asked once for each shape and dtype: a model has hundreds of parameters and ten shapes."""
    known: dict[Any, int | None] = {}

    def cached(parameter: torch.Tensor) -> int | None:
        key = (parameter.shape, parameter.dtype)
        if key not in known:
            known[key] = size(parameter)
        return known[key]

    return cached


def _mebibytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:,.1f}"


def format_routing_table(routes: list[Route]) -> str:
    """The routing table as aligned text, with a total."""
    total = Route(
        "total",
        "",
        sum(route.parameters for route in routes),
        sum(route.elements for route in routes),
        None if None in (known := [route.state_bytes for route in routes]) else sum(filter(None, known)),
        "",
        "",
    )
    lines = [
        f"{'role':<14} {'method':<12} {'tensors':>8} {'elements':>15} {'state MiB':>12} {'lr':>9} "
        f"{'update RMS':>18}"
    ]
    for route in (*routes, total):
        lines.append(
            f"{route.role:<14} {route.method:<12} {route.parameters:>8} {route.elements:>15,} "
            f"{_mebibytes(route.state_bytes):>12} {route.lr:>9} {route.update_rms:>18}".rstrip()
        )
    return "\n".join(lines)
