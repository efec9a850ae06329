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
        0, description="Updates over which the learning rate rises linearly from zero to its peak."
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


ScheduleSection = Annotated[
    CosineSection | LinearSection | WsdSection | ConstantSection, Field(discriminator="name")
]
DEFAULT_SCHEDULE = "cosine"
