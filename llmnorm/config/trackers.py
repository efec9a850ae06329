"""The tracking section: a list of experiment trackers, each chosen by its `name`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmnorm.config.base import Section


class TensorBoardSection(Section):
    """TensorBoard event files under the run directory."""

    name: Literal["tensorboard"] = Field(description="The tracker.")


class WandbSection(Section):
    """Weights & Biases."""

    name: Literal["wandb"] = Field(description="The tracker.")
    project: str = Field("llmnorm", min_length=1, description="Project that the run is listed under.")
    run_name: str | None = Field(None, description="Name of the run; null: the last part of output_dir.")
    entity: str | None = Field(None, description="User or team; null: the account's default.")
    mode: Literal["online", "offline"] = Field(
        "online", description="Send at once, or keep for `wandb sync`."
    )


class TrackioSection(Section):
    """trackio, the local-first tracker of Hugging Face."""

    name: Literal["trackio"] = Field(description="The tracker.")
    project: str = Field("llmnorm", min_length=1, description="Project that the run is listed under.")
    run_name: str | None = Field(None, description="Name of the run; null: the last part of output_dir.")


TrackerSection = Annotated[TensorBoardSection | WandbSection | TrackioSection, Field(discriminator="name")]
