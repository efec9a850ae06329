"""The linear-attention sublayers: NaLaFormer and SLA, and what they are told about the sequence.

Shapes: B sequences, T tokens, H query heads, G key-value heads, D = head_dim, K features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution import CausalConvolution
from .equation import identity
from .feature_maps import FEATURE_MAPS, exponent
from .initialization import set_roles
from .linear_attention import (
    kernel_linear_attention,
    kernel_takes,
    linear_attention,
    rotated_linear_attention,
)
from .norms import Settings, make_norm, make_projection_norm
from .recurrent_cache import (
    COUNT,
    SHORT,
    SUM,
    VALUE,
    history,
    recurrent_state,
    state_layer,
    write_history,
    write_recurrent_state,
)
from .rotary import apply_rotary
from .zero_mean import stream_linears

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .configuration_llmnorm import LlmNormConfig


class LinearInputs(NamedTuple):
    """padding [B, T], 0 at padding; segments [B, T], a number for each document of a packed row; (cos, sin),
    each [B or 1, 1, T, D]. None: no padding, one document, no rotary positions.
    """

    padding: Tensor | None = None
    segments: Tensor | None = None
    position_embeddings: tuple[Tensor, Tensor] | None = None


class Projected(NamedTuple):
    """Features [B, H, T, K] and [B, G, T, K], values [B, G, T, D]; exponents [B, H, T, 1] if norm-aware."""

    q: Tensor
    k: Tensor
    v: Tensor
    exponents: Tensor | None


class LlmNormLinearAttention(nn.Module):
    """y = W_o (N(o) * SiLU(W_g z)), o_t = sum_{j <= t} (phi_q(q_t) . phi_k(k_j)) v_j / (sum_j phi_q . phi_k).

    q, k, v = SiLU(conv(W z)), k normalized in each head, phi a map of `feature_maps.FEATURE_MAPS`. For a
    norm-aware map the exponent of query head h is p = lambda (tau + tanh(s_h n + b_h)), with n the query's
    root mean square (or length), s_h and b_h learned, 1 and 0 at first. A constant feature `floor` joined to
    both maps adds floor^2 to every score, so that no normalizer vanishes. Every part is an option; see
    `attention_plan.ATTENTION_OPTIONS`. z [B, T, hidden_size] -> y the same, None (there are no weights).
    """

    name: str
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    key_norm: Callable[[Tensor], Tensor]
    output_norm: Callable[[Tensor], Tensor]

    def __init__(self, config: LlmNormConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.options = options = config.attention_options_of(self.name)
        self.map = FEATURE_MAPS[options.get("feature_map", "relu")]
        heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.stream_width
        reader, writer = stream_linears(config)
        sizes = {"q": heads * config.head_dim, "k": groups * config.head_dim, "v": groups * config.head_dim}
        for name, size in sizes.items():
            setattr(self, f"{name}_proj", reader(d, size, bias=config.attention_bias))
        self.o_proj = writer(sizes["q"], d, bias=config.attention_bias)
        roles = {"q_proj": "attention_in", "k_proj": "attention_in", "v_proj": "attention_value"}
        self.g_proj = None
        if options["gate"]:
            self.g_proj = reader(d, sizes["q"], bias=config.attention_bias)
            roles["g_proj"] = "attention_in"
        set_roles(self, layer_idx + 1, **roles, o_proj="attention_out")

        short, wide = options["short_convolution"], options["value_convolution"]
        self.convolution = CausalConvolution(sum(sizes.values()), short) if short else None
        self.value_convolution = CausalConvolution(sizes["v"], wide) if wide else None
        self.splits = list(sizes.values())
        norms = {"key_norm": options["key_norm"], "output_norm": options["output_norm"]}
        for name, present in norms.items():
            norm = make_norm("rmsnorm", config.head_dim, config.rms_norm_eps) if present else identity
            setattr(self, name, norm)
        if self.map.norm_aware and options["learned_scale"]:
            self.initial_values = {"query_scale": 1.0, "query_shift": 0.0}
            self.query_scale = nn.Parameter(torch.ones(heads))
            self.query_shift = nn.Parameter(torch.zeros(heads))
        self.q_norm: Callable[[Tensor], Tensor] = identity
        self.k_norm: Callable[[Tensor], Tensor] = identity
        self.v_norm: Callable[[Tensor], Tensor] = identity

    def add_norms(
        self, kind: str, over: str, projections: Iterable[str], eps: float, settings: Settings = ()
    ) -> None:
        """As `LlmNormAttention.add_norms`; a norm on q leaves a norm-aware map little to be aware of."""
        for name in projections:
            heads = getattr(self, f"{name}_proj").out_features // self.head_dim
            norm = make_projection_norm(kind, over, heads, self.head_dim, eps, settings)
            setattr(self, f"{name}_norm", norm)

    def forward(
        self,
        z: Tensor,
        past_key_values: Cache | None = None,
        linear_inputs: LinearInputs = LinearInputs(),  # noqa: B008  (immutable)
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        layer = state_layer(past_key_values, self.layer_idx)
        q, k, v = self._heads(z, linear_inputs, layer)
        o, state = self._mix(q, k, v, recurrent_state(layer, SUM), linear_inputs)
        o = o.transpose(1, 2)
        if self.value_convolution is not None:
            o = o + self._convolved_values(v, linear_inputs, layer)
        if layer is not None:
            write_recurrent_state(layer, SUM, state)
            self._count(layer, z, linear_inputs.padding)
        y = self.output_norm(o).flatten(2)
        if self.g_proj is not None:
            y = y * F.silu(self.g_proj(z))
        return self.o_proj(y), None

    def project(self, z: Tensor, inputs: LinearInputs, layer: Any = None) -> Projected:
        """From z to features; a state layer gives and takes the short convolution's history."""
        return self._features(*self._heads(z, inputs, layer), inputs.padding)

    def _heads(self, z: Tensor, inputs: LinearInputs, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the map takes them, [B, heads, T, D]."""
        heads = (*z.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(z).view(heads))
        k = self.k_norm(self.k_proj(z).view(heads))
        v = self.v_norm(self.v_proj(z).view(heads))
        if self.convolution is not None:
            joined = torch.cat((q.flatten(2), k.flatten(2), v.flatten(2)), -1)
            joined = F.silu(self._convolve(self.convolution, joined, inputs, layer, SHORT))
            q, k, v = (x.view(heads) for x in joined.split(self.splits, -1))
        q, k = q.transpose(1, 2), self.key_norm(k).transpose(1, 2)
        if self.options["rope"] == "before" and inputs.position_embeddings is not None:
            q, k = (apply_rotary(x, *inputs.position_embeddings) for x in (q, k))
        return q, k, v.transpose(1, 2)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, inputs: LinearInputs
    ) -> tuple[Tensor, Tensor]:
        """`attend` after the map, in one kernel where there is one for both."""
        if not self._maps_in_kernel(q, k, v, inputs):
            q, k, v, _ = self._features(q, k, v, inputs.padding)
            return self.attend(q, k, v, state, inputs)
        with torch.autocast(q.device.type, enabled=False):
            p = self._exponents(q).squeeze(-1) if self.map.norm_aware else None
        return kernel_linear_attention(
            q,
            k,
            v,
            eps=self.options["eps"],
            initial_state=state,
            segments=inputs.segments,
            feature_map=self.map.fused,
            exponent=p,
            floor=self.options["floor"],
        )

    def _maps_in_kernel(self, q: Tensor, k: Tensor, v: Tensor, inputs: LinearInputs) -> bool:
        """Padding is cut off after the map, and positions of `rope: after` come after it."""
        return (
            self.map.fused is not None
            and inputs.padding is None
            and (self.options["rope"] != "after" or inputs.position_embeddings is None)
            and q.dtype == k.dtype == v.dtype
            and kernel_takes(v, self.map.widening * self.head_dim)
        )

    def _features(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Projected:
        with torch.autocast(q.device.type, enabled=False):
            wide = torch.promote_types(q.dtype, torch.float32)
            q, k = q.to(wide), k.to(wide)
            p = self._exponents(q) if self.map.norm_aware else None
            floor = self.options["floor"]
            q, k = self.map.query(q, p, floor), self.map.key(k, floor)
            if padding is not None:
                # After the map, or the floor of a padding key would stay in the normalizer.
                seen = padding[:, None, :, None]
                k, v = k * seen.to(k.dtype), v * seen.to(v.dtype)
        return Projected(q, k, v, p)

    def _exponents(self, q: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        length = torch.linalg.vector_norm(q, dim=-1, keepdim=True, dtype=wide)
        if self.options["query_norm"] == "rms":
            length = length * self.head_dim**-0.5
        if self.options["learned_scale"]:
            scale, shift = (x.to(wide)[:, None, None] for x in (self.query_scale, self.query_shift))
            length = length * scale + shift
        return exponent(length, self.options["lambda"], self.options["tau"])

    def exponent_range(self) -> tuple[float, float]:
        """The least and the largest exponent of a norm-aware map."""
        lambda_, tau = self.options["lambda"], self.options["tau"]
        least = 1.0 if self.options["learned_scale"] else max(1.0, lambda_ * tau)
        return least, lambda_ * (tau + 1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, inputs: LinearInputs
    ) -> tuple[Tensor, Tensor]:
        """o [B, H, T, D] and the state after T, from features and the state before."""
        options: dict[str, Any] = {
            "eps": self.options["eps"],
            "initial_state": state,
            "segments": inputs.segments,
            "chunk_size": self.options["chunk_size"],
        }
        if self.options["rope"] != "after" or inputs.position_embeddings is None:
            return linear_attention(q, k, v, **options)
        q_rotated, k_rotated = (self._rotate_features(x, *inputs.position_embeddings) for x in (q, k))
        return rotated_linear_attention(q, k, q_rotated, k_rotated, v, **options)

    def _rotate_features(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Each part of D features turned like a head; the floor has no position."""
        parts = x.split(self.head_dim, -1)
        return torch.cat([apply_rotary(x, cos, sin) if x.shape[-1] > 1 else x for x in parts], -1)

    def _convolve(
        self, convolution: CausalConvolution, x: Tensor, told: LinearInputs, layer: Any, index: int
    ) -> Tensor:
        if told.padding is not None:
            x = x * told.padding[..., None].to(x.dtype)
        inputs = convolution.with_history(x, history(layer, index))
        if layer is not None:
            write_history(layer, index, inputs, told.padding, convolution.kernel_size - 1)
        return convolution(inputs, told.segments)

    def _convolved_values(self, v: Tensor, told: LinearInputs, layer: Any) -> Tensor:
        assert self.value_convolution is not None
        y = self._convolve(self.value_convolution, v.transpose(1, 2).flatten(2), told, layer, VALUE)
        repeats = self.q_proj.out_features // self.v_proj.out_features
        return y.unflatten(2, (-1, self.head_dim)).repeat_interleave(repeats, 2)

    def _count(self, layer: Any, z: Tensor, padding: Tensor | None) -> None:
        seen = recurrent_state(layer, COUNT)
        new = z.new_full((z.shape[0], 1), z.shape[1], dtype=torch.int64)
        if padding is not None:
            new = (padding != 0).sum(1, keepdim=True)
        write_recurrent_state(layer, COUNT, new if seen is None else seen + new)
        layer.cumulative_length = getattr(layer, "cumulative_length", 0) + z.shape[1]


class NaLaFormerAttention(LlmNormLinearAttention):
    """Norm-aware linear attention (NaLaFormer, arXiv 2506.21137) as a causal token mixer."""

    name = "nalaformer"


class SimplifiedLinearAttention(LlmNormLinearAttention):
    """SLA (SLAB, arXiv 2405.11582), causal: phi = ReLU, y = W_o (o + conv(v)), one filter a channel."""

    name = "sla"
