"""Fused operators for language-model training: a Triton kernel and its torch reference per operator.

`describe_backends()` says which operators run as kernels here, `use_backend("auto" | "torch" | "triton")`
chooses. Importing this package needs torch only; Triton is imported when a kernel first runs.
"""

from .dispatch import current_backend, describe_backends, use_backend
from .layout import empty_padded
from .norms import add_layer_norm, add_rms_norm, crms_norm, layer_norm, norm_add, rms_norm, sandwich_add

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "crms_norm",
    "current_backend",
    "describe_backends",
    "empty_padded",
    "layer_norm",
    "norm_add",
    "rms_norm",
    "sandwich_add",
    "use_backend",
]
