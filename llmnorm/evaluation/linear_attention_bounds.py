"""Bounds of normalized linear attention, where there is one.

    o_i = sum_j w_ij v_j / (sum_j w_ij + eps),   w_ij = phi(q_i) . phi(k_j) + c^2

With phi = ReLU and a floor c > 0 every weight is at least c^2, so that log w_ij has slope at most (L_q B_k +
B_q L_k) / c^2. The weights over their sum, eps among them with the value 0, are convex, and then all is as
for softmax with dS_ij = dw_ij / w_ij (`lipschitz_bounds`): whatever the number of tokens,

    L_h = L_v + (L_q B_k + B_q L_k) B_v / c^2

There is no bound without a floor (the normalizer may come near 0), with rotary positions on the features
(weights of either sign), and for norm-aware features (NaLaFormer), which turn with q / ||q|| and so jump at
q = 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmnorm.evaluation.lipschitz_bounds import ACTIVATIONS, Bound, NoCertificate, head_slope, joined
from llmnorm.evaluation.module_bounds import (
    Matrices,
    Part,
    head_maps,
    linear_bound,
    norm_bound,
    output_blocks,
    weight_of,
)
from llmnorm.evaluation.singular_values import largest_singular_value
from llmnorm.modeling.linear_mixers import LlmNormLinearAttention

SILU = ACTIVATIONS["silu"]


def linear_attention_bound(attention: LlmNormLinearAttention, radius: float, name: str, turn: float) -> Part:
    """Linear attention behind z, ||z_t||_2 <= radius. turn: factor of rotary positions on lengths."""
    _check(attention, name)
    d, options = attention.head_dim, attention.options
    turn = turn if options["rope"] == "before" else 1.0
    queries, keys, values = (
        head_maps(
            getattr(attention, f"{s}_proj"), getattr(attention, f"{s}_norm"), d, radius, f"{name}.{s}_proj"
        )
        for s in "qkv"
    )
    bounds = [*queries.bounds, *keys.bounds, *values.bounds]
    if attention.convolution is not None:
        taps = _taps(attention.convolution.weight, d)
        bounds = [
            Bound(SILU.slope * tap * b.lipschitz, tap * b.radius) for tap, b in zip(taps, bounds, strict=True)
        ]
    q, k = bounds[: len(queries.bounds)], bounds[len(queries.bounds) : -len(values.bounds)]
    v = bounds[-len(values.bounds) :]
    q, k = ([Bound(turn * b.lipschitz, turn * b.radius) for b in side] for side in (q, k))
    kernels = [0.0] * len(v)
    if attention.value_convolution is not None:
        kernels = _taps(attention.value_convolution.weight, d)

    repeats = len(q) // len(v)
    heads = []
    for head, query in enumerate(q):
        group = head // repeats
        key, value, kernel = k[group], v[group], kernels[group]
        slope = head_slope(value.lipschitz, value.radius, query, key, options["floor"] ** -2)
        heads.append(Bound(slope + kernel * value.lipschitz, (1 + kernel) * value.radius))
    matrices: Matrices = {}
    for side, maps in zip("qkv", (queries, keys, values), strict=True):
        _, shown = linear_bound(getattr(attention, f"{side}_proj"), f"{name}.{side}_proj")
        matrices[f"{side}_proj"] = {**shown, "heads": maps.sigmas}
    heads = _gated(attention, heads, radius, name, matrices)
    output, matrices["o_proj"], blocks = output_blocks(attention.o_proj, d, f"{name}.o_proj")
    bound = Bound(
        joined([head.lipschitz for head in heads], output.sigma, blocks),
        joined([head.radius for head in heads], output.sigma, blocks) + output.bias,
    )
    matrices["heads"] = {"lipschitz": [head.lipschitz for head in heads]}
    return Part(bound, matrices)


def _check(attention: LlmNormLinearAttention, name: str) -> None:
    """NoCertificate for the options that have none."""
    where = f"no Lipschitz certificate: {name} is {attention.name} attention"
    if attention.map.norm_aware:
        raise NoCertificate(
            f"{where} with feature_map={attention.options['feature_map']}, whose query features turn with "
            "q / ||q|| and jump at q = 0; use attention_options.feature_map=relu, or softmax."
        )
    if not attention.options["floor"]:
        raise NoCertificate(
            f"{where} with floor=0, so its normalizer may come near 0; set attention_options.floor above 0."
        )
    if attention.options["rope"] == "after":
        raise NoCertificate(
            f"{where} with rope=after, whose weights may be negative while its normalizer comes near 0; set "
            "attention_options.rope to before or none."
        )
    for norm in ("key_norm", "output_norm"):
        norm_bound(getattr(attention, norm), 1.0, f"{name}.{norm}", f"attention_options.{norm}=false")


def _taps(weight: Tensor, head_dim: int) -> list[float]:
    """For each head, sum_i max_c |w_ci| of a convolution over tokens, weight [channels, taps]."""
    return weight.detach().double().abs().unflatten(0, (-1, head_dim)).amax(1).sum(-1).tolist()


def _gated(
    attention: LlmNormLinearAttention, heads: list[Bound], radius: float, name: str, matrices: Matrices
) -> list[Bound]:
    """y * SiLU(W_g z + b): |y_i| is at most ||y||."""
    if attention.g_proj is None:
        return heads
    gate, shown = linear_bound(attention.g_proj, f"{name}.g_proj")
    blocks = weight_of(attention.g_proj, f"{name}.g_proj").unflatten(0, (len(heads), -1))
    sigmas: Any = largest_singular_value(blocks).tolist()
    matrices["g_proj"] = {**shown, "heads": sigmas}
    largest = SILU.largest(gate.entry(radius))
    return [
        Bound(head.lipschitz * largest + head.radius * SILU.slope * sigma, head.radius * largest)
        for head, sigma in zip(heads, sigmas, strict=True)
    ]
