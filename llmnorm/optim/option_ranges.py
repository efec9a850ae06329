"""Options that methods share, and the range of every option of every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

_NONNEGATIVE = ("at least 0", lambda value: value >= 0)
_POSITIVE = ("greater than 0", lambda value: value > 0)
_DECAY_RATE = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_DECAY_RATES = ("two numbers, each at least 0 and below 1", lambda pair: all(0 <= beta < 1 for beta in pair))
_NATURAL = ("an integer of at least 0", lambda value: value >= 0 and int(value) == value)
_COUNT = ("an integer of at least 1", lambda value: value >= 1 and int(value) == value)


def _one_of(*choices: object) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(map(str, choices))}", lambda value: value in choices


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
    "free_steps": _NATURAL,
    "delta": _POSITIVE,
    "wd_ratio": ("between 0 and 1", lambda value: 0 <= value <= 1),
    "max_weight_norm": ("greater than 0, or null for no limit", lambda value: value is None or value > 0),
    "rank": ("an integer of at least 1, or null for the default", lambda value: value is None or value >= 1),
    "side": _one_of("std", "auto", "right"),
    "projection": _one_of("svd", "gram", "randomized", "power", "random"),
    "error_feedback": _one_of(0, 32, 8, 4),
    "threshold": _POSITIVE,
    "reset_interval": _NATURAL,
    "warmup_steps": _NATURAL,
    "grace_steps": _NATURAL,
    "reset_clock": _one_of("restart", "global"),
    "cosine_steps": ("an integer of at least 1, or null", lambda value: value is None or value >= 1),
    "density": ("greater than 0 and at most 1", lambda value: 0 < value <= 1),
    "gammas": ("three numbers, each at least 0 and below 1", lambda three: all(0 <= g < 1 for g in three)),
    "granularity": _one_of("channel", "tensor"),
    "moments": _one_of("keep", "transport", "reset"),
    "state_bits": _one_of(32, 8, 4),
    "projection_bits": _one_of(32, 4),
    "weights": _one_of("param", "int8"),
    "stochastic_rounding": _one_of(True, False),
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
