"""What computes attention in this run: one line at its start, and torch's order of preference.

SDPA picks among its backends by shape, dtype and mask, each time it is called and in silence. The line asks
it once, with tensors of the model's shapes. On Hopper torch prefers flash attention 2; cuDNN's is 1.7 to 2.3
times faster on training shapes there (huggingface/transformers #48163), and slower on other cards, so that it
goes first on Hopper alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmnorm.modeling import LlmNormConfig
from llmnorm.modeling.feature_maps import FEATURE_MAPS
from llmnorm.modeling.linear_attention import KERNEL_DTYPES, WIDEST_KERNEL_HEAD
from llmnorm.modeling.softmax_variants import NORMALIZERS
from llmnorm_kernels import runs_triton

HOPPER = (9, 0)
HOPPER_ORDER = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math (all scores in memory)",
    SDPBackend.OVERRIDEABLE: "the device's own",
}
MASKLESS = "flex_attention and flash_attention_2"


def sdpa_order(device: torch.device) -> AbstractContextManager[Any]:
    """Inside it SDPA prefers cuDNN on a Hopper card, and what torch prefers elsewhere."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != HOPPER:
        return nullcontext()
    return sdpa_kernel(list(HOPPER_ORDER), set_priority=True)


def describe_attention(
    config: LlmNormConfig, device: torch.device, dtype: torch.dtype, documents: bool
) -> str:
    """One line: what computes each kind of attention layer of this model, and why, where that is torch's slow
    way. documents: rows hold several, kept apart.
    """
    kinds = list(dict.fromkeys(config.layer_attentions))
    parts = [
        _softmax(config, device, dtype, documents)
        if kind == "softmax"
        else _linear(config, kind, device, dtype)
        for kind in kinds
    ]
    return f"attention on {device.type}: " + "; ".join(parts)


def _softmax(config: LlmNormConfig, device: torch.device, dtype: torch.dtype, documents: bool) -> str:
    implementation = config._attn_implementation
    normalizer = config.attention_options_of("softmax")["normalizer"]
    if normalizer in NORMALIZERS:
        return f"{normalizer} in torch (all scores in memory)"
    if implementation != "sdpa":
        return f"softmax by {implementation}"
    backend = sdpa_backend(config, device, dtype, masked=documents)
    line = f"softmax by SDPA's {NAMES[backend]} backend"
    if documents:
        line += f", under a mask of documents (model.attn_implementation: {MASKLESS} need none)"
    return line


def sdpa_backend(config: LlmNormConfig, device: torch.device, dtype: torch.dtype, masked: bool) -> SDPBackend:
    """The backend that SDPA chooses for a training step of this model, asked with a short row."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = min(128, config.max_position_embeddings)
    grouped = not masked and width <= 256  # as transformers' sdpa: else it repeats keys and values
    q = torch.empty(1, heads, length, width, device=device, dtype=dtype, requires_grad=True)
    k = torch.empty(1, groups if grouped else heads, length, width, device=device, dtype=dtype)
    k.requires_grad_()
    mask = torch.ones(1, 1, length, length, device=device, dtype=torch.bool) if masked else None
    dropout = config.attention_dropout
    with sdpa_order(device):
        choice = torch._fused_sdp_choice(q, k, k, mask, dropout, not masked, enable_gqa=grouped)
    return SDPBackend(choice)


def _linear(config: LlmNormConfig, kind: str, device: torch.device, dtype: torch.dtype) -> str:
    options = config.attention_options_of(kind)
    feature_map = FEATURE_MAPS[options.get("feature_map", "relu")]
    features = feature_map.widening * config.head_dim
    if feature_map.fused is None:
        features += bool(options["floor"])
    if not runs_triton(torch.empty(0, device=device)):
        return f"{kind} in torch"
    if options["rope"] == "after":
        return f"{kind} in torch (no kernel for attention_options.rope: after)"
    if dtype not in KERNEL_DTYPES:
        return f"{kind} in torch (the kernels take bf16 and fp16, not {str(dtype)[6:]})"
    if features > WIDEST_KERNEL_HEAD:
        return f"{kind} in torch ({features} features a head; the kernels take up to {WIDEST_KERNEL_HEAD})"
    if feature_map.fused is None:
        return f"{kind} by the Triton kernel, its map {options['feature_map']} in torch"
    return f"{kind} by the Triton kernel, map {feature_map.fused} inside"
