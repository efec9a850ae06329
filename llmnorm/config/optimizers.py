"""The optimizer section: one class per method, chosen by `optimizer.name`.

A new method is one class here and its name in `OptimizerSection`; its fields are exactly what
`create_optimizer` takes besides the model.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from llmnorm.config.base import Betas, Section


class OptimizerBase(Section):
    """Keys that every method has."""

    name: Any = Field(description="The method.")  # each method narrows it to its own name
    lr: float = Field(gt=0.0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0,
        ge=0.0,
        description="Decoupled weight decay, on matrices only, never on gains and biases.",
    )

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `create_optimizer` besides the name, the model and lr."""
        return self.model_dump(exclude={"name", "lr"})


class AdamWSection(OptimizerBase):
    """AdamW (Decoupled Weight Decay Regularization, arXiv 1711.05101), fused where torch can."""

    name: Literal["adamw"] = Field("adamw", description="The method.")
    betas: Betas = Field((0.9, 0.999), description="Decay rates of the first and second moment.")
    eps: float = Field(1e-8, gt=0.0, description="Added to the square root of the second moment.")


# One method today, so the union has one member; a second turns this into
# Annotated[AdamWSection | NextSection, Field(discriminator="name")].
OptimizerSection = AdamWSection
DEFAULT_OPTIMIZER = "adamw"
