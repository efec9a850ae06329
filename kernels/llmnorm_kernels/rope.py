"""Rotary position embeddings, alone and fused with the RMSNorm of each query and key head.

    R(x) = [x1 cos - x2 sin, x2 cos + x1 sin],  x = [x1, x2] the halves of a head    (RoFormer, arXiv
    2104.09864) apply_rope    q' = R(q), k' = R(k)
    qk_norm_rope  q' = R(gamma_q * q / rms(q)), k' likewise                          (QK-norm, arXiv
    2302.05442)

The layout of halves is Hugging Face Llama's `rotate_half`; both halves turn by the same angles. Everything is
computed in float32 and rounded once to the dtype of q and k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_choice, check_floats, check_given, check_numbers, check_vector
from .dispatch import accumulator, operator, register, runs_triton
from .norms import CASTS, norm_reference


def empty_heads_like(x: Tensor, dim: int | None = None) -> Tensor:
    """A new (batch, heads, time, dim) tensor; memory order (batch, time, heads, dim) where `x` has that, else
    contiguous."""
    batch, heads, time, own = x.shape
    dim = own if dim is None else dim
    if x.transpose(1, 2).is_contiguous():
        return x.new_empty(batch, time, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, time, dim)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """R(x) in the accumulator dtype, rounded once; cos, sin: (batch or 1, time, dim / 2)."""
    acc = accumulator(x.dtype)
    first, second = x.to(acc).chunk(2, -1)
    cos, sin = cos.to(acc).unsqueeze(1), sin.to(acc).unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _fake_rope(q, k, cos, sin, inverse):
    return empty_heads_like(q), empty_heads_like(k)


def _fake_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, zero_centered, round_normalized):
    return empty_heads_like(q), empty_heads_like(k)


def _fake_norm_rope_backward(
    doq, dok, q, k, q_weight, k_weight, cos, sin, eps, zero_centered, round_normalized
):
    weights = [q.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight)]
    return empty_heads_like(q), empty_heads_like(k), *weights


register(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    "rope_kernels:launch_rope",
    _fake_rope,
)
register(
    "norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, "
    "bool zero_centered, bool round_normalized) -> (Tensor, Tensor)",
    "rope_kernels:launch_norm_rope",
    _fake_norm_rope,
)
register(
    "norm_rope_backward(Tensor doq, Tensor dok, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, "
    "Tensor cos, Tensor sin, float eps, bool zero_centered, bool round_normalized) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "rope_kernels:launch_norm_rope_backward",
    _fake_norm_rope_backward,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return torch.ops.llmnorm_kernels.rope(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        # A rotation is undone by its transpose, the rotation by minus the angle.
        return (*torch.ops.llmnorm_kernels.rope(dq, dk, *ctx.saved_tensors, True), None, None)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor,
        sin: Tensor, eps: float, zero_centered: bool, round_normalized: bool,
    ) -> Any:  # fmt: skip
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.options = (eps, zero_centered, round_normalized)
        return torch.ops.llmnorm_kernels.norm_rope(q, k, q_weight, k_weight, cos, sin, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doq: Tensor, dok: Tensor) -> Any:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        dq, dk, dwq, dwk = torch.ops.llmnorm_kernels.norm_rope_backward(
            doq, dok, q, k, q_weight, k_weight, cos, sin, *ctx.options
        )
        return dq, dk, None if q_weight is None else dwq, None if k_weight is None else dwk, *(None,) * 5


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables as (batch or 1, time, dim / 2)."""
    check_given(q=q, k=k, cos=cos, sin=sin)
    check_floats(q=q, k=k, cos=cos, sin=sin)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be (batch, heads, time, head_dim)")
    batch, _, time, dim = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (batch, time, dim) or k.dtype != q.dtype:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and dtype {k.dtype}; but for its heads it must match q, "
            f"{tuple(q.shape)} of {q.dtype}"
        )
    if dim == 0 or dim % 2:
        raise ValueError(f"q has head_dim {dim}; rotary embeddings need an even one")
    tables = []
    for name, table in (("cos", cos), ("sin", sin)):
        full = table if table.dim() == 3 else table.unsqueeze(0)
        widths = (dim, dim // 2)
        if (
            full.dim() != 3
            or full.shape[0] not in (1, batch)
            or full.shape[1] != time
            or full.shape[2] not in widths
        ):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; it must be ([batch,] time, head_dim or its half), "
                f"time={time}, head_dim={dim}, batch 1 or {batch}"
            )
        if table.requires_grad:
            raise ValueError(f"{name} requires a gradient, which is not computed; pass {name}.detach()")
        tables.append(full[..., : dim // 2])
    return tables[0], tables[1]


@operator
def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(R(q), R(k)) of the module's equation, Hugging Face Llama's `apply_rotary_pos_emb` rounded once.

    q: (batch, heads, time, head_dim), k: the same with its own heads,
    any strides with contiguous head_dim (others are copied); cos, sin: (time, head_dim), (1, ...) or (batch,
    ...), or their first half. Bytes moved, E elements of B bytes in q and k: 2 E B each way, the tables
    staying in L2. Raises ValueError for shapes, dtypes or devices that do not match.
    """
    cos, sin = _check(q, k, cos, sin)
    if runs_triton(q):
        return _Rope.apply(q, k, cos, sin)
    return rope_reference(q, cos, sin), rope_reference(k, cos, sin)


@operator
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    eps: float = 1e-6, *, cast: str = "llama", zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(R(rms_norm(q, q_weight)), R(rms_norm(k, k_weight))), the norm over head_dim: Qwen3's attention in one
    pass.

    q_weight, k_weight: (head_dim,), shared by the heads, or None. cast, zero_centered as in `rms_norm`; the
    result has the dtype of q. Other arguments as in `apply_rope`. Bytes moved: 2 E B forward, 3 E B backward,
    which computes the statistics again instead of storing them. Raises ValueError as `apply_rope` and
    `rms_norm` do.
    """
    cos, sin = _check(q, k, cos, sin)
    check_floats(q=q, q_weight=q_weight, k_weight=k_weight)
    check_vector("q_weight", q_weight, q.shape[-1], "q")
    check_vector("k_weight", k_weight, k.shape[-1], "k")
    check_choice("cast", cast, CASTS)
    check_numbers(eps=eps)
    rounded = cast == "llama"
    if runs_triton(q):
        gains = (None if w is None else w.contiguous() for w in (q_weight, k_weight))
        return _NormRope.apply(q, k, *gains, cos, sin, float(eps), zero_centered, rounded)
    acc = accumulator(q.dtype)
    outputs = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y, _ = norm_reference(
            x, None, weight, None, "rmsnorm", False, eps, 1.0, 1.0, zero_centered, rounded, acc
        )
        outputs.append(rope_reference(y, cos, sin).to(q.dtype))
    return outputs[0], outputs[1]
