"""Softmax attention.

Shapes: B sequences, T tokens, S keys seen (T without a cache), H query heads, K key-value heads, D =
head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .equation import identity
from .initialization import set_roles
from .max_logits import max_logits
from .mup import attention_scale
from .norms import Settings, make_projection_norm
from .rotary import normalize_and_rotate
from .softmax_variants import GATE_WIDTH, MASKED_IMPLEMENTATIONS, NORMALIZERS
from .zero_mean import stream_linears, widen

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .configuration_llmnorm import LlmNormConfig


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + mask) v in plain torch; the only form that can return the attention weights.

    query [B, H, T, D], key and value [B, K, S, D], mask [B, 1, T, S] additive -> [B, T, H, D], [B, H, T, S].
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


# option `output_factor`, where it is no number -> c
OUTPUT_FACTORS: dict[str, Callable[[LlmNormConfig], float]] = {
    "inverse_sqrt_heads": lambda config: config.num_attention_heads**-0.5,
}


class Gate(nn.Module):
    """sigma(W z), W [columns, hidden_size], 0 at first; z [..., hidden_size] -> [..., columns]."""

    initial_values: ClassVar[dict[str, float]] = {"weight": 0.0}

    def __init__(self, hidden_size: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(columns, hidden_size))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(z, widen(self.weight, z.shape[-1])))


class LlmNormAttention(nn.Module):
    """Attn(z) = W_o concat_heads softmax(q k^T / sqrt(D) + causal) v, q = RoPE(N_q(W_q z)), k = RoPE(N_k(W_k
    z)), v = N_v(W_v z).

    Attention Is All You Need (arXiv 1706.03762), with grouped key-value heads (GQA, arXiv 2305.13245). N_q,
    N_k and N_v are the identity unless `add_norms` brings them; a cache holds normalized, rotated keys.
    `config._attn_implementation` names the function of transformers' registry that computes it.

    Options: `normalizer`, a relative of softmax (`softmax_variants.py`); `gate`, Y * sigma(W_gate z) before
    W_o, one gate for each head or for each number (Gated Attention, arXiv 2505.06708). W_gate is 0 at first,
    so that a gated layer starts as half of one without. `logits_over` and `logit_factor` s: logits q k^T s
    over sqrt(D), D or hidden_size; `output_factor` c, W_o (c Y), a number or 1/sqrt(H) (Training Transformers
    with Enforced Lipschitz Constants, arXiv 2507.13338, has D and 1/3).
    """

    def __init__(self, config: LlmNormConfig, layer_idx: int) -> None:
        super().__init__()
        # The names are those that transformers' attention functions read.
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = attention_scale(config)
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        d, bias = config.stream_width, config.attention_bias
        reader, writer = stream_linears(config)
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = reader(d, query_size, bias=bias)
        self.k_proj = reader(d, key_value_size, bias=bias)
        self.v_proj = reader(d, key_value_size, bias=bias)
        self.o_proj = writer(query_size, d, bias=bias)
        readers = {"q_proj": "attention_in", "k_proj": "attention_in", "v_proj": "attention_value"}
        set_roles(self, layer_idx + 1, **readers, o_proj="attention_out")
        options = config.attention_options_of("softmax")
        self.normalizer = NORMALIZERS.get(options["normalizer"])
        factor = options["output_factor"]
        self.output_factor = OUTPUT_FACTORS[factor](config) if isinstance(factor, str) else float(factor)
        self.scale_output = identity if self.output_factor == 1.0 else partial(torch.mul, self.output_factor)
        self.gate: Gate | None = None
        if options["gate"] != "none":
            columns = GATE_WIDTH[options["gate"]](config.head_dim)
            self.gate = Gate(d, config.num_attention_heads * columns)
        self.q_norm: Callable[[Tensor], Tensor] = identity
        self.k_norm: Callable[[Tensor], Tensor] = identity
        self.v_norm: Callable[[Tensor], Tensor] = identity
        self.query_scale: Callable[[Tensor], Tensor] = identity  # nGPT's, see `hypersphere.put_on_sphere`
        self.max_logits: Tensor | None = None

    def add_norms(
        self, kind: str, over: str, projections: Iterable[str], eps: float, settings: Settings = ()
    ) -> None:
        """Normalize queries, keys or values ("q", "k", "v") before rotary positions; see
        `equation.ProjectionNorm`.
        """
        for name in projections:
            heads = getattr(self, f"{name}_proj").out_features // self.head_dim
            norm = make_projection_norm(kind, over, heads, self.head_dim, eps, settings)
            setattr(self, f"{name}_norm", norm)

    def track_max_logits(self) -> None:
        """Keep the largest logit of each query head in `max_logits` [H], over training passes from now on."""
        heads = self.q_proj.out_features // self.head_dim
        self.max_logits = torch.full((heads,), -torch.inf, device=self.q_proj.weight.device)

    def _logit_sides(self) -> list[tuple[str, nn.Linear, Any]]:
        """Queries, and keys unless several query heads share them: their projections and norms."""
        sides = ("q", "k") if self.num_key_value_groups == 1 else ("q",)
        return [(side, getattr(self, f"{side}_proj"), getattr(self, f"{side}_norm")) for side in sides]

    def logit_obstacle(self) -> str | None:
        """Why the logits of one head cannot be scaled alone, or None."""
        if self.query_scale is not identity:
            return "its queries and keys stay on the unit sphere, which bounds them; remove optimizer.qk_clip"
        for side, projection, norm in self._logit_sides():
            gains = getattr(norm, "weight", None)  # a norm over unit length has none
            if norm is not identity and (gains is None or gains.shape[0] != projection.out_features):
                return (
                    f"its {side}_norm undoes the scale of {side}_proj and has no gain for each head; such "
                    "logits are bounded by the gains, so remove optimizer.qk_clip"
                )
        return None

    def logit_factors(self, gamma: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """What multiplies the logits of head h by gamma[h], gamma [H]: parameters, and a factor for each row.

        Queries and keys share it as sqrt(gamma) each; queries take all of it where key heads are shared.
        Behind a norm it goes into the gains, since the norm would undo it.
        """
        sides = self._logit_sides()
        rows = gamma.pow(1 / len(sides)).repeat_interleave(self.head_dim)
        owners = [projection if norm is identity else norm for _, projection, norm in sides]
        return [(parameter, rows) for owner in owners for parameter in owner.parameters(recurse=False)]

    def forward(
        self,
        z: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        linear_inputs: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = z.shape[:-1]
        heads = (*tokens, -1, self.head_dim)
        query, key = self.q_proj(z).view(heads), self.k_proj(z).view(heads)
        query, key = normalize_and_rotate(query, key, self.q_norm, self.k_norm, *position_embeddings)
        query = self.query_scale(query)
        value = self.v_norm(self.v_proj(z).view(heads)).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if self.max_logits is not None and self.training:
            largest = max_logits(query, key, self.scaling, attention_mask, kwargs.get("cu_seq_lens_q"))
            self.max_logits = torch.maximum(self.max_logits.to(largest.device), largest)

        y, weights = self._attend()(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if self.gate is not None:
            gate = self.gate(z)
            y = y * gate.view(*tokens, self.config.num_attention_heads, -1)
        return self.o_proj(self.scale_output(y).reshape(*tokens, -1)), weights

    def _attend(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        implementation = self.config._attn_implementation
        if self.normalizer is None:
            return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        if implementation not in MASKED_IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation={implementation!r} computes softmax only, and attention_options has "
                f"another normalizer; use one of {', '.join(MASKED_IMPLEMENTATIONS)}"
            )
        return self.normalizer


def document_boundaries(position_ids: Tensor, batch_size: int) -> dict[str, Any]:
    """Where documents begin, for flash attention's variable-length kernels, which take no mask.

    position_ids [B or 1, T] -> cu_seq_lens_q and cu_seq_lens_k [documents + 1] int32, offsets into the B * T
    tokens, and the longest document's length. A document begins with each row and wherever a position is not
    its predecessor's successor.
    """
    position_ids = position_ids.expand(batch_size, -1)
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    offsets = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
    longest = int(offsets.diff().max())
    return {
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
