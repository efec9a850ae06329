"""What the config keys `attention` and `attention_options` may be, and the attention of every layer.

    attention: nalaformer                             every layer
    attention: {pattern: [nalaformer, softmax]}       repeats; its length divides num_hidden_layers
    attention: {softmax_every: 4, linear: sla}        layers 4, 8, ... softmax, the others linear (nalaformer)

`attention_options` are those of the one attention, or with a mapping those of each by its name:
{nalaformer: {lambda: 3.0}, softmax: {gate: head}}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .options import Option, Options, is_count, is_number, is_switch, nearest

LINEAR = ("nalaformer", "sla")
POSITIONS = ("none", "before", "after")


def _number(default: float, accepts: Callable[[float], bool], rule: str) -> Option:
    return Option(default, lambda value, _: is_number(value) and accepts(value), rule)


def _switch(default: bool) -> Option:
    return Option(default, is_switch, "must be true or false")


def _choice(default: str, *choices: str) -> Option:
    return Option(default, lambda value, _: value in choices, f"must be one of {', '.join(choices)}")


def _positive_or(default: float | str, *names: str, meaning: str) -> Option:
    return Option(
        default,
        lambda value, _: value in names if isinstance(value, str) else is_number(value) and value > 0,
        f"must be a number above 0{''.join(f' or {name}' for name in names)}, {meaning}",
    )


def _taps(default: int) -> Option:
    return Option(
        default,
        lambda value, _: is_count(value) and (value == 0 or value >= 2),
        "must be 0 (none) or at least 2, the taps of the causal convolution",
    )


CHUNK = Option(
    64,
    lambda value, _: is_count(value) and value >= 1 and value & (value - 1) == 0,
    "must be a power of two, the tokens of a chunk",
)
EPS = _number(1e-6, lambda v: v > 0, "must be a number above 0, added to the normalizer")
FLOOR = "must be a number of at least 0, the constant feature of queries and keys; 0 is none"
LAMBDA = "must be a number above 0, the factor of the exponent lambda (tau + tanh n)"
TAU = "must be a number of at least 0, the offset of the exponent lambda (tau + tanh n)"

# name -> option -> default and rule
ATTENTION_OPTIONS: dict[str, dict[str, Option]] = {
    "softmax": {
        "gate": _choice("none", "none", "head", "elementwise"),
        "normalizer": _choice("softmax", "softmax", "off_by_one", "sigmoid"),
        "logits_over": _choice("sqrt_head_dim", "sqrt_head_dim", "head_dim", "hidden_size"),
        "logit_factor": _positive_or(1.0, meaning="which multiplies q k^T / logits_over"),
        "output_factor": _positive_or(
            1.0, "inverse_sqrt_heads", meaning="which multiplies what the heads give W_o"
        ),
    },
    "nalaformer": {
        "feature_map": _choice("relu_split", "relu_split", "cosine", "relu"),
        "lambda": _number(3.0, lambda v: v > 0, LAMBDA),
        "tau": _number(0.5, lambda v: v >= 0, TAU),
        "query_norm": _choice("rms", "rms", "l2"),
        "learned_scale": _switch(True),
        "key_norm": _switch(True),
        "floor": _number(0.1, lambda v: v >= 0, FLOOR),
        "short_convolution": _taps(4),
        "value_convolution": _taps(0),
        "gate": _switch(True),
        "output_norm": _switch(True),
        "rope": _choice("none", *POSITIONS),
        "chunk_size": CHUNK,
        "eps": EPS,
    },
    "sla": {
        "key_norm": _switch(False),
        "floor": _number(0.1, lambda v: v >= 0, FLOOR),
        "short_convolution": _taps(0),
        "value_convolution": _taps(5),
        "gate": _switch(False),
        "output_norm": _switch(False),
        "rope": _choice("none", *POSITIONS),
        "chunk_size": CHUNK,
        "eps": EPS,
    },
}
EXPONENT_OPTIONS = ("lambda", "tau", "query_norm", "learned_scale")  # read by norm-aware maps only


def layer_attentions(attention: Any, num_layers: int) -> list[str]:
    """The name of each layer's attention, first to last.

    Raises:
        ValueError: an unknown name or key, or a pattern whose length does not divide the layers.
    """
    if isinstance(attention, Mapping):
        pattern, key = _pattern(attention)
        if num_layers % len(pattern):
            raise ValueError(
                f"attention={dict(attention)!r}: {key} repeats every {len(pattern)} layers, which does not "
                f"divide num_hidden_layers={num_layers}; use one of "
                f"{', '.join(str(n) for n in range(1, num_layers + 1) if num_layers % n == 0)}"
            )
        return pattern * (num_layers // len(pattern))
    _known(attention)
    return [attention] * num_layers


def _known(name: Any) -> None:
    if not isinstance(name, str) or name not in ATTENTION_OPTIONS:
        raise ValueError(f"attention={name!r} is not a choice; {nearest(name, ATTENTION_OPTIONS)}")


def _pattern(attention: Mapping[str, Any]) -> tuple[list[str], str]:
    unknown = attention.keys() - {"pattern", "softmax_every", "linear"}
    for key in unknown:
        known = nearest(key, ["pattern", "softmax_every", "linear"])
        raise ValueError(f"attention.{key} is not a key of attention; {known}")
    if "pattern" in attention:
        pattern = attention["pattern"]
        if len(attention) > 1 or not isinstance(pattern, (list, tuple)) or not pattern:
            raise ValueError(
                f"attention={dict(attention)!r}: pattern must be a list of names, and stand alone"
            )
        for name in pattern:
            _known(name)
        return list(pattern), "attention.pattern"
    every: Any = attention.get("softmax_every")
    linear = attention.get("linear", "nalaformer")
    if not is_count(every) or every < 2:
        raise ValueError(
            f"attention.softmax_every={every!r} must be an integer of at least 2: that layer of each so many "
            "is softmax. For softmax in all layers write attention: softmax"
        )
    if linear not in LINEAR:
        raise ValueError(f"attention.linear={linear!r} is not a choice; {nearest(linear, LINEAR)}")
    return [linear] * (every - 1) + ["softmax"], "attention.softmax_every"


def settle_attention_options(attention: Any, given: Options, num_layers: int) -> Options:
    """Check `attention_options`; return them with every default filled in, in the form they have.

    Raises:
        ValueError: naming the option, its value and the rule.
    """
    names = list(dict.fromkeys(layer_attentions(attention, num_layers)))
    if not isinstance(attention, Mapping):
        return _settle(attention, given, "attention_options")
    for name, options in given.items():
        if name not in names:
            raise ValueError(
                f"attention_options.{name} is for an attention that no layer has; with a mapping in "
                f"attention the options of each stand under its name: {', '.join(names)}"
            )
        if not isinstance(options, Mapping):
            raise ValueError(f"attention_options.{name}={options!r} must be a mapping from option to value")
    return {name: _settle(name, given.get(name, {}), f"attention_options.{name}") for name in names}


def _settle(name: str, given: Mapping[str, Any], where: str) -> Options:
    known = ATTENTION_OPTIONS[name]
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{where}.{key} is not an option of attention={name}; {nearest(key, known)}")
        if not known[key].accepts(value, 0):
            raise ValueError(f"{where}.{key}={value!r} {known[key].rule}")
    options = {key: given.get(key, option.default) for key, option in known.items()}
    _check_together(name, options, where)
    return options


def _check_together(name: str, options: Options, where: str) -> None:
    if options.get("rope") == "after" and not options["output_norm"]:
        raise ValueError(
            f"{where}.rope=after rotates features, so that weights may be negative and rows need not sum to "
            f"1; it needs {where}.output_norm=true, or use rope=none or rope=before"
        )
    if options.get("feature_map") == "relu":
        for key in EXPONENT_OPTIONS:
            if options[key] != ATTENTION_OPTIONS[name][key].default:
                raise ValueError(
                    f"{where}.{key}={options[key]!r} does nothing with feature_map=relu, which has no "
                    "exponent; remove it"
                )
    elif "lambda" in options and options["lambda"] * (options["tau"] + 1) <= 1:
        raise ValueError(
            f"{where}.lambda={options['lambda']!r} with tau={options['tau']!r} keeps the exponent lambda "
            "(tau + tanh n) at or below 1, where it is held, so that norms do nothing; raise lambda"
        )


def has_options(name: str, options: Options) -> bool:
    """Whether some option of `name` differs from its default."""
    return any(options[key] != option.default for key, option in ATTENTION_OPTIONS[name].items())
