"""Rotary positions and softmax attention.

Shapes: B sequences, T tokens, S keys seen (T without a cache), H query heads, K key-value heads, D =
head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as hf_init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .equation import identity
from .initialization import set_roles
from .norms import make_projection_norm

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .configuration_llmnorm import LlmNormConfig


class LlmNormRotaryEmbedding(nn.Module):
    """cos and sin of the angles t * theta^(-2i/D) of position t (RoFormer, arXiv 2104.09864).

    `rope_parameters` chooses the frequencies as in Llama: default, linear, dynamic, yarn, longrope, llama3.
    position_ids [B or 1, T] -> cos and sin, each [B or 1, T, D] in the dtype of x.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: LlmNormConfig) -> None:
        super().__init__()
        # The names are those that `dynamic_rope_update` reads and writes.
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self._frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _frequencies(self) -> tuple[Tensor, float]:
        if self.rope_type != "default":
            return ROPE_INIT_FUNCTIONS[self.rope_type](self.config)
        head_dim = self.config.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (self.config.rope_parameters["rope_theta"] ** exponents), 1.0

    def rebuild_buffers(self) -> None:
        """Compute the frequencies again; a model built on the meta device has buffers without values."""
        with torch.device("cpu"):
            inv_freq, self.attention_scaling = self._frequencies()
        hf_init.copy_(self.inv_freq, inv_freq)
        hf_init.copy_(self.original_inv_freq, inv_freq)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LlmNormRotaryEmbedding:
        """Follow the model to its device but stay in fp32: in bf16, position 1000 is off by radians."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = torch.empty_like(self.inv_freq, dtype=torch.float32)
            self.original_inv_freq = torch.empty_like(self.inv_freq)
            self.rebuild_buffers()
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so the backward needs neither x nor its halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, -sin), None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y_i = x_i cos_i - x_{i + D/2} sin_i and y_{i + D/2} = x_{i + D/2} cos_i + x_i sin_i, for i < D/2.

    x [B, H, T, D]; cos and sin [B or 1, 1, T, D], their second half equal to the first.
    """
    return _Rotation.apply(x, cos, sin)


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


class LlmNormAttention(nn.Module):
    """Attn(z) = W_o concat_heads softmax(q k^T / sqrt(D) + causal) v, q = RoPE(N_q(W_q z)), k = RoPE(N_k(W_k
    z)), v = N_v(W_v z).

    Attention Is All You Need (arXiv 1706.03762), with grouped key-value heads (GQA, arXiv 2305.13245). N_q,
    N_k and N_v are the identity unless `add_norms` brings them; a cache holds normalized, rotated keys.
    `config._attn_implementation` names the function of transformers' registry that computes it.
    """

    def __init__(self, config: LlmNormConfig, layer_idx: int) -> None:
        super().__init__()
        # The names are those that transformers' attention functions read.
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        d, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, query_size, bias=bias)
        self.k_proj = nn.Linear(d, key_value_size, bias=bias)
        self.v_proj = nn.Linear(d, key_value_size, bias=bias)
        self.o_proj = nn.Linear(query_size, d, bias=bias)
        readers = {"q_proj": "attention_in", "k_proj": "attention_in", "v_proj": "attention_value"}
        set_roles(self, layer_idx + 1, **readers, o_proj="attention_out")
        self.q_norm: Callable[[Tensor], Tensor] = identity
        self.k_norm: Callable[[Tensor], Tensor] = identity
        self.v_norm: Callable[[Tensor], Tensor] = identity

    def add_norms(self, kind: str, over: str, projections: Iterable[str], eps: float) -> None:
        """Normalize queries, keys or values ("q", "k", "v") before rotary positions; see
        `equation.ProjectionNorm`.
        """
        for name in projections:
            heads = getattr(self, f"{name}_proj").out_features // self.head_dim
            setattr(self, f"{name}_norm", make_projection_norm(kind, over, heads, self.head_dim, eps))

    def forward(
        self,
        z: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = z.shape[:-1]
        heads = (*tokens, -1, self.head_dim)
        query = self.q_norm(self.q_proj(z).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(z).view(heads)).transpose(1, 2)
        value = self.v_norm(self.v_proj(z).view(heads)).transpose(1, 2)

        cos, sin = position_embeddings
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(y.reshape(*tokens, -1)), weights


# The config key `attention` -> the sublayer.
ATTENTIONS: dict[str, type[nn.Module]] = {"softmax": LlmNormAttention}


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
