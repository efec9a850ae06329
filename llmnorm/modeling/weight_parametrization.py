"""The config key `weight_parametrization`: what function of its stored matrix W a projection multiplies with.

Rows w_i, n inputs, s_1 the largest singular value with vectors u and v; names and their equations:

    spectral_norm          scale W / s_1                      gradient (scale G - <G, What> u v^T) / s_1
    sigma_reparam          gain W / s_1                       a learned gain, `initial_gain` at first
    weight_norm            g_i w_i / ||w_i||                  learned g, the norms of W's rows at first
    weight_conditioning    w_i / ||w_i||                      row equilibration, nothing learned
    weight_standardization g_i (w_i - mean) / (sqrt(n) std)   learned g, 1 at first; scaled: false is
                                                              (w_i - mean) / std
    spectral_conditioning  W + shift I                        I the rectangular identity

Sources: Spectral Normalization for GANs, arXiv 1802.05957; Stabilizing Transformer Training by Preventing
Attention Entropy Collapse (sigma Reparam), arXiv 2303.06296; Weight Normalization, arXiv 1602.07868; Weight
Conditioning for Smooth Optimization of Neural Networks, arXiv 2409.03424; Weight Standardization, arXiv
1903.10520, and its scaled form, arXiv 2101.08692; spectral conditioning of attention, arXiv 2603.07162.

Several in a list apply in turn, the first to W. `parametrized_linear.py` computes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .initialization import starts_at_zero
from .options import nearest

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig

METHODS = ("exact", "power")
ATTENTION_READERS = ("q_proj", "k_proj", "v_proj")
# projection -> its role in `initialization.py`
PROJECTIONS = {
    "q_proj": "attention_in",
    "k_proj": "attention_in",
    "v_proj": "attention_value",
    "o_proj": "attention_out",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "mlp_out",
}


@dataclass(frozen=True)
class Parametrization:
    """What settles and checks need to know of a name.

    options: with their defaults. changes: what it does to a matrix; blind_to: changes before it that it
    undoes, since f(c W) = f(W) ("scale") or f(D W) = f(W) for a positive diagonal D ("rows").
    """

    options: dict[str, Any]
    changes: str
    blind_to: tuple[str, ...]

    @property
    def scale_invariant(self) -> bool:
        return "scale" in self.blind_to


_SIGMA = {"method": "exact", "iterations": 1}
PARAMETRIZATIONS: dict[str, Parametrization] = {
    "spectral_norm": Parametrization({"scale": 1.0, **_SIGMA}, "scale", ("scale",)),
    "sigma_reparam": Parametrization({"initial_gain": 1.0, **_SIGMA}, "scale", ("scale",)),
    "weight_norm": Parametrization({}, "rows", ("scale", "rows")),
    "weight_conditioning": Parametrization({}, "rows", ("scale", "rows")),
    "weight_standardization": Parametrization({"scaled": True}, "centers", ("scale", "rows")),
    "spectral_conditioning": Parametrization({"shift": 10.0}, "shift", ()),
}


def settle_weight_parametrization(given: Any) -> list[dict[str, Any]] | None:
    """The config key `weight_parametrization` as a list with every default filled in; a name or a mapping
    alone is short for a list of one.

    Raises:
        ValueError: naming the key, its value and the rule.
    """
    if given is None or given == []:
        return None
    steps = [_settle(step) for step in (given if isinstance(given, list) else [given])]
    for before, after in pairwise(steps):
        if before["modules"] != after["modules"]:
            raise ValueError(
                f"weight_parametrization: {before['name']} and {after['name']} have other modules; several "
                "treat the same projections in turn, so give them the same"
            )
    for place, after in enumerate(steps):
        _check_order(steps[:place], after)
    return steps


def _settle(step: Any) -> dict[str, Any]:
    options = {"name": step} if isinstance(step, str) else step
    if not isinstance(options, dict) or "name" not in options:
        raise ValueError(
            f"weight_parametrization={step!r} must be null, a mapping such as {{name: spectral_norm}}, or a "
            "list of those"
        )
    options = {key: value for key, value in options.items() if value is not None}
    name = options.pop("name")
    if name not in PARAMETRIZATIONS:
        raise ValueError(
            f"weight_parametrization.name={name!r} is not a choice; {nearest(name, PARAMETRIZATIONS)}"
        )
    modules = ATTENTION_READERS if name == "spectral_conditioning" else tuple(PROJECTIONS)
    settled = {"name": name, "modules": list(modules), **PARAMETRIZATIONS[name].options}
    for key, value in options.items():
        _check_option(name, key, value, settled)
    if options.get("iterations") is not None and options.get("method", "exact") != "power":
        raise ValueError(
            f"weight_parametrization.iterations={options['iterations']} does nothing with method=exact; "
            "remove it, or set method: power"
        )
    settled |= options
    if settled.get("method") == "exact":
        del settled["iterations"]
    settled["modules"] = [module for module in PROJECTIONS if module in settled["modules"]]
    return settled


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_option(name: str, key: str, value: Any, known: dict[str, Any]) -> None:
    shown = f"weight_parametrization.{key}={value!r}"
    if key not in known:
        others = ", ".join(other for other in known if other != "name")
        raise ValueError(f"{shown} does nothing with name={name}, whose options are {others}; remove it")
    if key == "method" and value not in METHODS:
        raise ValueError(f"{shown} must be one of {', '.join(METHODS)}")
    if key == "scaled" and not isinstance(value, bool):
        raise ValueError(f"{shown} must be true (with a learned gain for each row) or false")
    if key == "iterations" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{shown} must be a positive integer")
    if key in ("scale", "initial_gain", "shift") and not _positive(value):
        raise ValueError(f"{shown} must be a number above 0")
    if key == "modules":
        unknown = [module for module in value if module not in PROJECTIONS] if isinstance(value, list) else []
        if not isinstance(value, list) or not value or unknown or len(set(value)) < len(value):
            raise ValueError(f"{shown} must be a list of different ones of {', '.join(PROJECTIONS)}")


def _check_order(before: list[dict[str, Any]], after: dict[str, Any]) -> None:
    for step in before:
        changes = PARAMETRIZATIONS[step["name"]].changes
        if changes in PARAMETRIZATIONS[after["name"]].blind_to or step["name"] == after["name"]:
            raise ValueError(
                f"weight_parametrization: {after['name']} undoes what {step['name']} before it does; remove "
                "one of them, or change their order"
            )

        if step.get("scaled") and "rows" in PARAMETRIZATIONS[after["name"]].blind_to:
            raise ValueError(
                f"weight_parametrization: {after['name']} undoes the gains of {step['name']} before it; set "
                "scaled: false there"
            )


def norms_away(steps: list[dict[str, Any]] | None) -> bool:
    """Whether the projections do not depend on the length of their stored matrices."""
    return steps is not None and PARAMETRIZATIONS[steps[0]["name"]].scale_invariant


def check_weight_parametrization(config: LlmNormConfig) -> None:
    """Raises ValueError for parts that it cannot treat, or that treat the same matrices."""
    steps = config.weight_parametrization
    if steps is None:
        return
    key = f"weight_parametrization.name={steps[0]['name']}"
    for holds, other, reason, remedy in _conflicts(config, steps):
        if holds:
            raise ValueError(f"{key} does not work with {other}, {reason}; {remedy}")
    if config.mlp == "plain" and steps[0]["modules"] == ["gate_proj"]:
        raise ValueError(f"{key} treats gate_proj alone, which mlp=plain has not; give other modules")
    if norms_away(steps):
        _check_start(config, key, steps[0]["modules"])


def _conflicts(config: LlmNormConfig, steps: list[dict[str, Any]]) -> list[tuple[bool, str, str, str]]:
    """(whether it is there, what, why not, remedy); docs/lipschitz.md lists them."""
    remedy = "remove one of them"
    norms = [config.norm] if isinstance(config.norm, str) else config.norm
    constraint = (config.weight_constraint or {}).get("name", "")
    return [
        (
            constraint not in ("", "normalize_and_project"),
            f"weight_constraint.name={constraint}",
            "which sees the stored matrices and not those that the model multiplies with",
            f"{remedy}, or use weight_constraint.name=normalize_and_project",
        ),
        (
            constraint == "normalize_and_project" and not norms_away(steps),
            f"weight_constraint.name={constraint}",
            "since its projections depend on the length of the stored matrices beside the shift",
            remedy,
        ),
        (
            config.quantization is not None,
            "quantization",
            "whose grids are fitted to the stored matrices",
            remedy,
        ),
        (
            config.mup is not None,
            "mup",
            "whose scales with the width are those of the stored matrices",
            remedy,
        ),
        (
            "ngpt" in norms,
            "norm=ngpt",
            "which keeps the rows or columns of the same matrices at unit length",
            "use another norm, or none of them",
        ),
        (
            config.is_recentered,
            "norm_options.recentered=true",
            "which projects the stored matrices",
            remedy,
        ),
        (
            config.is_compressed,
            f"norm={config.norm}",
            "whose compressed stream leaves out a row or column of the matrices",
            "use another norm, such as pre_rmsnorm",
        ),
    ]


def first_zero(config: LlmNormConfig, modules: Iterable[str]) -> tuple[str, int] | None:
    """A projection of `modules` that is 0 at first, and the layer of it, if there is one."""
    for module in modules:
        for layer in range(config.num_hidden_layers):
            present = module != "gate_proj" or config.mlp != "plain"
            if present and starts_at_zero(config, PROJECTIONS[module], layer + 1):
                return module, layer
    return None


def _check_start(config: LlmNormConfig, key: str, modules: list[str]) -> None:
    zero = first_zero(config, modules)
    if zero is not None:
        raise ValueError(
            f"{key} cannot treat {zero[0]} of layers.{zero[1]}, which init={config.init} with "
            f"norm={config.norm} starts at 0, where there is no direction to keep; leave {zero[0]} out of "
            "weight_parametrization.modules, or choose another init"
        )
