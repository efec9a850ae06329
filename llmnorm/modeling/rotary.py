"""Rotary positions, with the norms of queries and keys that come before them.

Shapes: B sequences, T tokens, H heads, D = head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as hf_init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .fused import kernels, serves
from .norms import LlmNormRMSNorm

if TYPE_CHECKING:
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


def normalize_and_rotate(
    query: Tensor,
    key: Tensor,
    q_norm: Callable[[Tensor], Tensor],
    k_norm: Callable[[Tensor], Tensor],
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """RoPE(N_q(q)) and RoPE(N_k(k)), heads first: query and key [B, T, H, D], each with its own H, become
    [B, H, T, D]; cos and sin [B or 1, 1, T, D].
    """
    if serves(query):
        tables = cos.squeeze(1), sin.squeeze(1)
        # A subclass computes something else.
        if type(q_norm) is type(k_norm) is LlmNormRMSNorm and q_norm.eps == k_norm.eps:
            heads = query.transpose(1, 2), key.transpose(1, 2)
            return kernels.qk_norm_rope(
                *heads, q_norm.weight, k_norm.weight, *tables, q_norm.eps, cast="float32"
            )
        return kernels.apply_rope(q_norm(query).transpose(1, 2), k_norm(key).transpose(1, 2), *tables)
    query, key = q_norm(query).transpose(1, 2), k_norm(key).transpose(1, 2)
    return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
