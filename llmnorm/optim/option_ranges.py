"""Options that methods share, and the range of every option of every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, TypedDict

from llmnorm.errors import UserError
from llmnorm.optim.update_size import LR_MODES


class Options(TypedDict, total=False):
    """Options that methods share; `MatrixOptimizer.shared_options` says which of them mean something."""

    cautious_weight_decay: bool
    adamw_lr: float | None
    adamw_betas: tuple[float, float]
    adamw_eps: float
    state_dtype: Literal["param", "fp32"]
    stochastic_rounding: bool
    seed: int


SHARED_DEFAULTS = Options(
    cautious_weight_decay=False,
    adamw_lr=None,
    adamw_betas=(0.9, 0.999),
    adamw_eps=1e-8,
    state_dtype="param",
    stochastic_rounding=False,
    seed=0,
)

Rule = tuple[str, Callable[[Any], bool]]


def is_number(value: Any) -> bool:
    """Whether this is one finite number, which a tensor may hold; True and False are none."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def _real(rule: str, holds: Callable[[Any], bool]) -> Rule:
    return rule, lambda value: is_number(value) and bool(holds(value))


def _integer(least: int) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least

    return f"an integer of at least {least}", holds


def _or_null(rule: Rule, meaning: str) -> Rule:
    text, holds = rule
    return f"{text}, or null{meaning}", lambda value: value is None or holds(value)


def _decay_rates(count: int, word: str) -> Rule:
    def holds(values: Any) -> bool:
        several = isinstance(values, Sequence) and len(values) == count
        return several and all(_DECAY_RATE[1](value) for value in values)

    return f"{word} numbers, each at least 0 and below 1", holds


def _one_of(*choices: object) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(map(str, choices))}", lambda value: value in choices


_NONNEGATIVE = _real("a number of at least 0", lambda value: value >= 0)
_POSITIVE = _real("a number greater than 0", lambda value: value > 0)
_SHARE = _real("greater than 0 and at most 1", lambda value: 0 < value <= 1)
_DECAY_RATE = _real("at least 0 and below 1", lambda value: 0 <= value < 1)
_DECAY_RATES = _decay_rates(2, "two")
_NATURAL, _COUNT = _integer(0), _integer(1)
_FLAG = _one_of(True, False)


# Options with the same name obey the same rule in every method.
RANGES: dict[str, Rule] = {
    "lr": _NONNEGATIVE,
    "weight_decay": _NONNEGATIVE,
    "adamw_lr": _or_null(_POSITIVE, " for the value of lr"),
    "adamw_betas": _DECAY_RATES,
    "adamw_eps": _POSITIVE,
    "betas": _DECAY_RATES,
    "momentum": _DECAY_RATE,
    "beta2": _DECAY_RATE,
    "eps": _POSITIVE,
    "normalizer_eps": _POSITIVE,
    "alpha": _or_null(_POSITIVE, ""),
    "scale": _POSITIVE,
    "ns_steps": _COUNT,
    "iterations": _COUNT,
    "update_proj_gap": _COUNT,
    "precond_lr": _POSITIVE,
    "max_size_triangular": _COUNT,
    "min_update_probability": _SHARE,
    "embedding_radius": _POSITIVE,
    "free_steps": _NATURAL,
    "delta": _POSITIVE,
    "wd_ratio": _real("between 0 and 1", lambda value: 0 <= value <= 1),
    "max_weight_norm": _or_null(_POSITIVE, " for no limit"),
    "rank": _or_null(_COUNT, " for the default"),
    "side": _one_of("std", "auto", "right"),
    "projection": _one_of("svd", "gram", "randomized", "power", "random"),
    "error_feedback": _one_of(0, 32, 8, 4),
    "threshold": _POSITIVE,
    "reset_interval": _NATURAL,
    "warmup_steps": _NATURAL,
    "grace_steps": _NATURAL,
    "reset_clock": _one_of("restart", "global"),
    "cosine_steps": _or_null(_COUNT, ""),
    "density": _SHARE,
    "gammas": _decay_rates(3, "three"),
    "granularity": _one_of("channel", "tensor"),
    "moments": _one_of("keep", "transport", "reset"),
    "state_bits": _one_of(32, 8, 4),
    "projection_bits": _one_of(32, 4),
    "weights": _one_of("param", "int8"),
    "stochastic_rounding": _FLAG,
    "cautious_weight_decay": _FLAG,
    "stagger": _FLAG,
    "lazy_refresh": _FLAG,
    "quantize_embeddings": _FLAG,
    "variant": _one_of("released", "paper"),
    "seed": _NATURAL,
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
