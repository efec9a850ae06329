"""How well the linear-attention layers of a model are: its states and normalizers on a given text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .linear_attention import chunked_sum
from .linear_mixers import LinearInputs, LlmNormLinearAttention

# An exponent nearer to an end of its range than this share of the range no longer follows the norm.
SATURATED = 0.02


@torch.no_grad()
def attention_health(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[int, dict[str, float]]:
    """layer -> its health on input_ids [B, T], for each layer with linear attention; {} if there is none.

    smallest_denominator  min_t q_t . z_t over heads and tokens: near eps an output is noise over noise
    output_to_value       RMS of o over RMS of v: an average of many unlike values is small, a sum that the
                          normalizer does not hold is large
    state_effective_rank  mean over heads of exp(entropy of the normalized singular values) of the last state
                          S [K, V] (Roy and Vetterli, 2007): 1 if all queries get the same answer, at most
                          min(K, V)
    saturated_exponents   share of tokens and heads whose exponent is within 2 % of an end of its range, where
                          the norm of a query does nothing; only for norm-aware maps

    Padding is left out. The model runs once, in the mode it is in, without a cache.
    """
    seen: list[tuple[LlmNormLinearAttention, Tensor, LinearInputs]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((module, args[0], kwargs["linear_inputs"]))

    # By what it can do, not by its class: a checkpoint loaded with its own code has classes of its own.
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "exponent_range")]
    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer.layer_idx: _health(layer, z, told) for layer, z, told in seen}


def _health(layer: LlmNormLinearAttention, z: Tensor, told: LinearInputs) -> dict[str, float]:
    q, k, v, exponents = layer.project(z, told)
    # Denominators are sums of unrotated features, whatever the rotary option.
    ones = v.new_ones((*v.shape[:3], 1), dtype=k.dtype)
    denominators, _ = chunked_sum(q, k, ones, None, told.segments)
    o, state = layer.attend(q, k, v, None, told)
    real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    if told.padding is not None:
        real = told.padding != 0
    numbers = {
        "smallest_denominator": _at(denominators, real).min().item(),
        "output_to_value": (_rms(_at(o, real)) / _rms(_at(v, real))).item(),
        "state_effective_rank": effective_rank(state[..., :-1]).mean().item(),
    }
    if exponents is not None:
        low, high = layer.exponent_range()
        margin = SATURATED * (high - low)
        p = _at(exponents, real)
        ends = (p < low + margin) | (p > high - margin)
        numbers["saturated_exponents"] = ends.float().mean().item()
    return numbers


def _at(x: Tensor, real: Tensor) -> Tensor:
    """The rows of x [B, H, T, F] at tokens that are not padding."""
    return x.transpose(1, 2)[real].float()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def effective_rank(matrices: Tensor) -> Tensor:
    """exp(-sum_i p_i log p_i), p_i = s_i / sum_j s_j, of the singular values of [..., m, n]; 0 for a zero
    matrix.
    """
    singular = torch.linalg.svdvals(matrices.float())
    total = singular.sum(-1, keepdim=True)
    shares = singular / total.clamp_min(torch.finfo(torch.float32).tiny)
    entropy = -(shares * shares.clamp_min(torch.finfo(torch.float32).tiny).log()).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)
