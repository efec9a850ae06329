"""The block equation, as data: which norms, scales and shortcut each sublayer of each layer has.

For each sublayer f (attention or MLP); every N may be absent, every scale defaults to 1:

    z  = s_in * N_in(x)          norm_in, norm_in_scale
    y  = N_out(f(z))             norm_out
    xs = x  or  N_in(x)          shortcut
    u  = a * xs + b * y          shortcut_scale, branch_scale
    x' = c * N_post(u)           norm_post, output_scale

A value of the config key `norm` is one row of PRESETS: a function from the depth of a layer to that layer's
two sublayers, the options it takes, and its final norm. Adding a placement is adding a row; adding a norm is
adding a class to `norms.py`. The forward pass never asks which row it is in: `attach` gives every layer the
same few callables, an absent norm is the identity function, and a scale that equals 1 is not multiplied.

Parameter names. A norm is named after its place, whichever row it belongs to:

                 attention                        MLP
    norm_in      input_layernorm                  post_attention_layernorm     (Llama's names)
    norm_out     post_self_attn_layernorm         post_mlp_layernorm           (GLM-4's names)
    norm_post    attention_residual_norm          mlp_residual_norm

`post_attention_layernorm` is always the norm before the MLP, as in Llama. Other code uses that name for the
norm after the residual sum (Mix-LN) or for the norm of the attention output (Gemma 2, OLMo 2).
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .norms import make_norm

NORM_NAMES = {
    "attention": {
        "norm_in": "input_layernorm",
        "norm_out": "post_self_attn_layernorm",
        "norm_post": "attention_residual_norm",
    },
    "mlp": {
        "norm_in": "post_attention_layernorm",
        "norm_out": "post_mlp_layernorm",
        "norm_post": "mlp_residual_norm",
    },
}

Options = dict[str, Any]


@dataclass(frozen=True)
class Sublayer:
    """One sublayer's terms of the block equation; a norm is a key of `norms.NORMS`, or None (absent)."""

    norm_in: str | None = None
    norm_out: str | None = None
    norm_post: str | None = None
    shortcut: Literal["raw", "normed"] = "raw"
    norm_in_scale: float = 1.0
    shortcut_scale: float = 1.0
    branch_scale: float = 1.0
    output_scale: float = 1.0

    def __post_init__(self) -> None:
        assert self.norm_in is not None or self.norm_in_scale == 1.0, "s_in scales N_in, which is absent"
        assert self.norm_in is not None or self.shortcut == "raw", "a normed shortcut needs N_in"
        assert self.norm_in_scale == 1.0 or self.shortcut == "raw", "a normed shortcut would carry s_in"


@dataclass(frozen=True)
class Layer:
    attention: Sublayer
    mlp: Sublayer


@dataclass(frozen=True)
class ResidualPlan:
    """Every layer of a model, first to last, and the kind of its final norm (None: no final norm)."""

    layers: tuple[Layer, ...]
    final_norm: str | None


@dataclass(frozen=True)
class Option:
    """A key of `norm_options`: its default, the test a value must pass, and that test in words."""

    default: Any
    accepts: Callable[[Any, int], bool]  # (value, num_layers)
    rule: str


def _unchanged(options: Options, num_layers: int) -> Options:
    return options


@dataclass(frozen=True)
class Preset:
    """One value of the config key `norm`.

    layer(depth, num_layers, options) is the layer at `depth`, counted from 1; final_norm(options) the kind of
    the final norm; settle(options, num_layers) replaces options that depend on the model's size by what they
    come to.
    """

    layer: Callable[[int, int, Options], Layer]
    final_norm: Callable[[Options], str | None]
    options: dict[str, Option] = field(default_factory=dict)
    settle: Callable[[Options, int], Options] = _unchanged


def _both(sublayer: Sublayer) -> Layer:
    return Layer(attention=sublayer, mlp=sublayer)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


NORM_TYPE = Option("rmsnorm", lambda v, n: v in ("rmsnorm", "layernorm"), "must be rmsnorm or layernorm")
FINAL_NORM = Option(True, lambda v, n: isinstance(v, bool), "must be true or false")
POST_FRACTION = Option(
    None,
    lambda v, n: v is None or (_is_number(v) and 0.0 <= v <= 1.0),
    "must be a number in [0, 1], the share of the layers, from the first, that are Post-LN",
)
NUM_POST_LAYERS = Option(
    None,
    lambda v, n: v is None or (_is_count(v) and 0 <= v <= n),
    "must be an integer from 0 to num_hidden_layers, how many layers, from the first, are Post-LN",
)


def _pre_ln(kind: str) -> Preset:
    """Pre-LN, x' = x + f(N(x)) (GPT-2, LLaMA)."""
    return Preset(
        layer=lambda depth, num_layers, options: _both(Sublayer(norm_in=kind)),
        final_norm=lambda options: kind,
    )


def _post_ln(kind: str) -> Preset:
    """Post-LN, x' = N(x + f(x)) (Attention Is All You Need, arXiv 1706.03762).

    The last N already normalizes the output. A final norm after it is redundant but for its gain; it is there
    by default, since the published Post-LN baselines (Mix-LN, LNS, GPAS) have it and since Mix-LN with every
    layer Post-LN then equals this row. `final_norm: false` is the original Transformer.
    """
    return Preset(
        layer=lambda depth, num_layers, options: _both(Sublayer(norm_post=kind)),
        final_norm=lambda options: kind if options["final_norm"] else None,
        options={"final_norm": FINAL_NORM},
    )


def _mix_ln_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """Mix-LN: the first `num_post_layers` layers are Post-LN, the others Pre-LN (arXiv 2412.13795)."""
    kind = options["norm_type"]
    return _both(Sublayer(norm_post=kind) if depth <= options["num_post_layers"] else Sublayer(norm_in=kind))


def _settle_post_layers(options: Options, num_layers: int) -> Options:
    """num_post_layers = floor(post_fraction * num_layers), a quarter by default; only the integer is kept."""
    fraction, count = options.pop("post_fraction"), options["num_post_layers"]
    if fraction is not None and count is not None:
        raise ValueError(
            f"norm_options.post_fraction={fraction} and norm_options.num_post_layers={count} "
            "are two ways to say one thing; keep one of them"
        )
    if count is None:
        share = 0.25 if fraction is None else fraction
        # The small term forgives products such as 0.29 * 100 = 28.999999999999996.
        options["num_post_layers"] = math.floor(share * num_layers + 1e-9)
    return options


def _layernorm_scaling_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """LayerNorm Scaling: x' = x + f(N(x) / sqrt(depth)) (The Curse of Depth, arXiv 2502.05795)."""
    return _both(Sublayer(norm_in=options["norm_type"], norm_in_scale=1.0 / math.sqrt(depth)))


PRESETS: dict[str, Preset] = {
    "pre_ln": _pre_ln("layernorm"),
    "pre_rmsnorm": _pre_ln("rmsnorm"),
    "post_ln": _post_ln("layernorm"),
    "post_rmsnorm": _post_ln("rmsnorm"),
    "mix_ln": Preset(
        layer=_mix_ln_layer,
        final_norm=lambda options: options["norm_type"],
        options={"norm_type": NORM_TYPE, "post_fraction": POST_FRACTION, "num_post_layers": NUM_POST_LAYERS},
        settle=_settle_post_layers,
    ),
    "layernorm_scaling": Preset(
        layer=_layernorm_scaling_layer,
        final_norm=lambda options: options["norm_type"],
        options={"norm_type": NORM_TYPE},
    ),
}


def nearest(word: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known one, or else all of them."""
    names = list(known)
    match = difflib.get_close_matches(str(word), names, n=1)
    return f"did you mean {match[0]}?" if match else f"known are {', '.join(names)}"


def _rows(norm: str | Sequence[str], num_layers: int) -> list[str]:
    """The row of each layer; a single name serves them all."""
    rows: list[Any] = list(norm) if isinstance(norm, (list, tuple)) else [norm] * num_layers
    if len(rows) != num_layers:
        raise ValueError(
            f"norm lists {len(rows)} layers but num_hidden_layers={num_layers}; "
            "give one name for all layers, or one name for each"
        )
    for row in rows:
        if not isinstance(row, str) or row not in PRESETS:
            raise ValueError(f"norm={row!r} is not a norm; {nearest(row, PRESETS)}")
    return rows


def settle_options(norm: str | Sequence[str], norm_options: Options, num_layers: int) -> Options:
    """Check `norm` and `norm_options`; return the options with every default and computed value filled in.

    Settling settled options changes nothing, so a saved config loads as it was saved.

    Raises: ValueError: an unknown norm, a list of the wrong length, an option that no row in use takes, a bad
        value.
    """
    rows = list(dict.fromkeys(_rows(norm, num_layers)))
    known = {name: option for row in rows for name, option in PRESETS[row].options.items()}
    for name, value in norm_options.items():
        if name not in known:
            remedy = nearest(name, known) if known else "it takes no options, so remove it"
            raise ValueError(f"norm_options.{name} is not an option of norm={norm}; {remedy}")
        if not known[name].accepts(value, num_layers):
            raise ValueError(f"norm_options.{name}={value!r} {known[name].rule} (norm={norm})")
    options = {name: norm_options.get(name, option.default) for name, option in known.items()}
    for row in rows:
        options = PRESETS[row].settle(options, num_layers)
    return options


def residual_plan(norm: str | Sequence[str], norm_options: Options, num_layers: int) -> ResidualPlan:
    """The block equation of every layer. In a list of norms, the last one decides the final norm."""
    options = settle_options(norm, norm_options, num_layers)
    rows = _rows(norm, num_layers)
    return ResidualPlan(
        layers=tuple(PRESETS[row].layer(i + 1, num_layers, options) for i, row in enumerate(rows)),
        final_norm=PRESETS[rows[-1]].final_norm(options),
    )


def identity(x: Tensor) -> Tensor:
    """An absent norm, or a cast that is not needed."""
    return x


def _raw(x: Tensor, z: Tensor) -> Tensor:
    return x


def _normed(x: Tensor, z: Tensor) -> Tensor:
    return z


SHORTCUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"raw": _raw, "normed": _normed}


def _add_scaled_shortcut(xs: Tensor, y: Tensor, a: float) -> Tensor:
    return torch.add(y, xs, alpha=a)


def _add_scaled_branch(xs: Tensor, y: Tensor, b: float) -> Tensor:
    return torch.add(xs, y, alpha=b)


def _add_scaled_both(xs: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    return torch.add(a * xs, y, alpha=b)


def weighted_sum(a: float, b: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(xs, y) -> a * xs + b * y in as few passes as the scales allow."""
    if a == 1.0 and b == 1.0:
        return operator.add
    if b == 1.0:
        return partial(_add_scaled_shortcut, a=a)
    if a == 1.0:
        return partial(_add_scaled_branch, b=b)
    return partial(_add_scaled_both, a=a, b=b)


def attach(
    block: nn.Module, place: Literal["attention", "mlp"], spec: Sublayer, hidden_size: int, eps: float
) -> None:
    """Give `block` the callables of one sublayer's equation: three norms, `<place>_shortcut` and
    `<place>_sum`.

    The norms go by NORM_NAMES. The scale c joins N_post where there is one, and otherwise a and b, so it
    costs nothing.
    """
    scales = {"norm_in": spec.norm_in_scale, "norm_out": 1.0, "norm_post": spec.output_scale}
    for slot, name in NORM_NAMES[place].items():
        kind = getattr(spec, slot)
        setattr(block, name, make_norm(kind, hidden_size, eps, scales[slot]) if kind else identity)
    c = 1.0 if spec.norm_post else spec.output_scale
    setattr(block, f"{place}_shortcut", SHORTCUTS[spec.shortcut])
    setattr(block, f"{place}_sum", weighted_sum(c * spec.shortcut_scale, c * spec.branch_scale))
