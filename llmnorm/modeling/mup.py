"""muP, the parametrization in which a learning rate found at one width is right at every width.

With m = hidden_size / base_hidden_size, all widths growing together (Tensor Programs V, arXiv 2203.03466):

    embedding                    std of the init rule            multiplier 1
    W_q W_k W_v W_o, MLP         std of the init rule / sqrt(m)  multiplier 1
    head, also a tied one        std of the init rule            logits times 1/m
    attention logits             q k^T sqrt(base_head_dim) / head_dim

where the init rule is asked at the base width. Learning rates are the optimizer's: `llmnorm.optim.mup`. At
m = 1 and head_dim = base_head_dim everything is as without muP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig

DEFAULTS = {"base_hidden_size": 256, "base_head_dim": 64}
# norm -> why its parameters do not transfer
REFUSED_NORMS = {
    "scalenorm": "its one gain grows with sqrt(hidden_size), and no learning rate with it",
    "ngpt": "its weights stay on the unit sphere, whose steps and scales have a parametrization of their own",
}


def settle_mup(mup: Any) -> dict[str, int] | None:
    """The key `mup` with its defaults filled in: null and false are None, true is DEFAULTS.

    Raises:
        ValueError: naming the key, its value and the rule.
    """
    if mup is None or mup is False:
        return None
    given = {} if mup is True else mup
    if not isinstance(given, dict):
        raise ValueError(f"mup={mup!r} must be true, false or a mapping with {', '.join(DEFAULTS)}")
    for key, value in given.items():
        if key not in DEFAULTS:
            raise ValueError(f"mup.{key}={value!r} is not a key of mup; known are {', '.join(DEFAULTS)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"mup.{key}={value!r} must be a positive integer")
    return {**DEFAULTS, **given}


def check_mup(config: LlmNormConfig) -> None:
    """Raises ValueError for a norm or an attention under which muP is not known to hold."""
    linear = set(config.layer_attentions) - {"softmax"} if config.mup else ()
    for name in sorted(linear):
        raise ValueError(
            f"mup={config.mup} has no rule for attention={name}, whose scores are not scaled; use softmax or "
            "remove mup"
        )
    over = {} if linear or not config.mup else config.attention_options_of("softmax")
    if over.get("logits_over", "sqrt_head_dim") != "sqrt_head_dim":
        raise ValueError(
            f"mup={config.mup} sets the scale of attention logits, which attention_options.logits_over="
            f"{over['logits_over']} would set too; remove one of them"
        )
    for norm in [config.norm] if isinstance(config.norm, str) else config.norm:
        if config.mup and norm in REFUSED_NORMS:
            raise ValueError(
                f"mup={config.mup} does not hold for norm={norm}: {REFUSED_NORMS[norm]}; use another norm or "
                "remove mup"
            )


def width_multiplier(config: LlmNormConfig) -> float:
    """m, and 1 without muP."""
    return config.hidden_size / config.mup["base_hidden_size"] if config.mup else 1.0


def output_multiplier(config: LlmNormConfig) -> float:
    """What multiplies the head's input."""
    return config.final_scale / width_multiplier(config)


def attention_scale(config: LlmNormConfig) -> float:
    """What multiplies q k^T of softmax attention."""
    options = config.attention_options_of("softmax") if "softmax" in config.layer_attentions else {}
    over = options.get("logits_over", "sqrt_head_dim")
    return LOGIT_SCALES[over](config) * options.get("logit_factor", 1.0)


def _over_sqrt_head_dim(config: LlmNormConfig) -> float:
    if config.mup:
        return math.sqrt(config.mup["base_head_dim"]) / config.head_dim
    return config.head_dim**-0.5


# attention_options.logits_over -> what multiplies q k^T
LOGIT_SCALES: dict[str, Callable[[LlmNormConfig], float]] = {
    "sqrt_head_dim": _over_sqrt_head_dim,
    "head_dim": lambda config: 1.0 / config.head_dim,
    "hidden_size": lambda config: 1.0 / config.hidden_size,
}
