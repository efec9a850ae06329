"""The config key `weight_constraint`: what the weights must obey after every update.

The model computes the same function with it as without; `spectral_constraints` and `norm_keeping` of
`llmnorm.optim` read the key and move the weights. `max_norm` is root mean square to root mean square: the
largest singular value of a matrix with m outputs and n inputs, divided by sqrt(m/n).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .weight_parametrization import PROJECTIONS, first_zero

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig

_ROWS = {"embedding_max_rms": 1.0, "head_max_rms": 1.0}
_NORM = {"max_norm": 1.0, **_ROWS}
# name -> its options with their defaults
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "spectral_cap": {"method": "exact", **_NORM},
    "spectral_soft_cap": _NORM,
    "spectral_normalize": _NORM,
    "spectral_hammer": _NORM,
    "spectral_weight_decay": {"decay": 0.1, **_ROWS},
    "stiefel": _NORM,
    "normalize_and_project": {},
}
METHODS = ("exact", "polynomial")
# norm -> why its weights cannot obey a second rule
REFUSED_NORMS = {
    "ngpt": "keeps the rows or columns of every matrix at unit length",
    "scalenorm": "may keep the embedding's rows at a fixed length",
}


def settle_weight_constraint(options: Any) -> dict[str, Any] | None:
    """The config key `weight_constraint` with its defaults filled in; a name alone is short for {name: it}.

    Raises:
        ValueError: naming the key, its value and the rule.
    """
    if options is None or options == "none":
        return None
    given = {"name": options} if isinstance(options, str) else options
    if not isinstance(given, dict) or "name" not in given:
        raise ValueError(
            f"weight_constraint={options!r} must be null or a mapping such as {{name: spectral_cap, "
            "max_norm: 1.0}"
        )
    given = {key: value for key, value in given.items() if value is not None}
    name = given["name"]
    if name == "none" and len(given) == 1:
        return None
    if name not in CONSTRAINTS:
        known = ", ".join((*CONSTRAINTS, "none"))
        more = "takes no options; remove them" if name == "none" else f"must be one of {known}"
        raise ValueError(f"weight_constraint.name={name!r} {more}")
    known_options = CONSTRAINTS[name]
    for key, value in given.items():
        if key != "name":
            _check_option(name, key, value, known_options)
    return {"name": name, **known_options, **given}


def _check_option(name: str, key: str, value: Any, known: dict[str, Any]) -> None:
    if key not in known:
        raise ValueError(
            f"weight_constraint.{key}={value!r} does nothing with name={name}, whose options are "
            f"{', '.join(known)}; remove it"
        )
    if key == "method":
        if value not in METHODS:
            raise ValueError(f"weight_constraint.method={value!r} must be one of {', '.join(METHODS)}")
    elif not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"weight_constraint.{key}={value!r} must be a number above 0")


def keeps_norms(config: LlmNormConfig) -> bool:
    """Whether the model remembers the Frobenius norms that its matrices started with."""
    return (config.weight_constraint or {}).get("name") == "normalize_and_project"


def check_weight_constraint(config: LlmNormConfig) -> None:
    """Raises ValueError for weights that it cannot hold: tied, quantized or under another rule."""
    if config.weight_constraint is None:
        return
    _check_others(config)
    zero = first_zero(config, PROJECTIONS) if keeps_norms(config) else None
    if zero is not None:
        raise ValueError(
            f"weight_constraint.name=normalize_and_project would keep {zero[0]} of layers.{zero[1]} at 0, "
            f"where init={config.init} with norm={config.norm} starts it; choose another init, or remove "
            "weight_constraint"
        )


def _check_others(config: LlmNormConfig) -> None:
    assert config.weight_constraint is not None
    key = f"weight_constraint.name={config.weight_constraint['name']}"
    if config.tie_word_embeddings:
        raise ValueError(
            f"{key} cannot treat the tied weight of tie_word_embeddings=true, whose rows would have to obey "
            "the embedding's rule and the head's at once; untie them or remove weight_constraint"
        )
    rounded = config.quantization is not None and config.quantization["weights"] != "none"
    if rounded and not keeps_norms(config):  # a grid's scale follows the length of the weights
        assert config.quantization is not None
        raise ValueError(
            f"{key} cannot hold for quantization.weights={config.quantization['weights']}: rounding to 4 "
            "bits comes after the constraint and moves singular values past it; set "
            "quantization.weights=none or remove weight_constraint"
        )
    for norm in [config.norm] if isinstance(config.norm, str) else config.norm:
        if norm in REFUSED_NORMS:
            raise ValueError(
                f"{key} cannot hold beside norm={norm}, which {REFUSED_NORMS[norm]}; use another norm or "
                "remove weight_constraint"
            )
    if config.is_recentered:
        raise ValueError(
            f"{key} cannot hold beside norm_options.recentered=true, which projects the same matrices; "
            "remove one of them"
        )
