"""The row of a plugin norm: where it stands by `norm_options.placement`, and its constructor's options."""

from __future__ import annotations

import inspect
from typing import Any

from .equation import Layer, Sublayer
from .norms import Settings
from .options import Option, Options
from .placements import Preset
from .plugin_norms import plugin_options

# placement -> the terms of a sublayer whose norm is a plugin.
PLUGIN_PLACEMENTS: dict[str, tuple[str, ...]] = {
    "pre": ("norm_in",),
    "post": ("norm_post",),
    "sandwich": ("norm_in", "norm_out"),
    "reordered": ("norm_out",),
}
PLACEMENT = Option(
    "pre",
    lambda v, n: v in PLUGIN_PLACEMENTS,
    f"must be {', '.join(PLUGIN_PLACEMENTS)}: where the norm stands in each sublayer",
)


def _is_plain(value: Any, num_layers: int) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def plugin_preset(norm: str) -> Preset:
    """The row of a class of the user's: the same norm everywhere, at the end too."""
    defaults = plugin_options(norm)
    rule = "must be a number, text, true, false or null, so that config.json can hold it"
    needed = [name for name, default in defaults.items() if default is inspect.Parameter.empty]
    own = {
        name: Option(None if name in needed else default, _is_plain, rule)
        for name, default in defaults.items()
    }

    def settings(options: Options) -> Settings:
        return tuple((name, options[name]) for name in own)

    def sublayer(options: Options) -> Sublayer:
        norms = dict.fromkeys(PLUGIN_PLACEMENTS[options["placement"]], norm)
        return Sublayer(**norms, norm_settings=settings(options))  # type: ignore[arg-type]

    def settle(options: Options, num_layers: int) -> Options:
        for name in needed:
            if options[name] is None:
                raise ValueError(f"norm_options.{name} is required by norm={norm}; give it a value")
        return options

    return Preset(
        layer=lambda depth, num_layers, options: Layer(sublayer(options), sublayer(options)),
        final_norm=lambda options: norm,
        final_norm_settings=settings,
        options={"placement": PLACEMENT, **own},
        settle=settle,
    )
