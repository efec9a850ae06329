"""The placements of norms with running statistics: Pre-LN, x' = x + f(N(x)), with options of their own."""

from __future__ import annotations

from .equation import Sublayer
from .norms import Settings
from .options import Option, Options, is_count, is_number, is_switch
from .placements import NORM_TYPE, Preset, both


def _fraction(meaning: str, default: float) -> Option:
    return Option(
        default,
        lambda v, n: is_number(v) and 0.0 <= v < 1.0,
        f"must be a number in [0, 1), {meaning}",
    )


def _count(meaning: str, default: int, least: int = 0) -> Option:
    return Option(
        default,
        lambda v, n: is_count(v) and v >= least,
        f"must be an integer of at least {least}, {meaning}",
    )


STATISTICS_OPTIONS: dict[str, Option] = {
    "statistics": Option(
        "batch",
        lambda v, n: v in ("batch", "prefix", "running"),
        "must be batch, prefix or running, what stands in for the statistic of the current batch in training",
    ),
    "synchronize": Option(
        True, is_switch, "must be true (the batch is that of all processes) or false (of this process)"
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
        layer=lambda depth, num_layers, given: both(Sublayer(norm_in=kind, norm_settings=settings(given))),
        final_norm=lambda given: kind,
        options=options,
        settle=_settle_statistics,
        final_norm_settings=settings,
    )


STATISTICS_PRESETS: dict[str, Preset] = {
    "powernorm": _statistics_row(
        "powernorm",
        statistics_warmup=_count(STATISTICS_WARMUP, 1000),
        gradient_decay=_fraction("b of the backward pass", 0.9),
        token_rms=Option(False, is_switch, "must be true (GroupScaling of the released code) or false"),
    ),
    "unified_norm": _statistics_row(
        "unified_norm",
        statistics_warmup=_count(STATISTICS_WARMUP, 4000),
        window=_count("how many batches the geometric mean is over", 4, least=1),
        outlier_filter=Option(False, is_switch, "must be true or false"),
    ),
    "prepbn": _statistics_row(
        "prepbn",
        norm_type=NORM_TYPE,
        hold_steps=_count("updates before lambda begins to fall", 0),
        interpolation_steps=_count("updates in which lambda falls from 1 to 0", 18000, least=1),
        branch_init=Option(
            0.0,
            lambda v, n: is_number(v),
            "must be a finite number, the initial gain of BatchNorm and of the identity",
        ),
    ),
}
