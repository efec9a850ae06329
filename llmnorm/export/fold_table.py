"""The table of docs/export.md: which norm folds into which stock class, read off the code that folds.

python -m llmnorm.export.fold_table docs/export.md     writes it between its two marks
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llmnorm.export.absorb import absorbed_plan
from llmnorm.export.fold import why_not
from llmnorm.export.stock_classes import STOCK_CLASSES
from llmnorm.modeling.equation import ResidualPlan
from llmnorm.modeling.placements import Preset
from llmnorm.modeling.residual import PRESETS, residual_plan

BEGIN, END = "<!-- stock classes -->", "<!-- end of stock classes -->"
LAYERS = 4

# Options that change the answer, beside each norm's defaults. An option that a norm does not take is passed
# over.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"norm_type": "layernorm"},
    {"embedding_norm": True},
    {"embedding_norm": True, "final_norm": False},
    {"num_post_layers": 0},
    {"fixnorm": True},
    {"recentered": True},
    {"base": "layernorm_scaling"},
    {"base": "sandwich"},
    {"base": "post"},
    {"base": "deepnorm"},
    {"base": "mix_ln", "num_post_layers": 1},
)


def fold_table() -> str:
    """Markdown, one line for each norm and variant whose answer differs from the norm's default."""
    lines = ["| `model.norm` | options | becomes | by |", "|---|---|---|---|"]
    for norm, preset in PRESETS.items():
        seen: set[tuple[str, str]] = set()
        for options in VARIANTS:
            if not _takes(preset, options):
                continue
            plan = residual_plan(norm, options, LAYERS)
            answer = _answer(plan)
            if answer not in seen:
                seen.add(answer)
                shown = ", ".join(f"`{key}: {_yaml(value)}`" for key, value in options.items())
                lines.append(f"| `{norm}` | {shown} | {answer[0]} | {answer[1]} |")
    return "\n".join(lines) + "\n"


def _takes(preset: Preset, options: dict[str, Any]) -> bool:
    if not options.keys() <= preset.options.keys():
        return False
    return all(preset.options[name].has_place(options) for name in options)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _answer(plan: ResidualPlan) -> tuple[str, str]:
    left = absorbed_plan(plan)
    rows = [row for row in STOCK_CLASSES if row.computes(left)]
    if not rows:
        return "nothing", why_not(left, list(STOCK_CLASSES))
    steps = _steps(plan) or ["as it is"]
    ways = [f"{row.name}: {row.note}" for row in rows if row.note]
    return " or ".join(f"`{row.model.__name__}`" for row in rows), "; ".join([*steps, *ways])


def _steps(plan: ResidualPlan) -> list[str]:
    """What `absorb` does to a plan, in words."""
    specs = [spec for layer in plan.layers for spec in (layer.attention, layer.mlp)]
    norm_out = any(spec.norm_out for spec in specs)
    writer = "gains of the norms after the branches" if norm_out else "rows of W_o and W_down"
    steps = {
        "the stream with all its features, head untied": plan.compressed,
        "embedding normalized beforehand, head untied": plan.embedding_norm is not None
        and absorbed_plan(plan).embedding_norm is None,
        "gains g / sqrt(d), epsilon 1e-12": plan.final_norm == "scalenorm",
        "gains and shifts of the norms times their constants": any(spec.norm_in_scale != 1 for spec in specs),
        f"learned scales into the {writer}": any(spec.learned_branch_scale for spec in specs),
        f"gates into the {writer}, exact up to epsilon": any(spec.gate for spec in specs),
    }
    return [words for words, holds in steps.items() if holds]


def write_into(page: Path) -> None:
    """Replace what stands between BEGIN and END."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} lacks the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{fold_table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_into(Path(sys.argv[1]))
