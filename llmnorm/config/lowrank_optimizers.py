"""The optimizer section of the low-rank methods, of quantized states and of the SPAM family.

For 60M, 130M, 350M, 1B and 7B parameters the papers use
    galore, fira     rank 128, 256, 256, 512, 1024; lr 0.01 (7B 0.005); scale 0.25 (fira 1B, 7B: 0.0625)
    apollo           rank 128, 192, 256, 512, 256; lr 0.01           apollo_mini    lr 0.01, or 0.02
    stable_spam      lr 1e-3, 8e-4, 4e-4, 2e-4 in bf16, 1e-3 (130M), 4e-4, 2e-4 in 4 bits
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from llmnorm.config.base import Betas, NonNegativeInt, PositiveInt
from llmnorm.config.optimizer_keys import (
    AdamWElsewhere,
    CautiousDecay,
    MatrixMethodSection,
    OptimizerBase,
    Positive,
    Probability,
    Triple,
    Variant,
)

Projection = Literal["svd", "gram", "randomized", "power", "random"]


class AdamKeys(MatrixMethodSection):
    """Adam's own keys."""

    betas: Betas = Field((0.9, 0.999), description="Decay rates of the first and second moment.")
    eps: Positive = Field(1e-8, description="Added to the square root of the second moment.")


class LowRankSection(AdamKeys, AdamWElsewhere):
    """Keys of the methods that project gradients on a subspace."""

    draws: ClassVar[bool] = True

    rank: PositiveInt | None = Field(
        None, description="Dimension of the subspace; null: hidden_size / 4, clamped per matrix."
    )
    update_proj_gap: PositiveInt = Field(200, description="Steps between refreshes of the subspace.")
    scale: Positive = Field(0.25, description="Factor of the update.")
    side: Literal["std", "auto", "right"] = Field(
        "std",
        description="Dimension that is projected. std: the smaller; auto: the one that leaves less state; "
        "right: inputs, local where rows are sharded.",
    )
    projection: Projection = Field(
        "svd", description="How the subspace is found; random: drawn from the seed and never stored."
    )
    moments: Literal["keep", "transport", "reset"] = Field(
        "keep", description="What a refresh does to the moments; keep is as released."
    )
    stagger: bool = Field(False, description="Matrices take turns to refresh.")
    lazy_refresh: bool = Field(
        False, description="Double the gap of a matrix while its subspace stands still (Q-GaLore)."
    )
    state_bits: Literal[32, 8, 4] = Field(
        32,
        description="Bits of a moment; 32: as state_dtype says. Small matrices are never quantized.",
    )
    projection_bits: Literal[32, 4] = Field(32, description="Bits of the basis; 4: packed INT4 (Q-GaLore).")
    eps: Positive = Field(1e-6, description="Added to the square root of the second moment.")
    adamw_eps: Positive = Field(1e-6, description="eps of Adam on the other roles.")


class Int8WeightKeys(OptimizerBase):
    """The key of the methods that can train INT8 weights."""

    weights: Literal["param", "int8"] = Field(
        "param",
        description="How hidden matrices are kept: as train.precision says, or in INT8 with stochastic "
        "rounding of each update (Q-GaLore, Q-APOLLO), in one process.",
    )


class GaLoreSection(LowRankSection, Int8WeightKeys):
    """GaLore (arXiv 2403.03507): Adam in the leading singular subspace of the gradient."""

    name: Literal["galore"] = Field("galore", description="The method.")
    variant: Variant = Field(
        "released", description="released: HF's old Adam, decay after the step; paper: Adam as in torch."
    )


class FiraSection(LowRankSection, Int8WeightKeys):
    """Fira (arXiv 2410.01623): GaLore, and the rest of the gradient scaled as Adam scales the subspace."""

    name: Literal["fira"] = Field("fira", description="The method.")
    variant: Variant = Field(
        "released",
        description="released: the rest is 1/scale larger, as in published runs; paper: as written.",
    )


class ApolloSection(LowRankSection, Int8WeightKeys):
    """APOLLO (arXiv 2412.05270): the gradient scaled as Adam scales a random sketch of it."""

    name: Literal["apollo"] = Field("apollo", description="The method.")
    scale: Positive = Field(1.0, description="Enters under a root; wants to grow as rank falls.")
    granularity: Literal["channel", "tensor"] = Field("channel", description="What shares one factor.")
    projection: Projection = Field(
        "random", description="How the subspace is found; random: drawn from the seed and never stored."
    )


class ApolloMiniSection(ApolloSection):
    """APOLLO-Mini (arXiv 2412.05270): rank 1 and one factor per matrix."""

    name: Literal["apollo_mini"] = Field("apollo_mini", description="The method.")  # type: ignore[assignment]
    rank: PositiveInt | None = Field(
        1, description="Dimension of the subspace; null: hidden_size / 4, clamped per matrix."
    )
    scale: Positive = Field(128.0, description="Enters under a root; wants to grow as rank falls.")
    granularity: Literal["channel", "tensor"] = Field("tensor", description="What shares one factor.")


class DCTAdamWSection(AdamKeys, AdamWElsewhere, CautiousDecay):
    """DCT-AdamW (arXiv 2505.17967): Adam in the strongest cosines of the gradient, without an SVD."""

    name: Literal["dct_adamw"] = Field("dct_adamw", description="The method.")
    rank: PositiveInt | None = Field(
        None, description="Number of cosines; null: hidden_size / 4, clamped per matrix."
    )
    update_proj_gap: PositiveInt = Field(1, description="Steps between choices of cosines.")
    side: Literal["std", "auto", "right"] = Field(
        "std",
        description="Dimension that is projected. std: the smaller; auto: the one that leaves less state; "
        "right: inputs, local where rows are sharded.",
    )
    moments: Literal["keep", "transport"] = Field(
        "transport", description="transport: a moment follows its cosine; keep: it stays in its place."
    )
    error_feedback: Literal[0, 32, 8, 4] = Field(
        0, description="Bits in which the dropped part is kept and added to the next gradient; 0: not at all."
    )
    state_bits: Literal[32, 8, 4] = Field(
        32,
        description="Bits of a moment; 32: as state_dtype says. Small matrices are never quantized.",
    )


class GradNormLoRPSection(LowRankSection):
    """GradNormLoRP (arXiv 2412.19616): weight-normalized rows, directions in a low-rank subspace."""

    name: Literal["gradnorm_lorp"] = Field("gradnorm_lorp", description="The method.")
    update_proj_gap: PositiveInt = Field(250, description="Steps between refreshes of the subspace.")
    eps: Positive = Field(1e-8, description="Added to the square root of the second moment.")
    adamw_eps: Positive = Field(1e-8, description="eps of AdamW on the other roles.")


class AdamW8bitSection(AdamKeys, CautiousDecay):
    """AdamW with block-wise quantized moments (arXiv 2110.02861)."""

    name: Literal["adamw8bit"] = Field("adamw8bit", description="The method.")
    state_bits: Literal[8, 4] = Field(8, description="Bits of a moment. Small matrices are never quantized.")
    quantize_embeddings: bool = Field(False, description="Quantize the moments of embedding and head too.")


class SpamSection(AdamKeys):
    """SPAM (arXiv 2501.06842): Adam with spikes clipped and momentum reset."""

    draws: ClassVar[bool] = True

    name: Literal["spam"] = Field("spam", description="The method.")
    threshold: Positive = Field(
        5000.0, description="A gradient whose square exceeds this multiple of its second moment is a spike."
    )
    reset_interval: PositiveInt = Field(500, description="Updates between resets of the moments.")
    warmup_steps: NonNegativeInt = Field(
        150, description="Updates over which the learning rate recovers from a reset."
    )
    grace_steps: NonNegativeInt = Field(20, description="Updates after a reset that clip nothing.")
    reset_clock: Literal["global", "restart"] = Field(
        "global", description="Whether the bias correction goes on through a reset or starts again."
    )
    density: Probability = Field(
        1.0, description="Share of a hidden matrix that moves, and has moments, between two resets."
    )
    eps: Positive = Field(1e-6, description="Added to the square root of the second moment.")


class StableSpamSection(AdamKeys, CautiousDecay):
    """Stable-SPAM (arXiv 2502.17055): Adam behind an adaptive clip and norm, with momentum resets."""

    name: Literal["stable_spam"] = Field("stable_spam", description="The method.")
    gammas: Triple = Field(
        (0.7, 0.9, 0.999),
        description="Decay rates of norm, its square and the largest entry; 0.85, 0.99999, 0.999 in bf16.",
    )
    reset_interval: NonNegativeInt = Field(1000, description="Updates between resets; 0: never.")
    reset_clock: Literal["restart", "global"] = Field(
        "restart", description="Whether the bias correction starts again at a reset or goes on."
    )
    cosine_steps: PositiveInt | None = Field(
        None, description="Updates over which a cosine halves betas[0] and gammas[0], as released code can."
    )
    variant: Variant = Field("paper", description="released: with the authors' code's faults at a reset.")
