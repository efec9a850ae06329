"""Causal linear attention with its normalizer, chunk by chunk: linear time, float32 state, prefill and
decode.

    S_t = S_{t-1} + k_t v_t^T,   z_t = z_{t-1} + k_t,   o_t = S_t^T q_t / (q_t . z_t + eps)

q and k are the mapped features (ReLU of SLA, arXiv 2405.11582; norm-aware powers of NaLaFormer, arXiv
2506.21137), whose inner products are not negative. The chunked form is the same sum: inside a chunk tril(Q
K^T), before it the state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import (
    INTERPRETED,
    accumulator,
    check_floats,
    current_backend,
    operator,
    register,
    runs_triton,
)
from .rope import empty_heads_like

REFERENCE_CHUNK = 64
WIDEST_HEAD = 256
State = tuple[Tensor, Tensor]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, normalizer: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final S, final z) of the module's equation in the accumulator dtype, chunk by chunk."""
    acc = accumulator(v.dtype)
    batch, heads, time, features = q.shape
    s = q.new_zeros(batch, heads, features, v.shape[-1], dtype=acc) if state is None else state.to(acc)
    z = q.new_zeros(batch, heads, features, dtype=acc) if normalizer is None else normalizer.to(acc)
    parts = [v.new_empty(batch, heads, 0, v.shape[-1], dtype=acc)]
    for start in range(0, time, REFERENCE_CHUNK):
        qc, kc, vc = (x[:, :, start : start + REFERENCE_CHUNK].to(acc) for x in (q, k, v))
        scores = (qc @ kc.mT).tril()
        numerator = scores @ vc + qc @ s
        denominator = scores.sum(-1, keepdim=True) + qc @ z.unsqueeze(-1)
        parts.append(numerator / (denominator + eps))
        s, z = s + kc.mT @ vc, z + kc.sum(-2)
    return torch.cat(parts, 2).to(v.dtype), s, z


def _fake_forward(q, k, v, state, normalizer, eps, final):
    batch, heads, time, features = q.shape
    shape = (batch, heads, features, v.shape[-1]) if final else (0,)
    den = q.new_empty((batch, heads, time), dtype=torch.float32)
    states = (q.new_empty(s, dtype=torch.float32) for s in (shape, shape[:3]))
    return (empty_heads_like(v), den, *states)


register(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? state, Tensor? normalizer, float eps, "
    "bool final) -> (Tensor, Tensor, Tensor, Tensor)",
    "linear_attention_kernels:launch_attention",
    _fake_forward,
)
register(
    "linear_attention_backward(Tensor do, Tensor o, Tensor den, Tensor q, Tensor k, Tensor v, Tensor? state, "
    "Tensor? normalizer, float eps) -> (Tensor, Tensor, Tensor)",
    "linear_attention_kernels:launch_attention_backward",
    lambda do, o, den, q, k, v, state, normalizer, eps: tuple(empty_heads_like(x) for x in (q, k, v)),
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        normalizer: Tensor | None,
        eps: float,
        final: bool,
    ) -> Any:
        o, den, s, z = torch.ops.llmnorm_kernels.linear_attention(q, k, v, state, normalizer, eps, final)
        ctx.save_for_backward(o, den, q, k, v, state, normalizer)
        ctx.eps = eps
        ctx.mark_non_differentiable(s, z)
        return o, s, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, ds: Any, dz: Any) -> Any:
        return (
            *torch.ops.llmnorm_kernels.linear_attention_backward(do, *ctx.saved_tensors, ctx.eps),
            *(None,) * 4,
        )


def _kernel_takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels serve these shapes and dtype; an error where they were asked for by name and do
    not."""
    # float32 products spill registers on NVIDIA; the interpreter has no registers, and its tests want exact
    # sums.
    dtypes = (torch.bfloat16, torch.float16, *((torch.float32,) if INTERPRETED else ()))
    if q.dtype in dtypes and max(q.shape[-1], v.shape[-1]) <= WIDEST_HEAD:
        return True
    if current_backend() == "triton":
        raise ValueError(
            f"q has {q.shape[-1]} features, v {v.shape[-1]} columns of {q.dtype}; the kernels take up to "
            f"{WIDEST_HEAD} of bfloat16 or float16 numbers; choose use_backend('auto')"
        )
    return False


@operator
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    initial_state: State | None = None,
    return_state: bool = False,
) -> Any:
    """o of the module's equation; with `return_state` (o, (S, z)), from which the next call goes on.

    q, k: (batch, heads, time, features), v: (batch, heads, time, width), of one dtype, any strides with
    contiguous last dimension. initial_state, the state returned: S (batch, heads, features, width) and z
    (batch, heads, features), float32 and constant for autograd: gradients reach q, k, v only. time = 1 with a
    state is a decoding step. The kernels take features and
    width up to 256 of bfloat16 or float16; other inputs run on the reference (an error under backend triton).
    Matrix work per head and token, chunk C: C (K + V) + 2 K V multiply-adds. Raises ValueError for shapes,
    dtypes, eps.
    """
    check_floats(q=q, k=k, v=v)
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "they must be (batch, heads, time, features) twice and (batch, heads, time, width)"
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must have one")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"q has {q.shape[-1]} features and v {v.shape[-1]} columns; neither may be zero")
    if not eps >= 0.0:
        raise ValueError(f"eps={eps} must be zero or positive")
    batch, heads, _, features = q.shape
    state, normalizer = initial_state if initial_state is not None else (None, None)
    if state is not None and normalizer is not None:
        if state.shape != (batch, heads, features, v.shape[-1]) or normalizer.shape != (
            batch,
            heads,
            features,
        ):
            raise ValueError(
                f"initial_state has shapes {tuple(state.shape)} and {tuple(normalizer.shape)}; it must be "
                f"{(batch, heads, features, v.shape[-1])} and {(batch, heads, features)}"
            )
        state, normalizer = (x.detach().to(accumulator(q.dtype)).contiguous() for x in (state, normalizer))
    if runs_triton(q) and _kernel_takes(q, v):
        o, s, z = _LinearAttention.apply(q, k, v, state, normalizer, float(eps), return_state)
    else:
        o, s, z = attention_reference(q, k, v, state, normalizer, eps)
    return (o, (s.detach(), z.detach())) if return_state else o
