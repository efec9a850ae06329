"""The equations of the placements: for each, the layer at a depth, and the options that it reads.

`residual.PRESETS` puts them together. The terms of a layer are those of `equation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .equation import Layer, LearnedScale, ProjectionNorm, ResidualPlan, Sublayer
from .lipschitz import FLOOR_RMSNORM
from .norms import Settings
from .options import Option, Options, is_count, is_number, is_switch


def no_norm(options: Options) -> str | None:
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
    embedding_norm: Callable[[Options], str | None] = no_norm
    final_norm_settings: Callable[[Options], Settings] = _no_settings
    # The stream leaves out one of its features, which is minus the sum of the others.
    compressed: bool = False
    unit_embeddings: Callable[[Options], bool] = _no
    scaled_logits: bool = False


def both(sublayer: Sublayer) -> Layer:
    return Layer(attention=sublayer, mlp=sublayer)


NORM_TYPE = Option("rmsnorm", lambda v, n: v in ("rmsnorm", "layernorm"), "must be rmsnorm or layernorm")
FINAL_AFFINE = Option(False, is_switch, "must be true or false")
FINAL_NORM = Option(True, is_switch, "must be true or false")
POST_FRACTION = Option(
    None,
    lambda v, n: v is None or (is_number(v) and 0.0 <= v <= 1.0),
    "must be a number in [0, 1], the share of the layers, from the first, that are Post-LN",
)
NUM_POST_LAYERS = Option(
    None,
    lambda v, n: v is None or (is_count(v) and 0 <= v <= n),
    "must be an integer from 0 to num_hidden_layers, how many layers, from the first, are Post-LN",
)
OWN_INIT = Option(
    True, is_switch, "must be true (the method's own initialization) or false (model.init alone)"
)
FIRST_LAYER = Option("hybrid", lambda v, n: v in ("hybrid", "pre"), "must be hybrid or pre")
FIXNORM = Option(False, is_switch, "must be true (unit rows of embedding and head) or false")
FLOOR = Option(
    1.0,
    lambda v, n: is_number(v) and v > 0.0,
    "must be a number above 0, the RMS below which a floor-RMSNorm is linear",
    needs=(("norm_type", FLOOR_RMSNORM), ("norm_in", FLOOR_RMSNORM), ("qk_norm", FLOOR_RMSNORM)),
)
NORM_TYPES: dict[str, Option] = {
    "norm_type": Option(
        "rmsnorm",
        lambda v, n: v in ("rmsnorm", "layernorm", FLOOR_RMSNORM),
        f"must be rmsnorm, layernorm or {FLOOR_RMSNORM}",
    ),
    "floor": FLOOR,
}
EMBEDDING_NORM = Option(False, is_switch, "must be true or false")
SPHERE_STEP = Option(
    0.05,
    lambda v, n: is_number(v) and 0.0 < v < 1.0,
    "must be a number between 0 and 1, the initial eigen learning rates",
)
HEAD_BIAS = Option(False, is_switch, "must be true (a bias on the output layer) or false")
RECENTERED = Option(False, is_switch, "must be true (trained as Pre-LN) or false (Llama)")


GPAS_BASE = Option(
    "pre",
    lambda v, n: v in GPAS_BASES,
    "must be pre, layernorm_scaling, sandwich, post, deepnorm or mix_ln, the placement that is gated",
)


def initial_scale(meaning: str) -> Option:
    return Option(
        None,
        lambda v, n: v is None or is_number(v),
        f"must be null or a finite number, the initial value of {meaning}",
    )


def initial_alpha(where: str) -> Option:
    return Option(
        None,
        lambda v, n: v is None or (is_number(v) and v > 0.0),
        f"must be null (the published value for the width) or a number above 0, the initial alpha {where}",
    )


def pre_ln(kind: str) -> Preset:
    """Pre-LN, x' = x + f(N(x)) (GPT-2, LLaMA)."""
    return Preset(
        layer=lambda depth, num_layers, options: both(Sublayer(norm_in=kind)),
        final_norm=lambda options: kind,
    )


def pre_rmsnorm() -> Preset:
    """Pre-RMSNorm (LLaMA). `recentered`: the RMSNorm form of Pre-LN (arXiv 2305.14858), trained alike.

    The norms keep LayerNorm's shifts, the embedding is centered as it is read, and the matrices that write to
    the stream stay at zero mean (`zero_mean.RecenteredWriter`), so that RMSNorm is LayerNorm there.
    """

    def kind(options: Options) -> str:
        return "shifted_rmsnorm" if options["recentered"] else "rmsnorm"

    return Preset(
        layer=lambda depth, num_layers, options: both(Sublayer(norm_in=kind(options))),
        final_norm=kind,
        options={"recentered": RECENTERED},
        embedding_norm=lambda options: "centering" if options["recentered"] else None,
    )


def post_ln(kind: str) -> Preset:
    """Post-LN, x' = N(x + f(x)) (Attention Is All You Need, arXiv 1706.03762).

    The last N already normalizes the output. A final norm after it is redundant but for its gain; it is there
    by default, since the published Post-LN baselines (Mix-LN, LNS, GPAS) have it and since Mix-LN with every
    layer Post-LN then equals this row. `final_norm: false` is the original Transformer.
    """
    return Preset(
        layer=lambda depth, num_layers, options: both(Sublayer(norm_post=kind)),
        final_norm=lambda options: kind if options["final_norm"] else None,
        options={"final_norm": FINAL_NORM, "embedding_norm": EMBEDDING_NORM},
        embedding_norm=lambda options: kind if options["embedding_norm"] else None,
    )


def mix_ln_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """Mix-LN: the first `num_post_layers` layers are Post-LN, the others Pre-LN (arXiv 2412.13795)."""
    kind = options["norm_type"]
    return both(Sublayer(norm_post=kind) if depth <= options["num_post_layers"] else Sublayer(norm_in=kind))


def settle_post_layers(options: Options, num_layers: int) -> Options:
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


def layernorm_scaling_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """LayerNorm Scaling: x' = x + f(N(x) / sqrt(depth)) (The Curse of Depth, arXiv 2502.05795)."""
    return both(Sublayer(norm_in=options["norm_type"], norm_in_scale=1.0 / math.sqrt(depth)))


def deepnorm_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """DeepNorm: x' = N(a x + f(x)), a = (2L)^(1/4) (DeepNet: Scaling Transformers to 1,000 Layers, arXiv
    2203.00555, decoder-only).

    `own_init` draws the layers' matrices as the paper does: Xavier-normal, with gain (8L)^(-1/4) on W_v, W_o
    and the MLP. Like Post-LN it has a final norm unless `final_norm: false`. Warm up as for Post-LN.
    """
    return both(Sublayer(norm_post=options["norm_type"], shortcut_scale=(2 * num_layers) ** 0.25))


def sandwich_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """Sandwich-LN and Peri-LN: x' = x + N_out(f(N_in(x))) (CogView, arXiv 2105.13290; Peri-LN, arXiv
    2502.02732).

    At initialization each sublayer adds mean(gain_out^2) = 1 to the variance of the stream, whatever the
    scale of W_o and W_down: init rules that shrink those change only their effective learning rate.
    """
    return both(Sublayer(norm_in=options["norm_type"], norm_out=options["norm_type"]))


def reordered_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """OLMo 2's reordered norm: x' = x + N(f(x)), queries and keys normalized over all heads at once before
    rotary positions (2 OLMo 2 Furious, arXiv 2501.00656).
    """
    kind = options["norm_type"]
    attention = Sublayer(norm_out=kind, projection_norm=ProjectionNorm(kind, "width"))
    return Layer(attention=attention, mlp=Sublayer(norm_out=kind))


def qk_norm_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """Pre-LN with queries and keys normalized in each head before rotary positions, one gain for all heads
    (Qwen 3; Query-Key Normalization for Transformers, arXiv 2010.04245, in its RMSNorm form).

    Attention logits stay below sqrt(head_dim) * max |gain_q gain_k|.
    """
    kind = options["norm_type"]
    attention = Sublayer(norm_in=kind, projection_norm=ProjectionNorm(kind, "head"))
    return Layer(attention=attention, mlp=Sublayer(norm_in=kind))


def hybrid_norm_layer(depth: int, num_layers: int, options: Options) -> Layer:
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
    "pre": lambda depth, num_layers, options: both(Sublayer(norm_in=options["norm_type"])),
    "layernorm_scaling": layernorm_scaling_layer,
    "sandwich": sandwich_layer,
    "post": lambda depth, num_layers, options: both(Sublayer(norm_post=options["norm_type"])),
    "deepnorm": deepnorm_layer,
    "mix_ln": mix_ln_layer,
}


def settle_gpas(options: Options, num_layers: int) -> Options:
    return settle_post_layers(options, num_layers) if options["base"] == "mix_ln" else options


def gpas_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """GPAS: x' = G(u), G(u) = u - SiLU(gate) sg(u), on top of another placement (Gradient-Preserving
    Activation Scaling, arXiv 2506.22049). On Post-LN layers, DeepNorm's and Mix-LN's among them, G takes the
    shortcut alone, x' = N(a G(x) + f(x)).

    One gate per layer, 0 at first, so it starts as its base. The released code clips the gates' gradient by
    itself, to 0.01 at 7B.
    """
    sublayer = GPAS_BASES[options["base"]](depth, num_layers, options).attention
    return both(replace(sublayer, gate="sum" if sublayer.norm_post is None else "shortcut"))


def dyt_settings(place: str, options: Options) -> Settings:
    return (("place", place), ("alpha", options[f"{place}_alpha"]))


def dyt_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """DyT: x' = x + f(gain * tanh(alpha x)), with the embedding times a learned number, sqrt(d) at first
    (Transformers without Normalization, arXiv 2503.10622, its LLaMA).

    alpha starts at what the released models of the width have before attention, and elsewhere.
    """
    sublayer = Sublayer(norm_in="dyt")
    return Layer(
        attention=replace(sublayer, norm_settings=dyt_settings("attention", options)),
        mlp=replace(sublayer, norm_settings=dyt_settings("other", options)),
    )


def ngpt_layer(depth: int, num_layers: int, options: Options) -> Layer:
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


def learned_scale_row(layer: Callable[[int, int, Options], LearnedScale], **options: Option) -> Preset:
    """x' = x + b * f(N(x)) with a learned b."""
    return Preset(
        layer=lambda depth, num_layers, given: both(
            Sublayer(norm_in=given["norm_type"], learned_branch_scale=layer(depth, num_layers, given))
        ),
        final_norm=lambda given: given["norm_type"],
        options={**NORM_TYPES, **options},
    )


def skipinit(depth: int, num_layers: int, options: Options) -> LearnedScale:
    """SkipInit: x' = x + s f(N(x)), one s per sublayer, 1/sqrt(L) at first (Batch Normalization Biases
    Residual Blocks, arXiv 2002.10444; 1/sqrt(L) as in The Curse of Depth, `skip_scale: 0` as in the paper).
    """
    given = options["skip_scale"]
    return LearnedScale(num_layers**-0.5 if given is None else float(given), per="sublayer")


def rezero(depth: int, num_layers: int, options: Options) -> LearnedScale:
    """ReZero: x' = x + s f(N(x)), one s per layer, 0 at first (ReZero is All You Need, arXiv 2003.04887).

    Both sublayers share s. Each layer starts as the identity, so it needs no warm-up.
    """
    return LearnedScale(0.0, per="layer")


def layerscale(depth: int, num_layers: int, options: Options) -> LearnedScale:
    """LayerScale: x' = x + s * f(N(x)), s one number per feature and sublayer (Going Deeper with Image
    Transformers, arXiv 2103.17239). At first 0.1 for up to 18 layers, 1e-5 up to 24, 1e-6 beyond.
    """
    given = options["layer_scale"]
    published = 0.1 if num_layers <= 18 else 1e-5 if num_layers <= 24 else 1e-6
    return LearnedScale(published if given is None else float(given), per="feature")


CONVEX_ALPHA = Option(
    None,
    lambda v, n: v is None or (is_number(v) and 0.0 < v <= 1.0),
    "must be null (1 / (2 num_hidden_layers), one over the number of sums) or a number in (0, 1]",
)


def convex_norm(where: str) -> Option:
    return Option(
        "none",
        lambda v, n: v in ("none", "rmsnorm", "layernorm", FLOOR_RMSNORM),
        f"must be none, rmsnorm, layernorm or {FLOOR_RMSNORM}, the norm {where}",
    )


def settle_convex(options: Options, num_layers: int) -> Options:
    """alpha = 1 / N, N = 2 L sums."""
    if options["alpha"] is None:
        options["alpha"] = 1.0 / (2 * num_layers)
    return options


def convex_layer(depth: int, num_layers: int, options: Options) -> Layer:
    """Convex residual: x' = (1 - alpha) x + alpha f(x), alpha = 1/N over N = 2L sums (Training Transformers
    with Enforced Lipschitz Constants, arXiv 2507.13338).

    Where f does not lengthen the stream the sum does not either, whatever the depth, so that no norm is
    needed: `norm_in` and `qk_norm` are `none` by default. `norm_in: floor_rmsnorm` is LLaMA with a finite
    Lipschitz constant. Initialize with `init: orthogonal`.
    """
    alpha, norm_in, qk_norm = options["alpha"], options["norm_in"], options["qk_norm"]
    sublayer = Sublayer(
        norm_in=None if norm_in == "none" else norm_in, shortcut_scale=1.0 - alpha, branch_scale=alpha
    )
    heads = None if qk_norm == "none" else ProjectionNorm(qk_norm, "head")
    return Layer(attention=replace(sublayer, projection_norm=heads), mlp=sublayer)


def with_floors(plan: ResidualPlan, floor: float) -> ResidualPlan:
    """`plan` with the option `floor` given to every floor-RMSNorm in it."""
    given: Settings = (("floor", float(floor)),)

    def sublayer(spec: Sublayer) -> Sublayer:
        inside = spec.projection_norm
        if inside is not None and inside.kind == FLOOR_RMSNORM:
            spec = replace(spec, projection_norm=replace(inside, settings=given))
        floors = FLOOR_RMSNORM in (spec.norm_in, spec.norm_out, spec.norm_post)
        return replace(spec, norm_settings=given) if floors else spec

    return replace(
        plan,
        layers=tuple(
            replace(layer, attention=sublayer(layer.attention), mlp=sublayer(layer.mlp))
            for layer in plan.layers
        ),
        final_norm_settings=given if plan.final_norm == FLOOR_RMSNORM else plan.final_norm_settings,
        embedding_norm_settings=given if plan.embedding_norm == FLOOR_RMSNORM else (),
    )
