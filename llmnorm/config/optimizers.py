"""The optimizer section: one class per method, chosen by `optimizer.name`.

A new method is one class here and its name in `OptimizerSection`; its fields are exactly what
`create_optimizer` takes besides the model.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from llmnorm.config.base import Betas, Fraction, NonNegativeInt, PositiveInt
from llmnorm.config.lowrank_optimizers import (
    AdamW8bitSection,
    ApolloMiniSection,
    ApolloSection,
    DCTAdamWSection,
    FiraSection,
    GaLoreSection,
    GradNormLoRPSection,
    SpamSection,
    StableSpamSection,
)
from llmnorm.config.optimizer_keys import (
    LR_MODE,
    ROW_BLOCKS,
    AdamWElsewhere,
    CautiousDecay,
    DecayRate,
    LrMode,
    MatrixMethodSection,
    OptimizerBase,
    Positive,
    Probability,
    RowBlocks,
    Triple,
    Variant,
)


class AdamWSection(MatrixMethodSection):
    """AdamW (Decoupled Weight Decay Regularization, arXiv 1711.05101), fused where torch can."""

    name: Literal["adamw"] = Field("adamw", description="The method.")
    betas: Betas = Field((0.9, 0.999), description="Decay rates of the first and second moment.")
    eps: float = Field(1e-8, gt=0.0, description="Added to the square root of the second moment.")


class OrthogonalizationSection(MatrixMethodSection, CautiousDecay):
    """Keys of the Newton-Schulz engine."""

    momentum: DecayRate = Field(0.95, description="Decay rate of the momentum.")
    ns_coefficients: Literal["jordan", "you", "polar_express", "cans", "aol"] | Triple = Field(
        (3.4445, -4.775, 2.0315),
        description="Coefficients of the iterations: a set's name, or three numbers for all iterations.",
    )
    ns_steps: PositiveInt = Field(5, description="Newton-Schulz iterations.")
    eps: Positive = Field(1e-7, description="Smallest norm that the engine divides by.")
    ns_dtype: Literal["bf16", "fp32"] = Field("bf16", description="Precision of the iterations.")
    ns_method: Literal["standard", "gram"] = Field(
        "standard", description="gram: the same polynomial on the Gram matrix, cheaper for long matrices."
    )
    ns_preconditioner: Literal["none", "aol"] = Field(
        "none",
        description="aol: rows (or columns) scaled towards orthogonality first, so that 4 iterations do; "
        "ns_coefficients: aol needs it.",
    )
    lr_mode: LrMode = LR_MODE
    qk_clip: Positive | None = Field(
        None,
        description="Largest attention logit of a head; beyond it W_q and W_k are scaled down after the "
        "step (MuonClip, 100 there); null: off.",
    )


class MuonSection(OrthogonalizationSection, AdamWElsewhere):
    """Muon (Keller Jordan, 2024; Moonlight, arXiv 2502.16982) on hidden matrices, AdamW on the rest."""

    name: Literal["muon"] = Field("muon", description="The method.")
    nesterov: bool = Field(True, description="Nesterov momentum.")
    row_blocks: RowBlocks = ROW_BLOCKS


class NorMuonSection(OrthogonalizationSection, AdamWElsewhere):
    """NorMuon (arXiv 2510.05491): Muon with one second moment per neuron."""

    name: Literal["normuon"] = Field("normuon", description="The method.")
    beta2: DecayRate = Field(0.95, description="Decay rate of the second moment of each row.")
    normalizer_eps: Positive = Field(1e-10, description="Added to the square root of the second moment.")
    variant: Variant = Field(
        "released", description="released: norm of Muon's update and Nesterov; paper: RMS 0.2, no Nesterov."
    )
    row_blocks: RowBlocks = ROW_BLOCKS


class LantonSection(OrthogonalizationSection):
    """LANTON (arXiv 2510.14009): learning rates per layer from the noise of its gradients."""

    name: Literal["lanton"] = Field("lanton", description="The method.")
    ns_coefficients: Literal["jordan", "you", "polar_express", "cans", "aol"] | Triple = Field(
        "polar_express",
        description="Coefficients of the iterations: a set's name, or three numbers for all iterations.",
    )
    beta2: DecayRate = Field(0.95, description="Decay rate of the noise estimate.")
    alpha: Positive | None = Field(
        None, description="Noise at which a rate falls to 0.84 of lr; null: the median of the layers."
    )
    embedding_radius: Positive = Field(
        60.0, description="Step of embedding and head relative to that of hidden matrices."
    )


class ScaleSection(MatrixMethodSection, AdamWElsewhere, CautiousDecay):
    """SCALE (arXiv 2506.16659): normalized gradients, momentum on the head only."""

    name: Literal["scale"] = Field("scale", description="The method.")
    momentum: DecayRate = Field(0.9, description="Decay rate of the momentum of the head.")
    eps: Positive = Field(1e-7, description="Smallest norm, relative to the RMS of the whole gradient.")
    variant: Variant = Field(
        "released", description="released: slices of RMS 1; paper: slices of L2 norm 1, far smaller."
    )
    lr_mode: LrMode = LR_MODE


class SinkGDSection(MatrixMethodSection, AdamWElsewhere, CautiousDecay):
    """SinkGD (arXiv 2502.06742): rows and columns of the gradient balanced, no state."""

    name: Literal["sinkgd"] = Field("sinkgd", description="The method.")
    alpha: Positive = Field(0.05, description="Factor of lr on hidden matrices.")
    iterations: PositiveInt = Field(5, description="Sinkhorn iterations.")
    eps: Positive = Field(1e-7, description="Rows and columns below this part of the RMS count as zero.")
    lr_mode: LrMode = LR_MODE


class SwanSection(MatrixMethodSection, AdamWElsewhere, CautiousDecay):
    """SWAN (arXiv 2412.13148): standardized and whitened gradients, no state."""

    name: Literal["swan"] = Field("swan", description="The method.")
    alpha: Positive = Field(0.05, description="Factor of lr on hidden matrices.")
    iterations: PositiveInt = Field(10, description="Newton-Schulz iterations of the whitening.")
    center: bool = Field(True, description="Subtract the mean of each row.")
    eps: Positive = Field(1e-6, description="Rows below this part of the RMS count as zero.")
    lr_mode: LrMode = LR_MODE


class CondaSection(MatrixMethodSection, AdamWElsewhere):
    """Conda (arXiv 2509.24218): Adam in the singular basis of the momentum."""

    name: Literal["conda"] = Field("conda", description="The method.")
    betas: Betas = Field((0.9, 0.99), description="Decay rates of the first and second moment.")
    eps: Positive = Field(1e-8, description="Added to the uncorrected square root of the second moment.")
    update_proj_gap: PositiveInt = Field(2000, description="Updates between two bases.")
    scale: Positive = Field(0.25, description="Factor of lr on hidden matrices.")


class LambSection(MatrixMethodSection):
    """LAMB (arXiv 1904.00962): Adam with a trust ratio per layer."""

    name: Literal["lamb"] = Field("lamb", description="The method.")
    betas: Betas = Field((0.9, 0.999), description="Decay rates of the first and second moment.")
    eps: Positive = Field(1e-6, description="Added to the square root of the second moment.")
    max_weight_norm: Positive | None = Field(
        10.0, description="Largest weight norm in the trust ratio; null: no limit."
    )


class NovoGradSection(MatrixMethodSection):
    """NovoGrad (arXiv 1905.11286): one second moment per layer, with gradient averaging."""

    name: Literal["novograd"] = Field("novograd", description="The method.")
    betas: Betas = Field((0.95, 0.98), description="Decay rates of the momentum and the second moment.")
    eps: Positive = Field(1e-8, description="Added to the norm of the gradient.")


class AdamPSection(MatrixMethodSection):
    """AdamP (arXiv 2006.08217): no motion along weights whose length does not matter."""

    name: Literal["adamp"] = Field("adamp", description="The method.")
    betas: Betas = Field((0.9, 0.999), description="Decay rates of the first and second moment.")
    eps: Positive = Field(1e-8, description="Added to the square root of the second moment.")
    delta: Positive = Field(0.1, description="Largest cosine, times sqrt(elements), that still projects.")
    wd_ratio: Fraction = Field(0.1, description="Factor of the weight decay of projected weights.")


class LawnSection(MatrixMethodSection, AdamWElsewhere):
    """LAWN (arXiv 2108.05839): weights on spheres, Adam in the tangent."""

    name: Literal["lawn"] = Field("lawn", description="The method.")
    betas: Betas = Field((0.9, 0.999), description="Decay rates of the first and second moment.")
    eps: Positive = Field(1e-8, description="Added to the square root of the second moment.")
    free_steps: NonNegativeInt = Field(0, description="Updates of AdamW before the norms are frozen.")


class PSGDKronSection(MatrixMethodSection, CautiousDecay):
    """PSGD Kron (arXiv 1512.04202): a Kronecker-factored whitening preconditioner."""

    draws: ClassVar[bool] = True

    name: Literal["psgd_kron"] = Field("psgd_kron", description="The method.")
    momentum: DecayRate = Field(0.9, description="Decay rate of the momentum.")
    precond_lr: Positive = Field(0.1, description="Step size of the preconditioner.")
    max_size_triangular: PositiveInt = Field(
        8192, description="Sides longer than this get a diagonal factor."
    )
    min_update_probability: Probability = Field(
        0.03, description="Probability that a step updates the preconditioner, once annealed."
    )


class CustomSection(OptimizerBase):
    """Any torch.optim.Optimizer class; its own options stand beside these keys and pass through."""

    # The class's signature is what knows its options; `optim/custom.py` checks them by it.
    model_config = ConfigDict(extra="allow")

    name: Literal["custom"] = Field("custom", description="The method.")
    class_path: Annotated[str, Field(pattern=r"^[\w.]+(\.|\.py:)\w+$")] = Field(
        description="package.module.Class, or file.Class for a file in plugins; implies name: custom."
    )

    @property
    def method(self) -> str:
        return self.class_path

    def options(self, seed: int = 0) -> dict[str, Any]:
        return self.model_dump(exclude={"name", "lr", "class_path"})


OptimizerSection = Annotated[
    AdamWSection
    | AdamPSection
    | AdamW8bitSection
    | ApolloMiniSection
    | ApolloSection
    | CondaSection
    | CustomSection
    | DCTAdamWSection
    | FiraSection
    | GaLoreSection
    | GradNormLoRPSection
    | LambSection
    | LantonSection
    | LawnSection
    | MuonSection
    | NorMuonSection
    | NovoGradSection
    | PSGDKronSection
    | ScaleSection
    | SinkGDSection
    | SpamSection
    | StableSpamSection
    | SwanSection,
    Field(discriminator="name"),
]
DEFAULT_OPTIMIZER = "adamw"
CUSTOM = "custom"
