"""How many sequences an update reads over the run: `train.batch_schedule`, chosen by its name.

Every schedule is a function of counters that a checkpoint holds, so a resumed run goes on inside a stage.
`optimizer.lr` belongs to `train.global_batch_size`; `lr_scaling` says what other sizes get.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llmnorm.config.base import PositiveInt, Section


class BatchScheduleBase(Section):
    """Keys that every batch-size schedule has."""

    name: Any = Field(description="The batch-size schedule.")  # each narrows it to its own name
    lr_scaling: Literal["none", "sqrt", "linear"] = Field(
        "none",
        description="Factor of the learning rate at batch size B: 1, sqrt(B / train.global_batch_size), or "
        "B / train.global_batch_size.",
    )


class StageSection(Section):
    """One stage before the last; it has one of the two ends."""

    until_step: PositiveInt | None = Field(None, description="Updates of the run at which the stage ends.")
    until_tokens: PositiveInt | None = Field(
        None,
        description="Positions read (sequences x data.sequence_length) from the run's start at which the "
        "stage ends.",
    )
    global_batch_size: PositiveInt = Field(description="Sequences per update of the stage.")


class StagedSection(BatchScheduleBase):
    """Given stages, then `train.global_batch_size` to the end."""

    name: Literal["staged"] = Field(description="The batch-size schedule.")
    stages: Annotated[list[StageSection], Field(min_length=1)] = Field(
        description="The stages before the last, whose size is train.global_batch_size."
    )


class NormTestSection(BatchScheduleBase):
    """The batch grows when its gradient is too noisy (AdAdaGrad's norm test, arXiv 2402.11215)."""

    name: Literal["norm_test"] = Field(description="The batch-size schedule.")
    max_global_batch_size: PositiveInt = Field(
        description="Largest size, a multiple of train.global_batch_size, which is where the run starts."
    )
    eta: Annotated[float, Field(gt=0.0)] = Field(
        0.3,
        description="The test fails where the gradient's standard deviation exceeds this part of its norm.",
    )
    every: PositiveInt = Field(10, description="Updates between tests.")
    patience: PositiveInt = Field(3, description="Tests in a row that must fail before the batch grows.")


BatchScheduleSection = Annotated[StagedSection | NormTestSection, Field(discriminator="name")]
