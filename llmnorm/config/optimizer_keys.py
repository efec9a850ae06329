"""Types and keys that the sections of several optimizers share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmnorm.config.base import Betas, NonNegativeInt, Section, as_tuple

Positive = Annotated[float, Field(gt=0.0)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
Triple = Annotated[tuple[float, float, float], BeforeValidator(as_tuple)]
RowBlocks = dict[str, int | list[int]] | None
Variant = Literal["released", "paper"]
RoleName = Literal["hidden_matrix", "embedding", "lm_head", "vector"]
LrMode = Literal["paper", "adam_rms", "keller", "rms_to_rms"]

# FieldInfo is data: the methods that share a key share what it says.
LR_MODE: Any = Field(
    "paper",
    description="What lr means, as RMS of the update per unit of it: the method's own factor, 0.2 as of "
    "AdamW, 1/sqrt(fan-in), or spectral norm sqrt(out/in).",
)
ROW_BLOCKS: Any = Field(
    None,
    description="Part of a parameter's name -> rows per block, or heights of the blocks, that are "
    "orthogonalized apart: heads, or a fused QKV.",
)


class OptimizerBase(Section):
    """Keys that every method has."""

    name: Any = Field(description="The method.")  # each method narrows it to its own name
    lr: float = Field(gt=0.0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0,
        ge=0.0,
        description="Decoupled weight decay, on matrices only, never on gains and biases.",
    )
    lr_multipliers: dict[RoleName, Positive] = Field(
        default_factory=dict,
        description="Role -> factor on the learning rate of its parameters: {embedding: 4}.",
    )
    fused_backward: bool = Field(
        False,
        description="Move each weight as its gradient arrives, so that gradients are never held together; "
        "one process, accumulation with galore only. Clipping a global norm costs a second backward pass.",
    )

    @property
    def method(self) -> str:
        """What `create_optimizer` knows it by."""
        return str(self.name)

    def options(self, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of `create_optimizer` besides the name, the model and lr.

        A method that draws random numbers draws them from its own `seed`, or else from the run's.
        """
        options = self.model_dump(exclude={"name", "lr"})
        if "seed" in options and options["seed"] is None:
            options["seed"] = seed
        return options


class MatrixMethodSection(OptimizerBase):
    """Keys of every method of this project."""

    # Whether the method itself draws random numbers, so that a seed means something without rounding.
    draws: ClassVar[bool] = False

    state_dtype: Literal["param", "fp32"] = Field(
        "param", description="Precision of momenta: that of the weights, or fp32. Small statistics are fp32."
    )
    stochastic_rounding: bool = Field(
        False,
        description="Round updated bf16 weights up or down at random, right on average, so that small "
        "updates are not lost; for train.precision bf16_pure.",
    )
    seed: NonNegativeInt | None = Field(
        None, description="Seed of its random numbers; null: the seed of the run."
    )


class AdamWElsewhere(OptimizerBase):
    """Keys of the methods that leave some roles to AdamW."""

    adamw_lr: Positive | None = Field(
        None, description="Peak learning rate of the parameters that get AdamW; null: lr."
    )
    adamw_betas: Betas = Field((0.9, 0.999), description="Decay rates of AdamW on the other roles.")
    adamw_eps: Positive = Field(1e-8, description="eps of AdamW on the other roles.")


class CautiousDecay(OptimizerBase):
    """The key of the methods without a weight decay of their own kind."""

    cautious_weight_decay: bool = Field(
        False, description="Decay a weight only where the update shrinks it as well."
    )
