"""Linear layers whose operands have 4 bits in the forward pass.

    Y = Xq Wq^T,   dX = dY Wq,   dW = dY^T Xq        Xq = Q(X), Wq = Q(W), gradients straight through Q

Q works on groups of `group_size` numbers along the inputs of a layer, each with its scale s:

    int4 of activations   q = round(x / s), s = max|x| / 7                    15 levels
    int4 of weights       q = round(w / s) + z, s = (max - min) / 15          16 levels, zero point z
    fp4                   the nearest of s {0, .5, 1, 1.5, 2, 3, 4, 6}, s = max|x| / 6   (E2M1)
    released fp4          q = round(4 x / s), s = max|x|                      9 levels, uniform

Of each group of activations the two largest magnitudes are kept as they are and set no scale. Between forward
and backward X is kept as Xq in codes of 4 bits with its scales and outliers, so that the memory is really
saved: 4 + (16 + 2 * 24) / group_size bits for a bf16 number. Layers that read the same X share it. Wq is
computed again in the backward pass. Master weights, gradients and everything but the seven projections of a
layer stay as they are.

`rounding: stochastic` puts floor(x / s + u) for round(x / s), on magnitudes but for asymmetric weights, with
u in [0, 1) a hash of (seed, layer and operand, update, place): right on average, and the same when a layer is
computed again or a run goes on. Only training does it; evaluation and exports round to nearest. The loop says
which update it is, `set_rounding_clock(model, seed, step)`.

Stable-SPAM (arXiv 2502.17055) trains so. `parity: released` repeats its code: groups run through the
flattened tensor, its "FP4" is a uniform grid with two outliers, for weights too, and int4 weights are
asymmetric.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .configuration_llmnorm import LlmNormConfig

PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# What reads one and the same input, and therefore its codes.
READERS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
FORMATS = ("int4", "fp4", "none")
ROUNDINGS = ("nearest", "stochastic")
OUTLIERS = 2
LARGEST_GROUP = 256  # an outlier's place in its group is one byte
DEFAULTS: dict[str, Any] = {
    "weights": "int4",
    "activations": "int4",
    "group_size": 128,
    "parity": None,
    "rounding": "nearest",
}

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Codes(NamedTuple):
    """A tensor in 4 bits: codes two to a byte (..., group_size / 2), the rest one or two per group."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    places: Tensor
    outliers: Tensor


@dataclass(frozen=True)
class Grid:
    """The levels of a group, as multiples of its scale: encode(x / s, u) is a code, decode(code) a level."""

    top: float  # what max|x| becomes
    encode: Callable[[Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor], Tensor]


def rounded(x: Tensor, noise: Tensor | None) -> Tensor:
    """The nearest integer, or floor(x + u)."""
    return torch.round(x) if noise is None else torch.floor(x + noise)


def uniform_noise(x: Tensor, key: tuple[int, int]) -> Tensor:
    """u in [0, 1) for each number of x: a hash of the key and its place, as in llmnorm_kernels."""

    def signed(word: int) -> int:
        return word - (1 << 32) if word >= 1 << 31 else word

    def mixed(word: Tensor) -> Tensor:  # int32 products wrap; >> keeps the sign, so it is masked away
        word = (word ^ ((word >> 16) & 0xFFFF)) * signed(0x7FEB352D)
        word = (word ^ ((word >> 15) & 0x1FFFF)) * signed(0x846CA68B)
        return word ^ ((word >> 16) & 0xFFFF)

    assert x.numel() < 1 << 31
    index = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
    word = mixed(mixed(index ^ signed(key[0])) ^ signed(key[1]))
    return (((word >> 8) & 0xFFFFFF).float() * 2.0**-24).view(x.shape)


def _encode_e2m1(x: Tensor, noise: Tensor | None) -> Tensor:
    a = x.abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    a = (rounded(a / step, noise) * step).clamp_max(6.0)
    level = torch.where(a < 2, 2 * a, torch.where(a < 4, a + 2, a / 2 + 4))
    return level + 8 * (x < 0)


def _decode_e2m1(code: Tensor) -> Tensor:
    levels = torch.tensor((*_E2M1, *(-level for level in _E2M1)), device=code.device)
    return levels[code.long()]


def _uniform(top: int) -> Grid:
    """2 top + 1 equidistant levels."""

    def encode(x: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:  # rounding to nearest is symmetric, and needs no magnitudes beside x
            return torch.round(x).clamp(-top, top) + 8
        return rounded(x.abs(), noise).clamp_max(top) * x.sign() + 8

    return Grid(float(top), encode, lambda code: code.float() - 8)


GRIDS = {"int4": _uniform(7), "fp4": Grid(6.0, _encode_e2m1, _decode_e2m1), "released_fp4": _uniform(4)}


@dataclass(frozen=True)
class Quantizer:
    """One operand's Q. `grid` is a key of GRIDS, or "asymmetric".

    `flat` groups run through all rows, the last one filled up with zeros; otherwise a group divides a row.
    """

    grid: str
    group_size: int
    outliers: int
    flat: bool = False

    def pack(self, x: Tensor, key: tuple[int, int] | None = None) -> Codes:
        """x (..., width) in 4 bits, rounded to nearest, or with a key at random.

        Scales and outliers have the dtype of x; a group of zeros stays zero.
        """
        groups = self._groups(x)
        noise = None if key is None else self._groups(uniform_noise(x, key))
        places = groups.abs().topk(self.outliers, dim=-1).indices
        outliers = groups.gather(-1, places)
        body = groups.scatter(-1, places, 0.0).float()
        if self.grid == "asymmetric":
            low, high = body.amin(-1, keepdim=True), body.amax(-1, keepdim=True)
            scale = ((high - low).clamp_min(1e-5) / 15).to(x.dtype)
            zero = (-torch.round(low / scale.float())).clamp(0, 15)
            codes = (rounded(body / scale.float(), noise) + zero).clamp(0, 15)
        else:
            grid = GRIDS[self.grid]
            scale = (body.abs().amax(-1, keepdim=True) / grid.top).to(x.dtype)
            zero = scale.new_empty(0)
            codes = grid.encode(body / torch.where(scale > 0, scale, 1.0).float(), noise)
        codes = codes.to(torch.uint8)
        if self.group_size % 2:
            codes = F.pad(codes, (0, 1))
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        return Codes(packed, scale, zero.to(torch.uint8), places.to(torch.uint8), outliers)

    def unpack(self, packed: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Q(x), of the shape and dtype that x had."""
        codes = torch.stack((packed.codes & 15, packed.codes >> 4), -1).flatten(-2)[..., : self.group_size]
        scale = packed.scale.float()
        if self.grid == "asymmetric":
            body = (codes.float() - packed.zero.float()) * scale
        else:
            body = GRIDS[self.grid].decode(codes) * scale
        whole = body.to(dtype).scatter(-1, packed.places.long(), packed.outliers)
        return whole.flatten()[: shape.numel()].reshape(shape)

    def _groups(self, x: Tensor) -> Tensor:
        if not self.flat:
            return x.unflatten(-1, (-1, self.group_size))
        return F.pad(x.reshape(-1), (0, -x.numel() % self.group_size)).reshape(-1, self.group_size)

    def bits(self, element_size: int) -> float:
        """Bits that a packed number takes, its share of scale, zero point and outliers included."""
        number = 8 * element_size
        zero = 8 if self.grid == "asymmetric" else 0
        return 4 + (number + zero + self.outliers * (number + 8)) / self.group_size

    def __call__(self, x: Tensor, key: tuple[int, int] | None = None) -> Tensor:
        return self.unpack(self.pack(x, key), x.shape, x.dtype)


@dataclass(frozen=True)
class Quantization:
    """What the projections of a model do to their operands; None leaves one as it is."""

    weights: Quantizer | None
    activations: Quantizer | None
    stochastic: bool = False

    def of_weights(self) -> Quantization:
        """The same without that of the activations."""
        return Quantization(self.weights, None, self.stochastic)


def quantization_of(options: dict[str, Any]) -> Quantization:
    """The quantizers that the settled config key `quantization` stands for."""
    released, size = options["parity"] == "released", options["group_size"]

    def quantizer(format: str, of_weights: bool) -> Quantizer | None:
        if format == "none":
            return None
        if format == "fp4":
            both = 0 if of_weights and not released else OUTLIERS
            return Quantizer("released_fp4" if released else "fp4", size, both, flat=released)
        grid, kept = ("asymmetric", 0) if of_weights else ("int4", OUTLIERS)
        return Quantizer(grid, size, kept, flat=released)

    stochastic = options["rounding"] == "stochastic"
    return Quantization(
        quantizer(options["weights"], True), quantizer(options["activations"], False), stochastic
    )


class _QuantizedProduct(torch.autograd.Function):
    """Y = Xq Wq^T + b; keeps the codes of X, or X itself where it is not quantized, and W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: Quantization,
        packed: Codes | None,
        key: tuple[int, int] | None,
    ) -> Tensor:
        ctx.key = key
        ctx.spec, ctx.shape, ctx.dtype, ctx.has_bias = spec, x.shape, x.dtype, bias is not None
        ctx.save_for_backward(weight, *(packed if packed is not None else (x,)))
        if packed is not None:
            assert spec.activations is not None
            x = spec.activations.unpack(packed, x.shape, x.dtype)
        return F.linear(
            x, quantized_weight(weight, spec, x.dtype, key), None if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        weight, *kept = ctx.saved_tensors
        dy = grad_outputs[0]
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ quantized_weight(weight, ctx.spec, ctx.dtype, ctx.key)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            x = kept[0]
            if len(kept) > 1:
                x = ctx.spec.activations.unpack(Codes(*kept), ctx.shape, ctx.dtype)
            dw = (rows.mT @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None, None, None


def quantized_weight(
    weight: Tensor, spec: Quantization, dtype: torch.dtype, key: tuple[int, int] | None = None
) -> Tensor:
    """Wq in `dtype`, quantized in the precision that W is kept in; with a key rounded at random."""
    return (weight if spec.weights is None else spec.weights(weight, key)).to(dtype)


def _codes_of(x: Tensor, dtype: torch.dtype, quantizer: Quantizer, noise: tuple[int, int] | None) -> Codes:
    """Q(x) in codes, the same ones for every layer that reads this very tensor."""
    if torch.compiler.is_compiling():
        return quantizer.pack(x.to(dtype), noise)  # the compiler sees equal subexpressions by itself
    key = (quantizer, dtype, x._version, noise)
    held = getattr(x, "_codes", None)
    if held is None or held[0] != key:
        held = (key, quantizer.pack(x.detach().to(dtype), noise))
        x._codes = held  # type: ignore[attr-defined]
    return held[1]


class QuantizedLinear(nn.Linear):
    """A linear layer with 4-bit operands; see the module. `weight` is the master weight.

    place: (layer, name), part of what its random numbers depend on. clock: (seed, update) of the model.
    """

    quantization: Quantization
    place: tuple[int, str]
    clock: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, linear: nn.Linear, quantization: Quantization, place: tuple[int, str] = (0, "")
    ) -> QuantizedLinear:
        """`linear` with quantized operands: the same parameters, role and name."""
        assert type(linear) is nn.Linear
        quantized = cls.__new__(cls)
        quantized.__dict__ = linear.__dict__
        quantized.quantization = quantization
        quantized.place = place
        return quantized

    def _key(self, operand: str) -> tuple[int, int] | None:
        """Two words from (seed, update, layer, operand); None where numbers go to the nearest level."""
        if not (self.training and self.quantization.stochastic):
            return None
        if self.clock is None:
            raise RuntimeError(
                "quantization.rounding=stochastic draws other numbers in each update: call "
                "set_rounding_clock(model, seed, step) before it, or use eval() to round to nearest"
            )
        digest = hashlib.sha256(repr((*self.clock, self.place[0], operand)).encode()).digest()
        return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        quantizer = self.quantization.activations
        name = self.place[1]
        weight_key, input_key = self._key(name), self._key(f"input of {READERS.get(name, name)}")
        packed = None if quantizer is None else _codes_of(x, dtype, quantizer, input_key)
        with torch.autocast(kind, enabled=False):
            return _QuantizedProduct.apply(
                x.to(dtype), self.weight, self.bias, self.quantization, packed, weight_key
            )


def set_rounding_clock(model: nn.Module, seed: int, step: int) -> None:
    """Say which update comes, for `rounding: stochastic`; other models ignore it."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.clock = (seed, step)


def quantize_projections(block: Any, config: LlmNormConfig, layer_idx: int) -> None:
    """Give the projections of a layer 4-bit operands, where the config asks for it."""
    if config.quantization is None:
        return
    quantization = quantization_of(config.quantization)
    for place, names in PROJECTIONS.items():
        owner = getattr(block, place)
        for name in names:
            setattr(owner, name, QuantizedLinear.of(getattr(owner, name), quantization, (layer_idx, name)))


def settle_quantization(options: Any) -> dict[str, Any] | None:
    """The config key `quantization` with its defaults filled in.

    Raises ValueError for unknown keys and values.
    """
    if options is None:
        return None
    if not isinstance(options, dict):
        raise ValueError(
            f"quantization={options!r} must be null or a mapping such as {{weights: int4, activations: int4}}"
        )
    for key in options:
        if key not in DEFAULTS:
            raise ValueError(f"quantization.{key} is not a key; known are {', '.join(DEFAULTS)}")
    released = options.get("parity") == "released"
    given = {key: value for key, value in options.items() if value is not None}
    settled = {**DEFAULTS, "group_size": 256 if released else 128, **given}
    for key in ("weights", "activations"):
        if settled[key] not in FORMATS:
            raise ValueError(f"quantization.{key}={settled[key]!r} must be one of {', '.join(FORMATS)}")
    if settled["rounding"] not in ROUNDINGS:
        raise ValueError(
            f"quantization.rounding={settled['rounding']!r} must be one of {', '.join(ROUNDINGS)}"
        )
    if settled["parity"] not in (None, "released"):
        raise ValueError(f"quantization.parity={settled['parity']!r} must be null or released")
    size = settled["group_size"]
    if not isinstance(size, int) or isinstance(size, bool) or not 4 <= size <= LARGEST_GROUP:
        raise ValueError(f"quantization.group_size={size!r} must be an integer from 4 to {LARGEST_GROUP}")
    return settled


def check_groups(config: LlmNormConfig) -> None:
    """Raise ValueError, naming the layer, where a group does not divide what it must.

    The groups of `parity: released` cross rows and need no width in particular.
    """
    if config.quantization is None or config.quantization["parity"] == "released":
        return
    size, inner = config.quantization["group_size"], config.num_attention_heads * config.head_dim
    inputs = {"q_proj": config.hidden_size, "o_proj": inner, "down_proj": config.intermediate_size}
    for name, width in inputs.items():
        if width % size:
            fitting = max(d for d in range(1, size + 1) if width % d == 0)
            raise ValueError(
                f"quantization.group_size={size} does not divide the {width} inputs of {name}; {fitting} is "
                "the largest smaller size that does"
            )
