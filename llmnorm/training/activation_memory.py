"""Bytes of activations, from the shapes alone.

Per token and layer the forward pass keeps for the backward pass, with d = hidden_size, f = intermediate_size,
q = heads * head_dim, k = key-value heads * head_dim, H heads, and c and r the bytes of a number in the matrix
products and in the residual stream:

    norms        sum over norms of r d + 4       its input and one statistic (two for LayerNorm)
    attention    n_a c d + 2 c (q + k) + 4 H     input of q, k, v; q, k, v and output; log-sum-exp per head
                                                 (of linear attention see attention_cost.py)
    MLP          n_m c d + 4 c f                 input of gate and up; gate, act(gate), up and their product
    plain MLP    c d + 2 c f                     input of up; up and its activation

n_a = 3 (4 with a gate) and n_m = 2 under autocast with a fp32 stream, which is cast again for each matrix
that reads it; otherwise 1. With 4-bit activations the inputs of the seven projections are kept in p bytes a
number instead, those of o and down included: p (d + q) for attention, p (d + f) + 3 c f for the MLP. After
the layers come the final norm, the head's input c d, and fp32 log-probabilities 4 V.
Checkpointing keeps less in the layers:

    none         L layers
    selective    L (r d + c (2 q + 2 k + 2 d + 2 f) + 4 H): layer inputs, matrix products (of a
                 plain MLP 1 f), attention outputs
    full         L r d: layer inputs

The most that is held at once is the larger of two moments: around the loss, when two more fp32 tensors of V
numbers per token exist, and in the backward pass of a recomputed layer, when all of that layer is back
together with about 2 c f + 2 r d of gradients, and 14 f where 4-bit activations are packed, and the layers
after it have let go of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from llmnorm.modeling import LlmNormConfig
from llmnorm.modeling.equation import Layer, Sublayer
from llmnorm.modeling.mlp import MLP_MATRICES
from llmnorm.modeling.norms import Settings, make_norm
from llmnorm.modeling.parametrized_linear import ParametrizedLinear
from llmnorm.modeling.plugin_norms import is_plugin
from llmnorm.modeling.quantization import quantization_of
from llmnorm.modeling.residual import residual_plan
from llmnorm.modeling.zero_mean import aligned
from llmnorm.training.attention_cost import attention_cost

STATISTIC_BYTES = {
    "rmsnorm": 4,
    "layernorm": 8,
    "crmsnorm": 4,
    "shifted_rmsnorm": 4,
    "scalenorm": 4,
    "dyt": 0,
    "unit": 4,
    "affine": 0,
    # Statistics of a batch are one number per feature, not per token.
    "powernorm": 0,
    "unified_norm": 0,
    "prepbn": 4,
}
# Numbers per token and unit of intermediate_size that an MLP keeps beside the input of its last matrix.
KEPT_INSIDE = {"gated": 3, "plain": 1}
# Bytes per number that packing a matrix's input into 4 bits and unpacking it again takes for a moment.
UNPACKING = 14


@dataclass(frozen=True)
class Arithmetic:
    """Bytes of a number in the matrix products and in the residual stream, and whether autocast is on."""

    product_bytes: int
    stream_bytes: int
    autocast: bool

    @property
    def casts_every_read(self) -> bool:
        """Autocast casts a stream of another dtype again for each matrix that reads it."""
        return self.autocast and self.stream_bytes != self.product_bytes


def arithmetic(config: LlmNormConfig, precision: str) -> Arithmetic:
    """The dtypes that `train.precision` and `model.residual_dtype` come to."""
    products = 4 if precision == "fp32" else 2
    followed = 2 if precision == "bf16_pure" else 4
    stream = {None: followed, "fp32": 4, "bf16": 2}[config.residual_dtype]
    return Arithmetic(products, stream, autocast=precision == "bf16")


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of activations per token.

    `layers` (by checkpointing mode) and `outside` (final norm, head, loss) are kept from the forward to the
    backward pass; `recomputed` is what the worst layer's backward pass adds to `layers`, and `loss` what the
    loss adds.
    """

    layers: dict[str, int]
    outside: int
    recomputed: dict[str, int]
    loss: int

    def kept(self, mode: str) -> int:
        """Bytes per token after a forward pass under checkpointing `mode`."""
        return self.layers[mode] + self.outside

    def peak(self, mode: str) -> int:
        """Bytes per token at the worst moment of a forward and backward pass."""
        return self.layers[mode] + max(self.outside + self.loss, self.recomputed[mode])


def activation_bytes(config: LlmNormConfig, precision: str) -> ActivationBytes:
    """The formula of this module's docstring, with softmax attention under SDPA."""
    numbers = arithmetic(config, precision)
    c, r = numbers.product_bytes, numbers.stream_bytes
    d = aligned(config.stream_width) if config.is_compressed else config.hidden_size
    f = config.intermediate_size
    costs = [attention_cost(config, name, 1, c) for name in config.layer_attentions]
    plan = residual_plan(config.norm, config.norm_options, config.num_hidden_layers)
    inside, readers = KEPT_INSIDE[config.mlp], MLP_MATRICES[config.mlp] - 1
    if config.mlp_options.get("clip") is not None:
        inside += readers  # gate and up before and after the cut
    blocks, selective = [], []
    for cost, layer in zip(costs, plan.layers, strict=True):
        inputs = _input_bytes(config, numbers, cost.readers, d)
        blocks.append(inputs + cost.kept + inside * c * f + _norm_bytes(layer, r, d))
        selective.append(r * d + cost.products + c * (2 * d + readers * f))
    final = _kept(plan.final_norm, plan.final_norm_settings, r, d) if plan.final_norm else 0
    kept = {"selective": selective, "full": [r * d] * len(blocks)}
    gradients = 2 * c * f + 2 * r * d + (UNPACKING * f if config.quantization is not None else 0)
    return ActivationBytes(
        layers={"none": sum(blocks)} | {mode: sum(each) for mode, each in kept.items()},
        outside=final + c * d + 4 * config.vocab_size,
        recomputed={"none": 0} | {mode: _largest(blocks, each) + gradients for mode, each in kept.items()},
        loss=8 * config.vocab_size,
    )


def matrix_bytes(model: nn.Module, precision: str, gathered: bool) -> dict[str, int]:
    """Bytes, by checkpointing mode, of what a `weight_parametrization` keeps for the backward pass.

    These are the matrix that multiplies, fp32 ones between W and it, one more where rows are centered, and of
    W in 16 bits (also where FSDP2 has gathered it so) one in fp32. Under autocast the first is the copy that
    weights have anyway. Recomputed layers keep those of one layer.
    """
    treated = [module for module in model.modules() if isinstance(module, ParametrizedLinear)]
    if not treated:
        return dict.fromkeys(("none", "selective", "full"), 0)
    steps, layers = treated[0].steps, model.config.num_hidden_layers  # type: ignore[union-attr]
    between = len(steps) - 1 + sum(step["name"] == "weight_standardization" for step in steps)
    narrow = precision == "bf16_pure" or (precision == "bf16" and gathered)
    each = 4 * between + {"fp32": 4, "bf16": 0, "bf16_pure": 2}[precision] + (4 if narrow else 0)
    kept = each * sum(module.weight.numel() for module in treated)
    return {"none": kept, "selective": kept // layers, "full": kept // layers}


def _largest(blocks: list[int], kept: list[int]) -> int:
    """The most that one layer computes again, less what the layers after it have let go of by then."""
    each = enumerate(zip(blocks, kept, strict=True))
    return max(block - few - sum(kept[depth + 1 :]) for depth, (block, few) in each)


def _input_bytes(config: LlmNormConfig, numbers: Arithmetic, attention_readers: int, d: int) -> int:
    """Bytes per token of what the projections of a layer read; attention's output is counted by itself where
    it is not packed."""
    c, f = numbers.product_bytes, config.intermediate_size
    quantizer = None if config.quantization is None else quantization_of(config.quantization).activations
    if quantizer is None:
        readers = attention_readers + MLP_MATRICES[config.mlp] - 1 if numbers.casts_every_read else 2
        return readers * c * d + c * f
    packed = 2 * d + config.num_attention_heads * config.head_dim + f
    return round(packed * quantizer.bits(c) / 8)


def _norm_bytes(layer: Layer, stream_bytes: int, hidden_size: int) -> int:
    return sum(
        _kept(kind, sublayer.norm_settings, stream_bytes, hidden_size)
        for sublayer in (layer.attention, layer.mlp)
        for kind in _norms(sublayer)
    )


def _kept(kind: str, settings: Settings, stream_bytes: int, hidden_size: int) -> int:
    """Bytes per token that a norm keeps for its backward: its input, and statistics."""
    if is_plugin(kind) or kind not in STATISTIC_BYTES:
        return _measured(kind, settings, stream_bytes, hidden_size)
    return stream_bytes * hidden_size + STATISTIC_BYTES[kind]


@cache
def _measured(kind: str, settings: Settings, stream_bytes: int, hidden_size: int) -> int:
    """What autograd saves for two tokens more, whatever it saves for none."""
    norm = make_norm(kind, hidden_size, 1e-6, settings=settings)
    dtype = torch.bfloat16 if stream_bytes == 2 else torch.float32

    def saved_for(tokens: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = torch.ones(1, tokens, hidden_size, dtype=dtype, device="cpu", requires_grad=True)
            kept = norm(x)  # while it lives, no two of its tensors share an address
            del kept
        return sum(sizes.values())

    return (saved_for(4) - saved_for(2)) // 2


def _norms(sublayer: Sublayer) -> list[str]:
    return [kind for kind in (sublayer.norm_in, sublayer.norm_out, sublayer.norm_post) if kind is not None]
