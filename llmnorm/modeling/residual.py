"""The placements: what the config key `norm` may be, and the block equation of every layer it stands for.

A value of `norm` is one row of PRESETS: a function from the depth of a layer to that layer's two sublayers,
the options it takes, and its final norm. Adding a placement is adding a row; adding a norm is adding a class
to `norms.py`. The terms of a row are those of `equation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .equation import ResidualPlan, Sublayer
from .options import Option, Options, nearest
from .placements import (
    CONVEX_ALPHA,
    EMBEDDING_NORM,
    FINAL_AFFINE,
    FINAL_NORM,
    FIRST_LAYER,
    FIXNORM,
    FLOOR,
    GPAS_BASE,
    HEAD_BIAS,
    NORM_TYPES,
    NUM_POST_LAYERS,
    OWN_INIT,
    POST_FRACTION,
    SPHERE_STEP,
    Preset,
    both,
    convex_layer,
    convex_norm,
    deepnorm_layer,
    dyt_layer,
    dyt_settings,
    gpas_layer,
    hybrid_norm_layer,
    initial_alpha,
    initial_scale,
    layernorm_scaling_layer,
    layerscale,
    learned_scale_row,
    mix_ln_layer,
    ngpt_layer,
    no_norm,
    post_ln,
    pre_ln,
    pre_rmsnorm,
    qk_norm_layer,
    reordered_layer,
    rezero,
    sandwich_layer,
    settle_convex,
    settle_gpas,
    settle_post_layers,
    skipinit,
    with_floors,
)
from .plugin_norms import is_plugin
from .plugin_placements import plugin_preset
from .statistics_placements import STATISTICS_PRESETS

PRESETS: dict[str, Preset] = {
    "pre_ln": pre_ln("layernorm"),
    "pre_rmsnorm": pre_rmsnorm(),
    # Pre-LN on a stream of zero mean, less its last feature (arXiv 2305.14858); see `zero_mean.py`.
    "pre_crmsnorm": replace(pre_ln("crmsnorm"), compressed=True, options={"head_bias": HEAD_BIAS}),
    "post_ln": post_ln("layernorm"),
    "post_rmsnorm": post_ln("rmsnorm"),
    "mix_ln": Preset(
        layer=mix_ln_layer,
        final_norm=lambda options: options["norm_type"],
        options={**NORM_TYPES, "post_fraction": POST_FRACTION, "num_post_layers": NUM_POST_LAYERS},
        settle=settle_post_layers,
    ),
    "layernorm_scaling": Preset(
        layer=layernorm_scaling_layer,
        final_norm=lambda options: options["norm_type"],
        options={**NORM_TYPES},
    ),
    "deepnorm": Preset(
        layer=deepnorm_layer,
        final_norm=lambda options: options["norm_type"] if options["final_norm"] else None,
        options={
            **NORM_TYPES,
            "final_norm": FINAL_NORM,
            "embedding_norm": EMBEDDING_NORM,
            "own_init": OWN_INIT,
        },
        embedding_norm=lambda options: options["norm_type"] if options["embedding_norm"] else None,
    ),
    "sandwich": Preset(
        layer=sandwich_layer,
        final_norm=lambda options: options["norm_type"],
        options={**NORM_TYPES},
    ),
    "peri_ln": Preset(
        layer=sandwich_layer,
        final_norm=lambda options: options["norm_type"],
        options={**NORM_TYPES, "embedding_norm": EMBEDDING_NORM},
        embedding_norm=lambda options: options["norm_type"] if options["embedding_norm"] else None,
    ),
    "reordered": Preset(
        layer=reordered_layer,
        final_norm=lambda options: options["norm_type"],
        options={**NORM_TYPES},
    ),
    "skipinit": learned_scale_row(skipinit, skip_scale=initial_scale("SkipInit's s; null: 1/sqrt(L)")),
    "rezero": learned_scale_row(rezero),
    "layerscale": learned_scale_row(
        layerscale, layer_scale=initial_scale("LayerScale's s; null: the published one for the depth")
    ),
    "qk_norm": Preset(
        layer=qk_norm_layer,
        final_norm=lambda options: options["norm_type"],
        options={**NORM_TYPES},
    ),
    "hybrid_norm": Preset(
        layer=hybrid_norm_layer,
        final_norm=lambda options: options["norm_type"],
        options={**NORM_TYPES, "first_layer": FIRST_LAYER},
    ),
    # Pre-LN with ScaleNorm, and with FixNorm: rows of embedding and head of unit length after every step, the
    # embedding times sqrt(d) where it is read, so that a logit is g cos(angle) (Transformers without Tears,
    # arXiv 1910.05895).
    "scalenorm": replace(
        pre_ln("scalenorm"),
        options={"fixnorm": FIXNORM},
        embedding_norm=lambda options: "width_scale" if options["fixnorm"] else None,
        unit_embeddings=lambda options: options["fixnorm"],
    ),
    "dyt": Preset(
        layer=dyt_layer,
        final_norm=lambda options: "dyt",
        options={
            "attention_alpha": initial_alpha("before attention"),
            "other_alpha": initial_alpha("before the MLP and at the end"),
        },
        embedding_norm=lambda options: "learned_embedding_scale",
        final_norm_settings=lambda options: dyt_settings("other", options),
    ),
    "ngpt": Preset(
        layer=ngpt_layer,
        final_norm=no_norm,
        options={"step": SPHERE_STEP},
        unit_embeddings=lambda options: True,
        scaled_logits=True,
    ),
    "gpas": Preset(
        layer=gpas_layer,
        final_norm=lambda options: options["norm_type"],
        options={
            **NORM_TYPES,
            "base": GPAS_BASE,
            "own_init": replace(OWN_INIT, needs=(("base", "deepnorm"),)),
            "post_fraction": replace(POST_FRACTION, needs=(("base", "mix_ln"),)),
            "num_post_layers": replace(NUM_POST_LAYERS, needs=(("base", "mix_ln"),)),
        },
        settle=settle_gpas,
    ),
    **STATISTICS_PRESETS,
    "convex": Preset(
        layer=convex_layer,
        final_norm=lambda options: None if options["norm_in"] == "none" else options["norm_in"],
        options={
            "norm_in": convex_norm("before each sublayer and at the end"),
            "qk_norm": convex_norm("on queries and keys in each head"),
            "alpha": CONVEX_ALPHA,
            "floor": FLOOR,
        },
        settle=settle_convex,
    ),
    "none": Preset(
        # x' = x + f(x), stable at first by initialization alone (Fixup, arXiv 1901.09321); `own_init`.
        # `final_affine` is what a folded norm with running statistics leaves behind before the head.
        layer=lambda depth, num_layers, options: both(Sublayer()),
        final_norm=lambda options: "affine" if options["final_affine"] else None,
        options={"own_init": OWN_INIT, "final_affine": FINAL_AFFINE},
    ),
}


def _preset(row: str) -> Preset:
    return plugin_preset(row) if is_plugin(row) else PRESETS[row]


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
            if not option.needs or name not in known:
                known[name] = option
    for name, value in norm_options.items():
        if name not in known:
            remedy = nearest(name, known) if known else "it takes no options, so remove it"
            raise ValueError(f"norm_options.{name} is not an option of norm={norm}; {remedy}")
        if not known[name].accepts(value, num_layers):
            raise ValueError(f"norm_options.{name}={value!r} {known[name].rule} (norm={norm})")
    options = {name: norm_options.get(name, option.default) for name, option in known.items()}
    for name, option in known.items():
        if not option.has_place(options):
            if norm_options.get(name) is not None:
                needed = [(other, value) for other, value in option.needs if other in options]
                wanted = " or ".join(f"norm_options.{other}={value}" for other, value in needed)
                found = " and ".join(repr(options[other]) for other, _ in needed)
                raise ValueError(
                    f"norm_options.{name}={norm_options[name]!r} needs {wanted} and not {found}; change "
                    f"{' or '.join(other for other, _ in needed)} or remove {name}"
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
    first, last = _preset(rows[0]), _preset(rows[-1])
    plan = ResidualPlan(
        layers=tuple(_preset(row).layer(i + 1, num_layers, options) for i, row in enumerate(rows)),
        final_norm=last.final_norm(options),
        embedding_norm=first.embedding_norm(options),
        final_norm_settings=last.final_norm_settings(options),
        compressed=first.compressed,
        unit_embeddings=first.unit_embeddings(options),
        scaled_logits=first.scaled_logits,
    )
    return with_floors(plan, options["floor"]) if "floor" in options else plan
