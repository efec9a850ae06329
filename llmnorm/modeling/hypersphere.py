"""Vectors of unit length: what nGPT is made of (Normalized Transformer with Representation Learning on the
Hypersphere, arXiv 2410.01131), and the unit embeddings of FixNorm (Transformers without Tears, arXiv
1910.05895).

Unit weights are kept so from outside: a module with `project_weights_()` has it called after every optimizer
step. `projected` is the same rule on a whole matrix, for the initial values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .initialization import take_role


def unit_vectors(x: Tensor, dim: int = -1, eps: float = 1e-12) -> Tensor:
    """y = x / max(||x||, eps) along `dim`, in fp32 or wider and rounded once; y has x's shape and dtype.

    A zero vector, such as a padding row, stays zero.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    return (wide / length.clamp_min(eps)).to(x.dtype)


class UnitNorm(nn.Module):
    """y = x / max(||x||, eps) over the last dimension, without a gain; x [..., d]."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return unit_vectors(x, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class _UnitWeight:
    """A `weight` whose rows (unit_dim 1) or columns (unit_dim 0) get unit length from `project_weights_`."""

    weight: Tensor
    unit_dim: int

    @property
    def projects_rows(self) -> bool:
        """Whether each row is projected by itself, so that a shard of whole rows needs no others."""
        return self.unit_dim == 1

    def projected(self, weight: Tensor) -> Tensor:
        """`weight`, whole, as it must be."""
        return unit_vectors(weight, dim=self.unit_dim)

    @torch.no_grad()
    def project_weights_(self) -> None:
        self.weight.copy_(self.projected(self.weight))


class UnitLinear(_UnitWeight, nn.Linear):
    """A linear layer [out, in] with unit rows, what reads the stream, or unit columns, what writes to it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, unit_dim: int) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.unit_dim = unit_dim


class UnitEmbedding(_UnitWeight, nn.Embedding):
    """An embedding with unit rows; a padding row stays zero."""

    unit_dim = 1


class WidthScale(nn.Module):
    """y = sqrt(d) * x, so that a unit embedding enters with mean square 1; x [..., d]."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.scale = math.sqrt(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def make_unit(owner: nn.Module, **unit_dims: int) -> None:
    """Replace children of `owner`, linear layers or embeddings, by ones with unit vectors along `unit_dims`.

    To be called before weights are drawn; what `initialization.set_roles` said stays.
    """
    for name, unit_dim in unit_dims.items():
        plain: Any = getattr(owner, name)
        with torch.device(plain.weight.device):
            unit: nn.Module
            if isinstance(plain, nn.Embedding):
                assert unit_dim == 1, "an embedding is read by rows"
                unit = UnitEmbedding(plain.num_embeddings, plain.embedding_dim, plain.padding_idx)
            else:
                unit = UnitLinear(plain.in_features, plain.out_features, plain.bias is not None, unit_dim)
        take_role(unit, plain)
        setattr(owner, name, unit.to(plain.weight.dtype))


class Rescaled(nn.Module):
    """A learned vector s_eff = s * initial / stored, where s, the parameter `weight`, starts at `stored`.

    So s_eff starts at `initial`, and an optimizer whose steps have the size of its learning rate moves it
    initial / stored times as fast (nGPT, section 2.5).
    """

    def __init__(self, size: int, initial: float, stored: float) -> None:
        super().__init__()
        self.factor = initial / stored
        self.initial_values = {"weight": stored}
        self.weight = nn.Parameter(torch.full((size,), stored))

    def effective(self) -> Tensor:
        """s_eff [size], in fp32 or wider."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) * self.factor

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, factor={self.factor:.6g}"


class RescaledGain(Rescaled):
    """y = s_eff * x over the last dimension; x [..., size]."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.effective()).to(x.dtype)


class QueryScale(Rescaled):
    """y = s_qk^2 * x for queries x [B, H, T, D] after rotary positions; s_qk [K * D], 1 at first.

    nGPT multiplies queries and keys by one s_qk; queries times its square give the same logits and gradients.
    Where H / K query heads share a key head they share its s_qk.
    """

    def __init__(self, key_value_heads: int, head_dim: int, hidden_size: int) -> None:
        super().__init__(key_value_heads * head_dim, initial=1.0, stored=hidden_size**-0.5)
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        scale = self.effective().square().view(-1, 1, self.head_dim)
        return (x * scale.repeat_interleave(x.shape[1] // scale.shape[0], dim=0)).to(x.dtype)


class StepOnSphere(Rescaled):
    """u = xs + alpha * (y - xs) with a learned step alpha = |s_eff| [d], the eigen learning rates of nGPT.

    N_post brings u back to the sphere.
    """

    def __init__(self, hidden_size: int, initial: float) -> None:
        super().__init__(hidden_size, initial=initial, stored=hidden_size**-0.5)

    def forward(self, xs: Tensor, y: Tensor) -> Tensor:
        return (xs + self.effective().abs() * (y - xs)).to(xs.dtype)


def put_on_sphere(block: Any) -> None:
    """nGPT's inner part of a block: unit rows for what reads, unit columns for what writes; scaled queries,
    gate and up; attention logits times sqrt(D).
    """
    attention, mlp = block.self_attn, block.mlp
    make_unit(attention, q_proj=1, k_proj=1, v_proj=1, o_proj=0)
    make_unit(mlp, gate_proj=1, up_proj=1, down_proj=0)
    d, f = mlp.gate_proj.in_features, mlp.gate_proj.out_features
    key_value_heads = attention.k_proj.out_features // attention.head_dim
    attention.query_scale = QueryScale(key_value_heads, attention.head_dim, d)
    attention.scaling = math.sqrt(attention.head_dim)
    mlp.gate_scale = RescaledGain(f, initial=math.sqrt(d), stored=1.0)
    mlp.up_scale = RescaledGain(f, initial=math.sqrt(d), stored=1.0)


def logit_scale(vocab_size: int, hidden_size: int) -> RescaledGain:
    """nGPT's s_z [V], 1 at first."""
    return RescaledGain(vocab_size, initial=1.0, stored=hidden_size**-0.5)
