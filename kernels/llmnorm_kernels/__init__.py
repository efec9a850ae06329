"""Fused operators for language-model training: a Triton kernel and its torch reference per operator.

`describe_backends()` says which operators run as kernels here, `use_backend("auto" | "torch" | "triton")`
chooses. Importing this package needs torch only; Triton is imported when a kernel first runs.
"""

from .adamw_many import adamw_many_
from .blockwise import adamw_blockwise_
from .cross_entropy import cross_entropy
from .dispatch import current_backend, describe_backends, runs_triton, use_backend
from .layout import empty_padded
from .linear_attention import linear_attention
from .linear_cross_entropy import linear_cross_entropy
from .low_rank import low_rank_moments_
from .newton_schulz import newton_schulz, symmetric_product
from .norms import add_layer_norm, add_rms_norm, crms_norm, layer_norm, norm_add, rms_norm, sandwich_add
from .optimizer_steps import (
    adamw_,
    normalized_step_,
    quantized_moments,
    round_into_,
    scaled_step_,
    sinkgd_step_,
)
from .quantize import fake_quantize
from .rope import apply_rope, qk_norm_rope
from .swiglu import swiglu

__all__ = [
    "adamw_",
    "adamw_blockwise_",
    "adamw_many_",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rope",
    "crms_norm",
    "cross_entropy",
    "current_backend",
    "describe_backends",
    "empty_padded",
    "fake_quantize",
    "layer_norm",
    "linear_attention",
    "linear_cross_entropy",
    "low_rank_moments_",
    "newton_schulz",
    "norm_add",
    "normalized_step_",
    "qk_norm_rope",
    "quantized_moments",
    "rms_norm",
    "round_into_",
    "runs_triton",
    "sandwich_add",
    "scaled_step_",
    "sinkgd_step_",
    "swiglu",
    "symmetric_product",
    "use_backend",
]
