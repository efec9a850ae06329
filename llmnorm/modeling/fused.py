"""Where the fused kernels of `llmnorm_kernels` take over from the model's own torch code.

The torch code beside each use specifies the operator and is all that an exported checkpoint needs. A kernel
serves a tensor if the package is installed and its backend says so: on a GPU unless `kernels: torch` was
chosen, on a CPU only where Triton interprets (tests). `llmnorm_kernels.describe_backends()` says in one line
what runs where.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

kernels: Any
try:
    import llmnorm_kernels as kernels
except ImportError:
    kernels = None


def serves(x: Tensor) -> bool:
    """Whether operators on `x` run as Triton kernels."""
    return kernels is not None and kernels.runs_triton(x)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    """sum_t -log softmax(W h_t)[label_t] / n without the logits in memory, for a tensor that `serves` takes.

    hidden [B, T, d], weight [V, d]; labels as in `LlmNormForCausalLM.forward`, whose loss this is; n is
    num_items_in_batch, or the number of labels that are not -100. Returns a float32 scalar.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    shift_labels = shift_labels.to(hidden.device)
    if num_items_in_batch is None:
        return kernels.linear_cross_entropy(hidden, weight, shift_labels)
    total = kernels.linear_cross_entropy(hidden, weight, shift_labels, reduction="sum")
    return total / num_items_in_batch
