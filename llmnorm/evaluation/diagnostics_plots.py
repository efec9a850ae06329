"""The numbers of `diagnose` as pictures: one PNG per subject, and an overview of all.

Every figure has the layers along x. A subject whose numbers are absent (no record of the run, attention
without a softmax map) has no figure.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmnorm.errors import UserError

INK, MUTED, GRID = "#1d2126", "#6a7078", "#e9e9e6"
BLUE, ORANGE, GREEN, PURPLE = "#2563b8", "#c2571a", "#2c8a57", "#8a4fb5"
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#c9c9c5",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
}
LOG_RATIO = 20  # the largest value this many times the smallest asks for a logarithmic axis

Numbers = Mapping[str, Any]
Draw = Callable[[Any, Numbers], None]


def require_matplotlib() -> None:
    """Raise UserError where matplotlib is absent, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plots draws with matplotlib, which is not installed; `pip install matplotlib`.")


def write_plots(numbers: Numbers, folder: Path, dpi: int = 150) -> list[Path]:
    """Draw `numbers`, the result of `diagnose`, into `folder`; returns the files, the overview first."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawn = subjects_of(numbers)
    written = []
    with matplotlib.rc_context(STYLE):
        overview = [panels[0] for panels in drawn.values()]
        columns = 3
        rows = -(-len(overview) // columns)
        sheets: dict[str, Any] = {"overview": (overview, (columns, rows))}
        sheets |= {name: (panels, (len(panels), 1)) for name, panels in drawn.items()}
        for name, (panels, (across, down)) in sheets.items():
            figure = Figure(figsize=(4.4 * across, 3.1 * down), layout="constrained")
            axes = figure.subplots(down, across, squeeze=False).flatten()
            for axis, draw in zip(axes, panels, strict=False):
                draw(axis, numbers)
            for axis in axes[len(panels) :]:
                axis.set_axis_off()
            if name == "overview":
                figure.suptitle(_title(numbers), x=0.008, ha="left", fontsize=12, fontweight="bold")
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=dpi)
            written.append(path)
    return written


def subjects_of(numbers: Numbers) -> dict[str, tuple[Draw, ...]]:
    """The figures that `numbers` has something to show in."""
    return {
        name: panels
        for name, panels in SUBJECTS.items()
        if any(value is not None for value in numbers.get(NEEDED[name]) or ())
    }


def _title(numbers: Numbers) -> str:
    facts = [
        str(numbers["norm"]) if isinstance(numbers.get("norm"), str) else numbers.get("model_type"),
        f"{numbers['num_layers']} layers",
        f"{numbers['tokens']:,} tokens",
        f"perplexity {numbers['perplexity']:.2f}" if numbers.get("perplexity") else None,
    ]
    return "   ".join(str(fact) for fact in facts if fact)


def _line(axis: Any, values: list[float | None], layers: int, color: str = BLUE, label: str = "") -> None:
    """Values of layers 1 ... L, or of points 0 ... L (x_0 is the embedding); a null is a gap."""
    first = 0 if len(values) == layers + 1 else 1
    heights = [float("nan") if value is None else value for value in values]
    axis.plot(range(first, first + len(heights)), heights, "o-", color=color, label=label or None)


def _finish(axis: Any, title: str, layers: int, ylabel: str = "", log: bool | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    heights = [y for line in axis.get_lines() for y in line.get_ydata() if y == y]
    positive = bool(heights) and min(heights) > 0
    if positive and (log or (log is None and max(heights) > LOG_RATIO * min(heights))):
        axis.set_yscale("log")
    elif positive:
        axis.set_ylim(bottom=0)
    axis.set_title(title)
    axis.set_xlabel("layer")
    axis.set_ylabel(ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if any(line.get_label()[:1] != "_" for line in axis.get_lines()):
        axis.legend(fontsize=8.5)


def _lines(title: str, *keys: tuple[str, str], ylabel: str = "", log: bool | None = None) -> Draw:
    """A panel with one line per (key, label)."""

    def draw(axis: Any, numbers: Numbers) -> None:
        for (key, label), color in zip(keys, (BLUE, ORANGE, GREEN, PURPLE), strict=False):
            if numbers.get(key) is not None:
                _line(axis, numbers[key], numbers["num_layers"], color, label if len(keys) > 1 else "")
        _finish(axis, title, numbers["num_layers"], ylabel, log)

    return draw


def _bars(title: str, key: str, ylabel: str) -> Draw:
    def draw(axis: Any, numbers: Numbers) -> None:
        values = [0.0 if value is None else value for value in numbers[key]]
        smallest = min((abs(v) for v in values if v), default=1.0)
        colors = [BLUE if value >= 0 else ORANGE for value in values]
        axis.bar(range(1, len(values) + 1), values, width=0.7, color=colors)
        if max(map(abs, values), default=0.0) > LOG_RATIO * smallest:
            axis.set_yscale("symlog", linthresh=smallest)
        axis.grid(axis="x", visible=False)
        _finish(axis, title, numbers["num_layers"], ylabel, log=False)

    return draw


def _map(title: str, key: str, ylabel: str, label: str, origin: int) -> Draw:
    """A heat map of a matrix with the layer along x; `origin` is the number of its first column."""

    def draw(axis: Any, numbers: Numbers) -> None:
        import numpy as np
        from matplotlib.ticker import MaxNLocator

        rows = [row for row in numbers[key] if row is not None]
        heads = len(rows[0])
        table = np.array([[np.nan] * heads if row is None else row for row in numbers[key]], dtype=float).T
        extent = (origin - 0.5, origin + table.shape[1] - 0.5, -0.5, table.shape[0] - 0.5)
        image = axis.imshow(table, origin="lower", aspect="auto", cmap="viridis", extent=extent)
        axis.grid(visible=False)
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.set_ylabel(ylabel)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(integer=True, nbins=8))
        bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(label, color=MUTED)

    return draw


def _gains(axis: Any, numbers: Numbers) -> None:
    """Mean of each gain with its range, next to where it began."""
    norms = [gain for gain in numbers["gains"] if gain["name"].endswith(".weight") and gain["layer"]]
    kinds = list(dict.fromkeys(gain["name"].split(".")[-2] for gain in norms))
    for kind, color in zip(kinds, (BLUE, ORANGE, GREEN, PURPLE), strict=False):
        own = [gain for gain in norms if gain["name"].split(".")[-2] == kind]
        layers = [gain["layer"] for gain in own]
        axis.plot(layers, [gain["mean"] for gain in own], "o-", color=color, label=kind)
        low, high = [gain["min"] for gain in own], [gain["max"] for gain in own]
        axis.fill_between(layers, low, high, color=color, alpha=0.12, linewidth=0)
    for initial in {gain["initial"] for gain in norms}:
        axis.axhline(initial, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    _finish(axis, "Gains: mean and range", numbers["num_layers"], log=False)


# Figure -> its panels, the first of which is also in the overview.
SUBJECTS: dict[str, tuple[Draw, ...]] = {
    "stream": (
        _lines("Residual stream", ("stream_rms", "RMS"), ylabel="RMS", log=True),
        _lines(
            "Second moment and variance",
            ("stream_second_moment", "second moment"),
            ("stream_variance", "variance"),
            log=True,
        ),
    ),
    "angular_distance": (
        _lines("Angular distance to the layer before", ("angular_distance", ""), ylabel="angle / pi"),
        _map("Angular distance, all pairs", "angular_distance_matrix", "layer", "angle / pi", origin=0),
    ),
    "block_influence": (
        _lines("Block influence", ("block_influence", ""), ylabel="1 - cos"),
        _lines("Relative update", ("relative_update", ""), ylabel="|x' - x| / |x|"),
    ),
    "gradient": (
        _lines("Gradient norm of the parameters", ("gradient_norm", ""), ylabel="|dL/dp|"),
        _lines("Gradient norm of the stream", ("stream_gradient_norm", ""), ylabel="|dL/dx|"),
    ),
    "update_ratio": (_lines("Update / weight", ("update_ratio", ""), ylabel="|dW| / |W|"),),
    "removal": (
        _bars("Perplexity without the layer", "removal_delta_perplexity", "added perplexity"),
        _bars("Loss without the layer", "removal_delta_loss", "added nats per token"),
    ),
    "massive_activations": (
        _lines("Largest activation / median", ("massive_ratio", ""), ylabel="max |x| / median |x|", log=True),
        _lines("Largest activation", ("max_activation", ""), ylabel="max |x|", log=True),
    ),
    "attention": (
        _lines("Attention entropy", ("attention_entropy", ""), ylabel="nats"),
        _lines("Largest attention logit", ("max_attention_logit", ""), ylabel="logit"),
        _map("Entropy of each head", "attention_entropy_heads", "head", "nats", origin=1),
    ),
    "gains": (_lines("Gain drift", ("gain_drift", ""), ylabel="RMS of gain / gain_0 - 1"), _gains),
}
# What a figure shows first; the figure is drawn where it is there.
NEEDED = {
    "stream": "stream_rms",
    "angular_distance": "angular_distance",
    "block_influence": "block_influence",
    "gradient": "gradient_norm",
    "update_ratio": "update_ratio",
    "removal": "removal_delta_perplexity",
    "massive_activations": "massive_ratio",
    "attention": "attention_entropy",
    "gains": "gain_drift",
}
