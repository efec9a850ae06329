"""What one layer's attention costs for each token: multiply-adds, bytes kept, by kind of attention.

With q = heads * head_dim, k = key-value heads * head_dim, H heads, G key-value heads, D = head_dim and c the
bytes of a number in the matrix products.

    softmax   T / 2 others on average, 2 q multiply-adds each; keeps q, k, v and output, 2 c (q + k), and the
              log-sum-exp, 4 H
    linear    K features of a head and W = D + 1 values, ones included: inside a chunk of C tokens (C / 2) H
              (K + W), for the state H K W to read and G K W to write, whatever T is

What a linear layer keeps is counted part by part in `_linear_bytes`, fp32 where it computes in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llmnorm.modeling import LlmNormConfig
from llmnorm.modeling.feature_maps import FEATURE_MAPS


class AttentionCost(NamedTuple):
    """Of one layer, for each token.

    weights: numbers in its matrices. multiply_adds: beside the matrices, forward. kept: bytes for the
    backward pass, without the layer's input. products: what selective checkpointing keeps of them.
    readers: matrices that read the input.
    """

    weights: int
    multiply_adds: int
    kept: int
    products: int
    readers: int


def attention_cost(
    config: LlmNormConfig, name: str, sequence_length: int, product_bytes: int
) -> AttentionCost:
    """The cost of attention `name` in a model of this config; product_bytes: of a number in products."""
    counted = _softmax_cost if name == "softmax" else _linear_cost
    return counted(config, config.attention_options_of(name), sequence_length, product_bytes)


def _sizes(config: LlmNormConfig) -> tuple[int, int, int, int]:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    return heads, groups, heads * config.head_dim, groups * config.head_dim


def _softmax_cost(
    config: LlmNormConfig, options: dict[str, Any], sequence_length: int, c: int
) -> AttentionCost:
    heads, _, q, k = _sizes(config)
    gate = {"none": 0, "head": heads, "elementwise": q}[options["gate"]]
    kept = 2 * c * (q + k) + 4 * heads
    if gate:
        kept += c * gate + c * q  # the gate after its sigmoid, and the gated output
    return AttentionCost(
        weights=config.stream_width * (2 * q + 2 * k + gate),
        multiply_adds=q * sequence_length,
        kept=kept,
        products=c * (2 * q + 2 * k + gate) + 4 * heads,
        readers=3 + (gate > 0),
    )


def _linear_cost(
    config: LlmNormConfig, options: dict[str, Any], sequence_length: int, c: int
) -> AttentionCost:
    heads, groups, q, k = _sizes(config)
    feature_map = FEATURE_MAPS[options.get("feature_map", "relu")]
    features = feature_map.widening * config.head_dim + (options["floor"] > 0)
    values = config.head_dim + 1
    chunk = min(options["chunk_size"], sequence_length)
    gate = q if options["gate"] else 0
    return AttentionCost(
        weights=config.stream_width * (2 * q + 2 * k + gate),
        multiply_adds=heads * (features + values) * chunk // 2 + (heads + groups) * features * values,
        kept=_linear_bytes(config, options, c, features),
        products=c * (q + 2 * k + gate),
        readers=3 + (gate > 0),
    )


def _linear_bytes(config: LlmNormConfig, options: dict[str, Any], c: int, features: int) -> int:
    heads, groups, q, k = _sizes(config)
    norm_aware = FEATURE_MAPS[options.get("feature_map", "relu")].norm_aware
    kept = 0
    if options["short_convolution"]:
        # Its input and its output; after SiLU q, k and v are views of one tensor, which any of them keeps.
        kept += 2 * c * (q + 2 * k)
        kept += c * (q + 2 * k) if options["key_norm"] or c == 4 else 0
        kept += 4 * (q + k) if c == 2 else 4 * k * options["key_norm"]  # what the maps read, in fp32
    else:
        kept += c * k * options["key_norm"] + 4 * (q + k)
    if norm_aware:
        kept += 5 * 4 * heads  # lengths, scaled and shifted, their tanh, the exponents before and after
    kept += 4 * (heads + groups) * features + 4 * groups * (config.head_dim + 1)
    kept += 4 * heads * (config.head_dim + 2)  # sums, and their denominators with eps
    if options["value_convolution"]:
        kept += c * k
    if options["output_norm"]:
        kept += c * q
    if options["gate"]:
        kept += 3 * c * q  # W_g z, SiLU of it, and what it multiplies
    return kept + c * q  # the input of W_o
