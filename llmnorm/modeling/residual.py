"""The placements: what the config key `norm` may be, and the block equation of every layer it stands for.

A value of `norm` is one row of PRESETS: a function from the depth of a layer to that layer's two sublayers,
the options it takes, and its final norm. Adding a placement is adding a row; adding a norm is adding a class
to `norms.py`. The terms of a row are those of `equation.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .equation import Layer, LearnedScale, ProjectionNorm, ResidualPlan, Sublayer
from .norms import Settings
from .plugin_norms import is_plugin

Options = dict[str, Any]


@dataclass(frozen=True)
class Option:
    """A key of `norm_options`: its default, the test a value must pass, and that test in words.

    An option with `needs` exists only beside that value of another option.
    """

    default: Any
    accepts: Callable[[Any, int], bool]  # (value, num_layers)
    rule: str
    needs: tuple[str, Any] | None = None


def _no_norm(options: Options) -> str | None:
    return None


def _no_settings(options: Options) -> Settings:
    return ()


def _no(options: Options) -> bool:
    return False


def _unchanged(options: Options, num_layers: int) -> Options:
    return options


@dataclass(frozen=True)
class Preset:
    """One value of the config key `norm`.

    layer(depth, num_layers, options) is the layer at `depth`, counted from 1; final_norm(options) the kind of
    the final norm, and embedding_norm(options) that of the norm on the embedding; settle(options, num_layers)
    replaces options that depend on the model's size by what they come to; final_norm_settings(options) are
    those of a final norm that has some. unit_embeddings(options) says whether embedding and head have unit
    rows; such a row, and one with scaled logits, stands for all layers or none.
    """

    layer: Callable[[int, int, Options], Layer]
    final_norm: Callable[[Options], str | None]
    options: dict[str, Option] = field(default_factory=dict)
    settle: Callable[[Options, int], Options] = _unchanged
    embedding_norm: Callable[[Options], str | None] = _no_norm
    final_norm_settings: Callable[[Options], Settings] = _no_settings
    # The stream leaves out one of its features, which is minus the sum of the others.
    compressed: bool = False
    unit_embeddings: Callable[[Options], bool] = _no
    scaled_logits: bool = False


def _both(sublayer: Sublayer) -> Layer:
    return Layer(attention=sublayer, mlp=sublayer)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_switch(value: Any, num_layers: int) -> bool:
    return isinstance(value, bool)


NORM_TYPE = Option("rmsnorm", lambda v, n: v in ("rmsnorm", "layernorm"), "must be rmsnorm or layernorm")
FINAL_AFFINE = Option(False, _is_switch, "must be true or false")
FINAL_NORM = Option(True, _is_switch, "must be true or false")
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


OWN_INIT = Option(
    True, _is_switch, "must be true (the method's own initialization) or false (model.init alone)"
)
FIRST_LAYER = Option("hybrid", lambda v, n: v in ("hybrid", "pre"), "must be hybrid or pre")
FIXNORM = Option(False, _is_switch, "must be true (unit rows of embedding and head) or false")
EMBEDDING_NORM = Option(False, _is_switch, "must be true or false")


SPHERE_STEP = Option(
    0.05,
    lambda v, n: _is_number(v) and 0.0 < v < 1.0,
    "must be a number between 0 and 1, the initial eigen learning rates",
)
HEAD_BIAS = Option(False, _is_switch, "must be true (a bias on the output layer) or false")
RECENTERED = Option(False, _is_switch, "must be true (trained as Pre-LN) or false (Llama)")


GPAS_BASE = Option(
    "pre",
    lambda v, n: v in GPAS_BASES,
    "must be pre, layernorm_scaling, sandwich, post, deepnorm or mix_ln, the placement that is gated",
)


def _initial_scale(meaning: str) -> Option:
    return Option(
        None,
        lambda v, n: v is None or (_is_number(v) and math.isfinite(v)),
        f"must be null or a finite number, the initial value of {meaning}",
    )


def _initial_alpha(where: str) -> Option:
    return Option(
        None,
        lambda v, n: v is None or (_is_number(v) and 0.0 < v < math.inf),
        f"must be null (the published value for the width) or a number above 0, the initial alpha {where}",
    )


def _pre_ln(kind: str) -> Preset:
    """Pre-LN, x' = x + f(N(x)) (GPT-2, LLaMA)."""
    return Preset(
        layer=lambda depth, num_layers, options: _both(Sublayer(norm_in=kind)),
        final_norm=lambda options: kind,
    )


def _pre_rmsnorm() -> Preset:
    """Pre-RMSNorm (LLaMA). `recentered`: the RMSNorm form of Pre-LN (arXiv 2305.14858), trained alike.

    The norms keep LayerNorm's shifts, the embedding is centered as it is read, and the matrices that write to
    the stream stay at zero mean (`zero_mean.RecenteredWriter`), so that RMSNorm is LayerNorm there.
    """

    def kind(options: Options) -> str:
        return "shifted_rmsnorm" if options["recentered"] else "rmsnorm"

    return Preset(
        layer=lambda depth, num_layers, options: _both(Sublayer(norm_in=kind(options))),
        final_norm=kind,
        options={"recentered": RECENTERED},
        embedding_norm=lambda options: "centering" if options["recentered"] else None,
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
        options={"final_norm": FINAL_NORM, "embedding_norm": EMBEDDING_NORM},
        embedding_norm=lambda options: kind if options["embedding_norm"] else None,
    )


def _mix_ln_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """Mix-LN: the first `num_post_layers` layers are Post-LN, the others Pre-LN (arXiv 2412.13795)."""
    kind = options["norm_type"]
    return _both(Sublayer(norm_post=kind) if depth <= options["num_post_layers"] else Sublayer(norm_in=kind))


def _settle_post_layers(options: Options, num_layers: int) -> Options:
    """num_post_layers = floor(post_fraction * num_layers), a quarter by default; only the integer is kept."""
    # Another row of a list may have settled them.
    fraction, count = options.pop("post_fraction", None), options["num_post_layers"]
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


def _deepnorm_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """DeepNorm: x' = N(a x + f(x)), a = (2L)^(1/4) (DeepNet: Scaling Transformers to 1,000 Layers, arXiv
    2203.00555, decoder-only).

    `own_init` draws the layers' matrices as the paper does: Xavier-normal, with gain (8L)^(-1/4) on W_v, W_o
    and the MLP. Like Post-LN it has a final norm unless `final_norm: false`. Warm up as for Post-LN.
    """
    return _both(Sublayer(norm_post=options["norm_type"], shortcut_scale=(2 * num_layers) ** 0.25))


def _sandwich_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """Sandwich-LN and Peri-LN: x' = x + N_out(f(N_in(x))) (CogView, arXiv 2105.13290; Peri-LN, arXiv
    2502.02732).

    At initialization each sublayer adds mean(gain_out^2) = 1 to the variance of the stream, whatever the
    scale of W_o and W_down: init rules that shrink those change only their effective learning rate.
    """
    return _both(Sublayer(norm_in=options["norm_type"], norm_out=options["norm_type"]))


def _reordered_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """OLMo 2's reordered norm: x' = x + N(f(x)), queries and keys normalized over all heads at once before
    rotary positions (2 OLMo 2 Furious, arXiv 2501.00656).
    """
    kind = options["norm_type"]
    attention = Sublayer(norm_out=kind, projection_norm=ProjectionNorm(kind, "width"))
    return Layer(attention=attention, mlp=Sublayer(norm_out=kind))


def _qk_norm_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """Pre-LN with queries and keys normalized in each head before rotary positions, one gain for all heads
    (Qwen 3; Query-Key Normalization for Transformers, arXiv 2010.04245, in its RMSNorm form).

    Attention logits stay below sqrt(head_dim) * max |gain_q gain_k|.
    """
    kind = options["norm_type"]
    attention = Sublayer(norm_in=kind, projection_norm=ProjectionNorm(kind, "head"))
    return Layer(attention=attention, mlp=Sublayer(norm_in=kind))


def _hybrid_norm_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """HybridNorm: y = x + Attn(x) with queries, keys and values normalized in each head, and x' = N(y) +
    MLP(N(y)) (HybridNorm, arXiv 2503.04598).

    `first_layer: pre` is HybridNorm*: the first layer is Pre-LN with those attention norms.
    """
    kind = options["norm_type"]
    heads = ProjectionNorm(kind, "head", ("q", "k", "v"))
    if depth == 1 and options["first_layer"] == "pre":
        return Layer(Sublayer(norm_in=kind, projection_norm=heads), Sublayer(norm_in=kind))
    return Layer(Sublayer(projection_norm=heads), Sublayer(norm_in=kind, shortcut="normed"))


GPAS_BASES: dict[str, Callable[[int, int, Options], Layer]] = {
    "pre": lambda depth, num_layers, options: _both(Sublayer(norm_in=options["norm_type"])),
    "layernorm_scaling": _layernorm_scaling_layer,
    "sandwich": _sandwich_layer,
    "post": lambda depth, num_layers, options: _both(Sublayer(norm_post=options["norm_type"])),
    "deepnorm": _deepnorm_layer,
    "mix_ln": _mix_ln_layer,
}


def _settle_gpas(options: Options, num_layers: int) -> Options:
    return _settle_post_layers(options, num_layers) if options["base"] == "mix_ln" else options


def _gpas_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """GPAS: x' = G(u), G(u) = u - SiLU(gate) sg(u), on top of another placement (Gradient-Preserving
    Activation Scaling, arXiv 2506.22049). On Post-LN layers, DeepNorm's and Mix-LN's among them, G takes the
    shortcut alone, x' = N(a G(x) + f(x)).

    One gate per layer, 0 at first, so it starts as its base. The released code clips the gates' gradient by
    itself, to 0.01 at 7B.
    """
    sublayer = GPAS_BASES[options["base"]](depth, num_layers, options).attention
    return _both(replace(sublayer, gate="sum" if sublayer.norm_post is None else "shortcut"))


def _dyt_settings(place: str, options: Options) -> Settings:
    return (("place", place), ("alpha", options[f"{place}_alpha"]))


def _dyt_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """DyT: x' = x + f(gain * tanh(alpha x)), with the embedding times a learned number, sqrt(d) at first
    (Transformers without Normalization, arXiv 2503.10622, its LLaMA).

    alpha starts at what the released models of the width have before attention, and elsewhere.
    """
    sublayer = Sublayer(norm_in="dyt")
    return Layer(
        attention=replace(sublayer, norm_settings=_dyt_settings("attention", options)),
        mlp=replace(sublayer, norm_settings=_dyt_settings("other", options)),
    )


def _ngpt_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """nGPT: x' = N(x + alpha * (N(f(x)) - x)), N to unit length, alpha a learned step per feature, 0.05 at
    first (Normalized Transformer with Representation Learning on the Hypersphere, arXiv 2410.01131).

    Rows of the embedding, the head and all that reads the stream, and columns of all that writes to it, have
    unit length after every step. Queries and keys have it in each head, times a learned s_qk; gate and up are
    multiplied by learned s_u, s_v and sqrt(d), logits by a learned s_z. Without weight decay, which unit
    weights undo, and without warm-up.
    """
    sublayer = Sublayer(norm_out="unit", norm_post="unit", sphere_step=float(options["step"]))
    heads = ProjectionNorm("unit", "head")
    return Layer(replace(sublayer, projection_norm=heads), sublayer, on_sphere=True)


def _learned_scale_row(layer: Callable[[int, int, Options], LearnedScale], **options: Option) -> Preset:
    """x' = x + b * f(N(x)) with a learned b."""
    return Preset(
        layer=lambda depth, num_layers, given: _both(
            Sublayer(norm_in=given["norm_type"], learned_branch_scale=layer(depth, num_layers, given))
        ),
        final_norm=lambda given: given["norm_type"],
        options={"norm_type": NORM_TYPE, **options},
    )


def _skipinit(depth: int, num_layers: int, options: Options) -> LearnedScale:
    """SkipInit: x' = x + s f(N(x)), one s per sublayer, 1/sqrt(L) at first (Batch Normalization Biases
    Residual Blocks, arXiv 2002.10444; 1/sqrt(L) as in The Curse of Depth, `skip_scale: 0` as in the paper).
    """
    given = options["skip_scale"]
    return LearnedScale(num_layers**-0.5 if given is None else float(given), per="sublayer")


def _rezero(depth: int, num_layers: int, options: Options) -> LearnedScale:
    """ReZero: x' = x + s f(N(x)), one s per layer, 0 at first (ReZero is All You Need, arXiv 2003.04887).

    Both sublayers share s. Each layer starts as the identity, so it needs no warm-up.
    """
    return LearnedScale(0.0, per="layer")


def _layerscale(depth: int, num_layers: int, options: Options) -> LearnedScale:
    """LayerScale: x' = x + s * f(N(x)), s one number per feature and sublayer (Going Deeper with Image
    Transformers, arXiv 2103.17239). At first 0.1 for up to 18 layers, 1e-5 up to 24, 1e-6 beyond.
    """
    given = options["layer_scale"]
    published = 0.1 if num_layers <= 18 else 1e-5 if num_layers <= 24 else 1e-6
    return LearnedScale(published if given is None else float(given), per="feature")


def _fraction(meaning: str, default: float) -> Option:
    return Option(
        default,
        lambda v, n: _is_number(v) and 0.0 <= v < 1.0,
        f"must be a number in [0, 1), {meaning}",
    )


def _count(meaning: str, default: int, least: int = 0) -> Option:
    return Option(
        default,
        lambda v, n: _is_count(v) and v >= least,
        f"must be an integer of at least {least}, {meaning}",
    )


STATISTICS_OPTIONS: dict[str, Option] = {
    "statistics": Option(
        "batch",
        lambda v, n: v in ("batch", "prefix", "running"),
        "must be batch, prefix or running, what stands in for the statistic of the current batch in training",
    ),
    "synchronize": Option(
        True, _is_switch, "must be true (the batch is that of all processes) or false (of this process)"
    ),
    "statistics_decay": _fraction("the share of a running statistic that a step keeps", 0.9),
}
STATISTICS_WARMUP = "updates that use the statistic of the batch alone"


def _settle_statistics(options: Options, num_layers: int) -> Options:
    for name, idle in (("synchronize", False), ("outlier_filter", True)):
        if options["statistics"] != "batch" and options.get(name) is idle:
            raise ValueError(
                f"norm_options.{name}={str(idle).lower()} does nothing with norm_options.statistics="
                f"{options['statistics']}, which reads no statistic of the batch; remove it"
            )
    return options


def _statistics_row(kind: str, **options: Option) -> Preset:
    """x' = x + f(N(x)), N a norm with running statistics (`batch_statistics.py`)."""
    options = {**STATISTICS_OPTIONS, **options}

    def settings(given: Options) -> Settings:
        return tuple((name, given[name]) for name in options)

    return Preset(
        layer=lambda depth, num_layers, given: _both(Sublayer(norm_in=kind, norm_settings=settings(given))),
        final_norm=lambda given: kind,
        options=options,
        settle=_settle_statistics,
        final_norm_settings=settings,
    )


PRESETS: dict[str, Preset] = {
    "pre_ln": _pre_ln("layernorm"),
    "pre_rmsnorm": _pre_rmsnorm(),
    # Pre-LN on a stream of zero mean, less its last feature (arXiv 2305.14858); see `zero_mean.py`.
    "pre_crmsnorm": replace(_pre_ln("crmsnorm"), compressed=True, options={"head_bias": HEAD_BIAS}),
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
    "deepnorm": Preset(
        layer=_deepnorm_layer,
        final_norm=lambda options: options["norm_type"] if options["final_norm"] else None,
        options={
            "norm_type": NORM_TYPE,
            "final_norm": FINAL_NORM,
            "embedding_norm": EMBEDDING_NORM,
            "own_init": OWN_INIT,
        },
        embedding_norm=lambda options: options["norm_type"] if options["embedding_norm"] else None,
    ),
    "sandwich": Preset(
        layer=_sandwich_layer,
        final_norm=lambda options: options["norm_type"],
        options={"norm_type": NORM_TYPE},
    ),
    "peri_ln": Preset(
        layer=_sandwich_layer,
        final_norm=lambda options: options["norm_type"],
        options={"norm_type": NORM_TYPE, "embedding_norm": EMBEDDING_NORM},
        embedding_norm=lambda options: options["norm_type"] if options["embedding_norm"] else None,
    ),
    "reordered": Preset(
        layer=_reordered_layer,
        final_norm=lambda options: options["norm_type"],
        options={"norm_type": NORM_TYPE},
    ),
    "skipinit": _learned_scale_row(_skipinit, skip_scale=_initial_scale("SkipInit's s; null: 1/sqrt(L)")),
    "rezero": _learned_scale_row(_rezero),
    "layerscale": _learned_scale_row(
        _layerscale, layer_scale=_initial_scale("LayerScale's s; null: the published one for the depth")
    ),
    "qk_norm": Preset(
        layer=_qk_norm_layer,
        final_norm=lambda options: options["norm_type"],
        options={"norm_type": NORM_TYPE},
    ),
    "hybrid_norm": Preset(
        layer=_hybrid_norm_layer,
        final_norm=lambda options: options["norm_type"],
        options={"norm_type": NORM_TYPE, "first_layer": FIRST_LAYER},
    ),
    # Pre-LN with ScaleNorm, and with FixNorm: rows of embedding and head of unit length after every step, the
    # embedding times sqrt(d) where it is read, so that a logit is g cos(angle) (Transformers without Tears,
    # arXiv 1910.05895).
    "scalenorm": replace(
        _pre_ln("scalenorm"),
        options={"fixnorm": FIXNORM},
        embedding_norm=lambda options: "width_scale" if options["fixnorm"] else None,
        unit_embeddings=lambda options: options["fixnorm"],
    ),
    "dyt": Preset(
        layer=_dyt_layer,
        final_norm=lambda options: "dyt",
        options={
            "attention_alpha": _initial_alpha("before attention"),
            "other_alpha": _initial_alpha("before the MLP and at the end"),
        },
        embedding_norm=lambda options: "learned_embedding_scale",
        final_norm_settings=lambda options: _dyt_settings("other", options),
    ),
    "ngpt": Preset(
        layer=_ngpt_layer,
        final_norm=_no_norm,
        options={"step": SPHERE_STEP},
        unit_embeddings=lambda options: True,
        scaled_logits=True,
    ),
    "gpas": Preset(
        layer=_gpas_layer,
        final_norm=lambda options: options["norm_type"],
        options={
            "norm_type": NORM_TYPE,
            "base": GPAS_BASE,
            "own_init": replace(OWN_INIT, needs=("base", "deepnorm")),
            "post_fraction": replace(POST_FRACTION, needs=("base", "mix_ln")),
            "num_post_layers": replace(NUM_POST_LAYERS, needs=("base", "mix_ln")),
        },
        settle=_settle_gpas,
    ),
    "powernorm": _statistics_row(
        "powernorm",
        statistics_warmup=_count(STATISTICS_WARMUP, 1000),
        gradient_decay=_fraction("b of the backward pass", 0.9),
        token_rms=Option(False, _is_switch, "must be true (GroupScaling of the released code) or false"),
    ),
    "unified_norm": _statistics_row(
        "unified_norm",
        statistics_warmup=_count(STATISTICS_WARMUP, 4000),
        window=_count("how many batches the geometric mean is over", 4, least=1),
        outlier_filter=Option(False, _is_switch, "must be true or false"),
    ),
    "prepbn": _statistics_row(
        "prepbn",
        norm_type=NORM_TYPE,
        hold_steps=_count("updates before lambda begins to fall", 0),
        interpolation_steps=_count("updates in which lambda falls from 1 to 0", 18000, least=1),
        branch_init=Option(
            0.0,
            lambda v, n: _is_number(v) and math.isfinite(v),
            "must be a finite number, the initial gain of BatchNorm and of the identity",
        ),
    ),
    "none": Preset(
        # x' = x + f(x), stable at first by initialization alone (Fixup, arXiv 1901.09321); `own_init`.
        # `final_affine` is what a folded norm with running statistics leaves behind before the head.
        layer=lambda depth, num_layers, options: _both(Sublayer()),
        final_norm=lambda options: "affine" if options["final_affine"] else None,
        options={"own_init": OWN_INIT, "final_affine": FINAL_AFFINE},
    ),
}


def _preset(row: str) -> Preset:
    if not is_plugin(row):
        return PRESETS[row]
    from .plugin_placements import plugin_preset  # which builds on this file

    return plugin_preset(row)


def nearest(word: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known one, or else all of them."""
    names = list(known)
    match = difflib.get_close_matches(str(word).lower(), names, n=1)
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
        if not (is_plugin(row) or (isinstance(row, str) and row in PRESETS)):
            raise ValueError(f"norm={row!r} is not a norm; {nearest(row, PRESETS)}")
    compressed = sorted({row for row in rows if _preset(row).compressed})
    if compressed and set(rows) != set(compressed):
        raise ValueError(
            f"norm lists {compressed[0]} beside other norms, but its stream has one feature less than "
            "theirs; give every layer the same"
        )
    return rows


def settle_options(norm: str | Sequence[str], norm_options: Options, num_layers: int) -> Options:
    """Check `norm` and `norm_options`; return the options with every default and computed value filled in.

    Settling settled options changes nothing, so a saved config loads as it was saved.

    Raises: ValueError: an unknown norm, a list of the wrong length, an option that no row in use takes, a bad
        value.
    """
    rows = list(dict.fromkeys(_rows(norm, num_layers)))
    known: dict[str, Option] = {}
    for row in rows:
        for name, option in _preset(row).options.items():
            if option.needs is None or name not in known:
                known[name] = option
    for name, value in norm_options.items():
        if name not in known:
            remedy = nearest(name, known) if known else "it takes no options, so remove it"
            raise ValueError(f"norm_options.{name} is not an option of norm={norm}; {remedy}")
        if not known[name].accepts(value, num_layers):
            raise ValueError(f"norm_options.{name}={value!r} {known[name].rule} (norm={norm})")
    options = {name: norm_options.get(name, option.default) for name, option in known.items()}
    for name, option in known.items():
        if option.needs is not None and options[option.needs[0]] != option.needs[1]:
            other, value = option.needs
            if norm_options.get(name) is not None:
                raise ValueError(
                    f"norm_options.{name}={norm_options[name]!r} needs norm_options.{other}={value} and not "
                    f"{options[other]!r}; change {other} or remove {name}"
                )
            del options[name]
    if options.get("recentered") and rows != ["pre_rmsnorm"]:
        raise ValueError(
            f"norm_options.recentered=True keeps the whole stream at zero mean, which other norms beside "
            f"pre_rmsnorm do not (norm={norm}); give every layer pre_rmsnorm"
        )
    for row in rows:
        options = _preset(row).settle(options, num_layers)
        if len(rows) > 1 and _preset(row).unit_embeddings(options):
            raise ValueError(
                f"norm lists {row} beside other norms, but it also keeps the embedding and the head at unit "
                "length; give every layer the same"
            )
    return options


def residual_plan(norm: str | Sequence[str], norm_options: Options, num_layers: int) -> ResidualPlan:
    """The block equation of every layer.

    In a list of norms, the first one decides the norm on the embedding and the last one the final norm.
    """
    options = settle_options(norm, norm_options, num_layers)
    rows = _rows(norm, num_layers)
    return ResidualPlan(
        layers=tuple(_preset(row).layer(i + 1, num_layers, options) for i, row in enumerate(rows)),
        final_norm=_preset(rows[-1]).final_norm(options),
        embedding_norm=_preset(rows[0]).embedding_norm(options),
        final_norm_settings=_preset(rows[-1]).final_norm_settings(options),
        compressed=_preset(rows[0]).compressed,
        unit_embeddings=_preset(rows[0]).unit_embeddings(options),
        scaled_logits=_preset(rows[0]).scaled_logits,
    )
