"""Bounds of the modules of a model, from their weights as they are: norms, attention, MLPs.

A module that has no row in a table here has no bound; a subclass computes something else and needs a row of
its own. The functions take the radius of the ball their input is in, max_t ||x_t||_2, and return what
`lipschitz_bounds` defines, with the norms of the matrices beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmnorm.evaluation.lipschitz_bounds import (
    ACTIVATIONS,
    Bound,
    Matrix,
    NoCertificate,
    composed,
    floor_norm,
    gated_mlp,
    head_slope,
    joined,
    plain_mlp,
    published_attention,
)
from llmnorm.evaluation.singular_values import ROUNDING, largest_row, largest_singular_value
from llmnorm.modeling.attention import LlmNormAttention
from llmnorm.modeling.dynamic_tanh import DynamicTanh, LearnedEmbeddingScale
from llmnorm.modeling.equation import identity
from llmnorm.modeling.hypersphere import UnitNorm, WidthScale
from llmnorm.modeling.lipschitz import FloorNorm, WidthFloorNorm
from llmnorm.modeling.mlp import LlmNormMLP, LlmNormPlainMLP
from llmnorm.modeling.norms import Centering, ChannelAffine, CompressedRMS, ScaleNorm
from llmnorm.modeling.parametrized_linear import ParametrizedLinear, SpectralLinear
from llmnorm.modeling.power_norms import PowerNorm, UnifiedNorm
from llmnorm.modeling.prepbn import PRepBN
from llmnorm.modeling.quantization import QuantizedLinear, quantized_weight

Matrices = dict[str, dict[str, Any]]

FLOOR_REMEDY = (
    "a placement with norm_options.norm_type=floor_rmsnorm, such as norm=qk_norm, or "
    "model.architecture=lipschitz"
)
STATISTICS_REMEDY = "`llmnorm export --format folded`, which folds the norms into the weights"


class Part(NamedTuple):
    """A bound and the norms of the matrices it comes from."""

    bound: Bound
    matrices: Matrices


def _largest(x: Tensor) -> float:
    return float(x.detach().double().abs().max())


def _length(x: Tensor | None) -> float:
    return 0.0 if x is None else float(torch.linalg.vector_norm(x.detach().double())) * (1 + ROUNDING)


def _floor(norm: Any, radius: float) -> Bound:
    return floor_norm(radius, norm.weight.shape[0], norm.floor, abs(norm.scale) * _largest(norm.weight))


def _dynamic_tanh(norm: Any, radius: float) -> Bound:
    slope = _largest(norm.alpha) * _largest(norm.weight)
    return Bound(slope, min(_length(norm.weight), slope * radius))


def _affine(norm: Any, radius: float) -> Bound:
    slope = _largest(norm.weight)
    return Bound(slope, slope * radius + _length(norm.bias))


def _scaled(scale: float, radius: float) -> Bound:
    return Bound(scale, scale * radius)


# norm -> its bound from (norm, radius)
NORM_BOUNDS: dict[type, Callable[[Any, float], Bound]] = {
    FloorNorm: _floor,
    WidthFloorNorm: _floor,
    DynamicTanh: _dynamic_tanh,
    ChannelAffine: _affine,
    LearnedEmbeddingScale: lambda norm, radius: _scaled(_largest(norm.scale), radius),
    WidthScale: lambda norm, radius: _scaled(norm.scale, radius),
    Centering: lambda norm, radius: _scaled(1.0, radius),
    nn.Identity: lambda norm, radius: _scaled(1.0, radius),
}
# norm -> why there is no bound, and what has one
UNBOUNDED_NORMS: dict[type, tuple[str, str]] = {
    ScaleNorm: ("x / max(||x||, eps) has slope 1/eps at 0", FLOOR_REMEDY),
    UnitNorm: ("x / max(||x||, eps) has slope 1/eps at 0", FLOOR_REMEDY),
    CompressedRMS: ("x / sqrt(mean(x^2) + eps) has slope 1/sqrt(eps) at 0", FLOOR_REMEDY),
    PowerNorm: ("its running statistics are not a bound", STATISTICS_REMEDY),
    UnifiedNorm: ("its running statistics are not a bound", STATISTICS_REMEDY),
    PRepBN: ("its running statistics are not a bound", STATISTICS_REMEDY),
}


def norm_bound(norm: Any, radius: float, name: str, remedy: str = FLOOR_REMEDY) -> Bound:
    """The bound of a norm, or of the identity where there is none; NoCertificate with `name`, the reason and
    the remedy.
    """
    if norm is identity:
        return _scaled(1.0, radius)
    if type(norm) in NORM_BOUNDS:
        return NORM_BOUNDS[type(norm)](norm, radius)
    if type(norm) in UNBOUNDED_NORMS:
        reason, remedy = UNBOUNDED_NORMS[type(norm)]
    elif getattr(norm, "eps", 0.0) > 0:
        reason = (
            f"it divides by sqrt(variance + eps), whose slope near 0 is {norm.eps**-0.5:.0f} (1/sqrt(eps))"
        )
    else:
        reason = "no bound of it is known"
    raise NoCertificate(
        f"no Lipschitz certificate: {name} is a {type(norm).__name__}, and {reason}; use {remedy}."
    )


def weight_of(linear: Any, name: str) -> Tensor:
    """The matrix that a linear layer multiplies with; NoCertificate where there is none."""
    if type(linear) is nn.Linear:
        return linear.weight.detach()
    if type(linear) in (ParametrizedLinear, SpectralLinear):
        return linear.effective_weight().detach()
    if type(linear) is QuantizedLinear:
        if linear.quantization.activations is not None:
            raise NoCertificate(
                f"no Lipschitz certificate: {name} rounds its inputs to 4 bits, a step function without a "
                "slope; certify the export of `llmnorm export --dequantize`, or set "
                "quantization.activations=none."
            )
        return quantized_weight(linear.weight.detach(), linear.quantization, linear.weight.dtype)
    raise NoCertificate(
        f"no Lipschitz certificate: {name} is a {type(linear).__name__}, of which no bound is known; use "
        "plain linear layers."
    )


def linear_bound(linear: Any, name: str) -> tuple[Matrix, dict[str, Any]]:
    """Its numbers, and the same for the certificate: s_1 and sqrt(in/out) s_1."""
    weight, bias = weight_of(linear, name), linear.bias
    sigma = float(largest_singular_value(weight))
    shown = {"sigma": sigma, "rms_to_rms": sigma * math.sqrt(weight.shape[1] / weight.shape[0])}
    numbers = Matrix(sigma, largest_row(weight), _length(bias), 0.0 if bias is None else _largest(bias))
    return numbers, shown


class Heads(NamedTuple):
    """Bound and spread of each head's map z -> q, k or v; lists over heads."""

    bounds: list[Bound]
    spreads: list[float]
    sigmas: list[float]


def head_maps(linear: Any, norm: Any, head_dim: int, radius: float, name: str, turn: float = 1.0) -> Heads:
    """turn: what rotary positions multiply lengths with."""
    weight = weight_of(linear, name)
    blocks = weight.unflatten(0, (-1, head_dim))
    sigmas = largest_singular_value(blocks).tolist()
    biases = [0.0] * len(sigmas)
    if linear.bias is not None:
        biases = [_length(bias) for bias in linear.bias.unflatten(0, (-1, head_dim))]
    bounds = [Bound(sigma, sigma * radius + bias) for sigma, bias in zip(sigmas, biases, strict=True)]
    if norm is identity:
        # What values have in common, the bias, drops out of differences between tokens.
        spreads = [sigma * radius for sigma in sigmas]
    elif type(norm) is WidthFloorNorm:
        whole = Bound(float(largest_singular_value(weight)), 0.0)
        reach = whole.lipschitz * radius + _length(linear.bias)
        over = composed(whole, _floor(norm, reach))
        bounds = [over] * len(sigmas)
        spreads = [over.radius] * len(sigmas)
    else:
        bounds = [composed(b, norm_bound(norm, b.radius, name.replace("_proj", "_norm"))) for b in bounds]
        spreads = [b.radius for b in bounds]
    bounds = [Bound(turn * b.lipschitz, turn * b.radius) for b in bounds]
    return Heads(bounds, spreads, sigmas)


def output_blocks(linear: Any, head_dim: int, name: str) -> tuple[Matrix, dict[str, Any], list[float]]:
    numbers, shown = linear_bound(linear, name)
    blocks = weight_of(linear, name).unflatten(1, (-1, head_dim)).transpose(0, 1)
    sigmas = largest_singular_value(blocks).tolist()
    return numbers, {**shown, "heads": sigmas}, sigmas


def _normalized(
    attention: LlmNormAttention,
    value: Bound,
    spread: float,
    query: Bound,
    key: Bound,
    scale: float,
    length: int,
) -> Bound:
    """One head behind its normalizer, an option of softmax attention."""
    kind = attention.config.attention_options_of("softmax")["normalizer"]
    if kind == "sigmoid":
        # Weights sigma(s - ln n) of n keys sum to at most n / (1 + n exp(-max|s|)), and their relative slopes
        # are below 1.
        largest = scale * query.radius * key.radius
        mass = length / (1 + length * math.exp(-largest))
        slope = head_slope(value.lipschitz, value.radius, query, key, scale)
        return Bound(mass * slope, mass * value.radius)
    # off_by_one has one more key, of value 0, which no bias shares.
    spread = value.radius if kind == "off_by_one" else spread
    return Bound(head_slope(value.lipschitz, spread, query, key, scale), value.radius)


def attention_bound(
    attention: LlmNormAttention, radius: float, name: str, turn: float, formula: str, length: int
) -> Part:
    """Softmax attention behind z, ||z_t||_2 <= radius. turn: factor of rotary positions on lengths."""
    if attention.query_scale is not identity:
        raise NoCertificate(
            f"no Lipschitz certificate: {name} puts queries and keys on the unit sphere (norm=ngpt), and "
            f"x / ||x|| has slope 1/eps at 0; use {FLOOR_REMEDY}."
        )
    d = attention.head_dim
    sides = {
        side: head_maps(
            getattr(attention, f"{side}_proj"),
            getattr(attention, f"{side}_norm"),
            d,
            radius,
            f"{name}.{side}_proj",
            1.0 if side == "v" else turn,
        )
        for side in "qkv"
    }
    output, shown_output, blocks = output_blocks(attention.o_proj, d, f"{name}.o_proj")
    matrices: Matrices = {}
    for side in "qkv":
        _, shown = linear_bound(getattr(attention, f"{side}_proj"), f"{name}.{side}_proj")
        matrices[f"{side}_proj"] = {**shown, "heads": sides[side].sigmas}
    matrices["o_proj"] = shown_output
    factor = attention.output_factor
    if formula == "published":
        return Part(_published(attention, radius, matrices, turn, name), matrices)
    heads = []
    for head, query in enumerate(sides["q"].bounds):
        group = head // attention.num_key_value_groups
        heads.append(
            _normalized(
                attention,
                sides["v"].bounds[group],
                sides["v"].spreads[group],
                query,
                sides["k"].bounds[group],
                attention.scaling,
                length,
            )
        )
    heads = _gated(attention, heads, radius, name, matrices)
    bound = Bound(
        factor * joined([head.lipschitz for head in heads], output.sigma, blocks),
        factor * joined([head.radius for head in heads], output.sigma, blocks) + output.bias,
    )
    matrices["heads"] = {"lipschitz": [head.lipschitz for head in heads]}
    return Part(bound, matrices)


def _gated(
    attention: LlmNormAttention, heads: list[Bound], radius: float, name: str, matrices: Matrices
) -> list[Bound]:
    """y * sigma(W z): slopes of the sigmoid are at most 1/4 and its values below 1."""
    if attention.gate is None:
        return heads
    blocks = attention.gate.weight.detach().unflatten(0, (len(heads), -1))
    sigmas = largest_singular_value(blocks).tolist()
    matrices["gate"] = {
        "sigma": float(largest_singular_value(attention.gate.weight.detach())),
        "heads": sigmas,
    }
    return [
        Bound(head.lipschitz + head.radius * sigma / 4, head.radius)
        for head, sigma in zip(heads, sigmas, strict=True)
    ]


def _published(
    attention: LlmNormAttention, radius: float, matrices: Matrices, turn: float, name: str
) -> Bound:
    """The recursion as published, in root mean square; the caller labels it."""
    plain = attention.q_norm is identity and attention.k_norm is identity and attention.v_norm is identity
    if not plain or attention.normalizer is not None or attention.gate is not None:
        raise NoCertificate(
            f"formula=published is not defined for {name}, which has norms, a gate or another normalizer in "
            "its attention; use the formula per_head."
        )
    q, k, v, o = (matrices[f"{side}_proj"]["rms_to_rms"] for side in "qkvo")
    width = attention.q_proj.in_features
    scale = attention.scaling * attention.head_dim * turn * turn
    bound = published_attention(q, k, v, o, scale, radius / math.sqrt(width), attention.output_factor)
    return Bound(bound.lipschitz, bound.radius * math.sqrt(width))


def mlp_bound(mlp: Any, config: Any, radius: float, name: str) -> Part:
    """The MLP behind z, ||z_t||_2 <= radius; see `MLP_BOUNDS`."""
    if type(mlp) not in MLP_BOUNDS:
        raise NoCertificate(
            f"no Lipschitz certificate: {name} is a {type(mlp).__name__}, of which no bound is known; use "
            "mlp=plain or mlp=gated."
        )
    if config.hidden_act not in ACTIVATIONS:
        raise NoCertificate(
            f"no Lipschitz certificate: no slope is known of hidden_act={config.hidden_act} in {name}; use "
            f"one of {', '.join(ACTIVATIONS)}."
        )
    return MLP_BOUNDS[type(mlp)](mlp, config, radius, name)


def _matrices(mlp: Any, names: tuple[str, ...], name: str) -> tuple[list[Matrix], Matrices]:
    found = {part: linear_bound(getattr(mlp, part), f"{name}.{part}") for part in names}
    return [numbers for numbers, _ in found.values()], {part: shown for part, (_, shown) in found.items()}


def _gated_mlp(mlp: LlmNormMLP, config: Any, radius: float, name: str) -> Part:
    (gate, up, down), shown = _matrices(mlp, ("gate_proj", "up_proj", "down_proj"), name)
    clip = config.mlp_options["clip"] or math.inf
    activation, width = ACTIVATIONS[config.hidden_act], mlp.up_proj.out_features
    return Part(gated_mlp(radius, gate, up, down, activation, width, clip), shown)


def _plain_mlp(mlp: LlmNormPlainMLP, config: Any, radius: float, name: str) -> Part:
    activation = ACTIVATIONS[config.hidden_act]
    (first, second), shown = _matrices(mlp, ("up_proj", "down_proj"), name)
    if not activation.contracts:
        raise NoCertificate(
            f"no Lipschitz certificate: the activation of {name} is not 0 at 0, which its bound needs; use "
            "hidden_act=gelu."
        )
    return Part(plain_mlp(radius, first, second, activation, 1 / mlp.slope), shown)


MLP_BOUNDS: dict[type, Callable[[Any, Any, float, str], Part]] = {
    LlmNormMLP: _gated_mlp,
    LlmNormPlainMLP: _plain_mlp,
}
