"""The schedule section: one class per learning-rate schedule, chosen by `schedule.name`.

All count updates. During warm-up the rate at update t (0-based) is lr * (t + 1) / warmup_steps; afterwards
it is lr * (min_lr_ratio + (1 - min_lr_ratio) * shape), where shape falls from 1 to 0.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llmnorm.config.base import Fraction, NonNegativeInt, PositiveInt, Section


class ScheduleBase(Section):
    """Keys that every schedule has."""

    name: Any = Field(description="The schedule.")  # each schedule narrows it to its own name
    warmup_steps: NonNegativeInt = Field(
        0,
        description="Updates over which the learning rate rises linearly from zero to its peak. A norm that "
        "needs a warm-up (Post-LN, Mix-LN, DeepNorm) gets a tenth of the run, and says so, if none is given.",
    )


class CosineSection(ScheduleBase):
    """Half a cosine from the peak to `min_lr_ratio` of it at the last update."""

    name: Literal["cosine"] = Field("cosine", description="The schedule.")
    min_lr_ratio: Fraction = Field(0.1, description="Final learning rate as a part of the peak.")


class LinearSection(ScheduleBase):
    """A straight line from the peak to `min_lr_ratio` of it at the last update."""

    name: Literal["linear"] = Field("linear", description="The schedule.")
    min_lr_ratio: Fraction = Field(0.0, description="Final learning rate as a part of the peak.")


class WsdSection(ScheduleBase):
    """Warm-up, stable, decay: constant at the peak, then a decay over the last updates."""

    name: Literal["wsd"] = Field("wsd", description="The schedule.")
    decay_steps: PositiveInt | None = Field(
        None, description="Length of the final decay in updates; null: decay_fraction of the run."
    )
    decay_fraction: Fraction = Field(
        0.2, description="Length of the final decay as a part of the run; used when decay_steps is null."
    )
    decay_shape: Literal["linear", "sqrt", "cosine", "square", "exponential"] = Field(
        "linear", description="Shape of the final decay."
    )
    min_lr_ratio: Fraction = Field(0.0, description="Final learning rate as a part of the peak.")


class ConstantSection(ScheduleBase):
    """The peak learning rate from the end of the warm-up on."""

    name: Literal["constant"] = Field("constant", description="The schedule.")


class InverseSqrtSection(ScheduleBase):
    """The peak times sqrt(warmup_steps / update): never ends, so a run can be extended."""

    name: Literal["inverse_sqrt"] = Field("inverse_sqrt", description="The schedule.")


class RefinedSection(ScheduleBase):
    """Rates from the gradient norms that a previous run logged (arXiv 2310.07831); it warms up by itself."""

    name: Literal["refined"] = Field("refined", description="The schedule.")
    metrics_file: str = Field(description="metrics.jsonl of the previous run.")
    weighting: Literal["sgd", "adam"] = Field(
        "adam",
        description="Weight of an update: 1 / norm^2 for plain gradients, 1 / norm for adaptive methods.",
    )
    smoothing: Fraction = Field(0.1, description="Width of the median filter as a part of the logged run.")
    min_lr_ratio: Fraction = Field(0.0, description="Final learning rate as a part of the peak.")


ScheduleSection = Annotated[
    CosineSection | LinearSection | WsdSection | ConstantSection | InverseSqrtSection | RefinedSection,
    Field(discriminator="name"),
]
# Norms whose blocks end in a norm of the residual sum, some layers' or all: they need a warm-up of about a
# tenth of the run (arXiv 2002.04745; Mix-LN's authors in their repository).
WARMED_UP_NORMS = ("post_ln", "post_rmsnorm", "mix_ln", "deepnorm")


def default_warmup(norm: Any, norm_options: Any, max_steps: int) -> int:
    """The updates of warm-up of a run that does not say how many: what its norm needs."""
    rows = norm if isinstance(norm, list) else [norm]
    base = norm_options.get("base") if isinstance(norm_options, dict) else None
    needs = [f"{base}_ln" if base == "post" else base if row == "gpas" else row for row in rows]
    return max_steps // 10 if any(row in WARMED_UP_NORMS for row in needs) else 0


DEFAULT_SCHEDULE = "cosine"
