"""Causal linear attention with its normalizer: one function, computed at once, by token or by chunk.

    S_t = S_{t-1} + k_t v_t^T,   z_t = z_{t-1} + k_t,   o_t = S_t^T q_t / (q_t . z_t + eps)

(Transformers are RNNs, arXiv 2006.16236; chunks as in GLA, arXiv 2312.06635.) q and k are features whose
inner products are not negative. A column of ones joined to v makes the normalizer one more value, so that
one sum, its state [S | z] and its gradient serve both.

Shapes: B sequences, T tokens, H query heads, G key-value heads (H is a multiple of G), R = H / G, K features,
V values, W = V + 1, C tokens a chunk, N chunks. Sums are fp32 or wider, whatever the dtype of q, k, v: in
bf16 a normalizer of some hundred tokens stops growing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .fused import kernels, serves

CHUNK_SIZE = 64
WIDEST_KERNEL_HEAD = 256  # features or values that the Triton kernels take
KERNEL_DTYPES = (torch.bfloat16, torch.float16)


def quadratic_sum(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """n_t = q_t (state + sum_{j <= t} k_j v_j^T) through all T * T scores: the definition, for tests.

    q [B, H, T, K], k [B, G, T, K], v [B, G, T, W], state [B, G, K, W] -> n [B, H, T, W], state after T.
    segments [B, T], a number that grows at each document's first token: scores and state stay inside one.
    """
    groups = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ keys.mT).tril()
    reach = q.new_ones(q.shape[0], q.shape[2])
    last = reach
    if segments is not None:
        scores = scores * (segments[:, None, :, None] == segments[:, None, None, :])
        reach, last = (segments == segments[:, :1]).to(q.dtype), (segments == segments[:, -1:]).to(q.dtype)
    n = scores @ values + (q * reach[:, None, :, None]) @ state.repeat_interleave(groups, 1)
    return n, state * reach[:, -1, None, None, None] + (k * last[:, None, :, None]).mT @ v


def recurrent_sum(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quadratic_sum` token by token: what decoding does."""
    rows = []
    for t in range(q.shape[2]):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1]).to(q.dtype)[:, None, None, None]
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        query = q[:, :, t].unflatten(1, (k.shape[1], -1))  # [B, G, R, K]
        rows.append((query @ state).flatten(1, 2))
    return torch.stack(rows, 2), state


class _Boundaries(NamedTuple):
    """What document boundaries cut, as factors 0 and 1; None where there are none.

    same [B, 1, N, R * C, C]: the row's token and the column's are in one document. carry [B, 1, N, R * C, 1]:
    no boundary from the chunk's start to the row. last [B, 1, N, C, 1]: none from the row to the chunk's end.
    keep [B, 1, N, 1, 1]: none in the chunk, so that the state passes through it.
    """

    same: Tensor
    carry: Tensor
    last: Tensor
    keep: Tensor


def _boundaries(segments: Tensor | None, chunk: int, repeats: int, dtype: torch.dtype) -> _Boundaries | None:
    if segments is None:
        return None
    filling = segments[:, -1:].expand(-1, -segments.shape[1] % chunk)
    rows = torch.cat((segments, filling), 1).unflatten(1, (-1, chunk))  # [B, N, C]
    before = torch.cat((rows[:, :1, 0], rows[:, :-1, -1]), 1)  # the document that the state is of
    same = rows[..., :, None] == rows[..., None, :]
    carry = (rows == before[..., None])[..., None]
    last = (rows == rows[..., -1:])[..., None]
    keep = (before == rows[..., -1])[..., None, None]
    return _Boundaries(
        same.repeat(1, 1, repeats, 1)[:, None].to(dtype),
        carry.repeat(1, 1, repeats, 1)[:, None].to(dtype),
        last[:, None].to(dtype),
        keep[:, None].to(dtype),
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for stacks of matrices, as an operation that selective checkpointing does not keep.

    The T * C scores and the N states are cheap to compute again and larger than all that enters them.
    """
    result = torch.baddbmm(a.new_empty(1, 1, 1), a.flatten(0, -3), b.flatten(0, -3), beta=0)
    return result.unflatten(0, a.shape[:-2])


def _rows(x: Tensor, groups: int, chunk: int) -> Tensor:
    """[B, G * R, T, F] -> [B, G, N, R * C, F], T filled up with zeros: a chunk's rows of all heads that share
    keys, under each other.
    """
    x = F.pad(x, (0, 0, 0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk)).unflatten(1, (groups, -1))
    return x.transpose(2, 3).flatten(3, 4)


def _unrows(x: Tensor, repeats: int, time: int) -> Tensor:
    """The inverse of `_rows`."""
    return x.unflatten(3, (repeats, -1)).transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :time]


def _causal_scores(rows: Tensor, columns: Tensor, repeats: int, cut: _Boundaries | None) -> Tensor:
    """tril(rows columns^T) in each chunk, inside documents: [B, G, N, R * C, C]."""
    scores = _product(rows, columns.mT)
    scores.unflatten(3, (repeats, -1)).tril_()
    return scores if cut is None else scores.mul_(cut.same)


def _states_before(updates: Tensor, first: Tensor, cut: _Boundaries | None) -> tuple[Tensor, Tensor]:
    """From each chunk's update [B, G, N, K, W]: the state before each chunk, and the state after the last."""
    if cut is None:
        after = updates.cumsum(2).add_(first.unsqueeze(2))
        return torch.cat((first.unsqueeze(2), after[:, :, :-1]), 2), after[:, :, -1].clone()
    before = torch.empty_like(updates)
    for index in range(updates.shape[2]):
        before[:, :, index] = first
        first = first * cut.keep[:, :, index] + updates[:, :, index]
    return before, first


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _ChunkedSum(torch.autograd.Function):
    """`quadratic_sum` in linear time, keeping q, k, v for the backward and nothing as large as a state.

        in a chunk, A = tril(Q K^T):  n = A V + Q S,   S <- S + K^T V
        backward, D = tril(dn V^T), R = dL/dS after the chunk, seeded by the gradient of the final state:
        dQ = D K + dn S^T,   dK = D^T Q + V R^T,   dV = A^T dn + K R,   R <- R + Q^T dn

    With the column of ones in v, dn holds the normalizer's gradient and both equations are complete.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor | None,
        segments: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, state, segments)
        ctx.chunk = chunk
        state = _zero_state(k, v) if state is None else state
        groups, repeats, time = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        cut = _boundaries(segments, chunk, repeats, q.dtype)
        qs, ks, vs = _rows(q, groups, chunk), _rows(k, groups, chunk), _rows(v, groups, chunk)
        updates = _product(ks.mT, _times(vs, cut and cut.last))
        before, final = _states_before(updates, state, cut)
        n = _product(_causal_scores(qs, ks, repeats, cut), vs)
        n += _product(_times(qs, cut and cut.carry), before)
        return _unrows(n, repeats, time), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, given, segments = ctx.saved_tensors
        chunk, state = ctx.chunk, _zero_state(k, v) if given is None else given
        groups, repeats, time = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
        cut = _boundaries(segments, chunk, repeats, q.dtype)
        qs, ks, vs = _rows(q, groups, chunk), _rows(k, groups, chunk), _rows(v, groups, chunk)
        dn = _rows(grad_outputs[0], groups, chunk)
        last, carry = (cut.last, cut.carry) if cut is not None else (None, None)

        before, _ = _states_before(_product(ks.mT, _times(vs, last)), state, cut)
        slopes = _causal_scores(dn, vs, repeats, cut)
        dq = _product(slopes, ks) + _times(_product(dn, before.mT), carry)
        dk = _product(slopes.mT, qs)
        del slopes, before
        after, dstate = _slopes_after(_product(_times(qs, carry).mT, dn), grad_outputs[1], cut)
        dk += _times(_product(vs, after.mT), last)
        dv = _product(_causal_scores(qs, ks, repeats, cut).mT, dn) + _times(_product(ks, after), last)
        slope = None if given is None else dstate
        return _unrows(dq, repeats, time), _unrows(dk, 1, time), _unrows(dv, 1, time), slope, None, None


def _slopes_after(updates: Tensor, final: Tensor, cut: _Boundaries | None) -> tuple[Tensor, Tensor]:
    """`_states_before` from the end: dL/dS after each chunk, and dL/dS before the first."""
    if cut is None:
        slopes, first = _states_before(updates.flip(2), final, None)
        return slopes.flip(2), first
    after = torch.empty_like(updates)
    for index in reversed(range(updates.shape[2])):
        after[:, :, index] = final
        final = final * cut.keep[:, :, index] + updates[:, :, index]
    return after, final


def chunked_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """`quadratic_sum` in T (C (K + W) / 2 + 2 K W) multiply-adds for each head, where the other needs
    T^2 (K + W) / 2.
    """
    chunk = min(chunk_size, 1 << max(q.shape[2] - 1, 0).bit_length())
    return _ChunkedSum.apply(q, k, v, state, segments, chunk)


ALGORITHMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "chunk": chunked_sum,
    "recurrent": recurrent_sum,
    "quadratic": quadratic_sum,
}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    algorithm: str = "chunk",
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """(o, state): the equation of this file and [S | z] after the last token, from which the next call goes
    on.

    q [B, H, T, K] and k [B, G, T, K] features, v [B, G, T, V] -> o [B, H, T, V] in the dtype of v, state
    [B, G, K, V + 1] in fp32 (fp64 for fp64). initial_state: such a state, zero if there is none. segments
    [B, T]: see `quadratic_sum`. chunk_size: a power of two. All three algorithms are differentiable in q, k,
    v and the initial state. On a GPU, bf16 and fp16 values run on the Triton kernels of llmnorm_kernels where
    that is installed; there a given initial state is a constant.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    if algorithm == "chunk" and kernel_takes(v, q.shape[-1]):
        q, k = q.to(v.dtype), k.to(v.dtype)
        return kernel_linear_attention(q, k, v, eps=eps, initial_state=initial_state, segments=segments)
    with torch.autocast(q.device.type, enabled=False):
        q, k, values = q.to(wide), k.to(wide), F.pad(v.to(wide), (0, 1), value=1.0)
        n, state = _sum(q, k, values, initial_state, segments, algorithm, chunk_size)
        return (n[..., :-1] / (n[..., -1:] + eps)).to(v.dtype), state


def rotated_linear_attention(
    q: Tensor,
    k: Tensor,
    q_rotated: Tensor,
    k_rotated: Tensor,
    v: Tensor,
    *,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """`linear_attention` with rotary positions on the features of the numerator alone, as RoFormer (arXiv
    2104.09864) and NaLaFormer's code have it.

    q and k are features, q_rotated and k_rotated the same with positions; the state's z sums k. The weights
    of a row may be negative and need not sum to 1, so an output norm must follow.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        q, k, q_rotated, k_rotated = (x.to(wide) for x in (q, k, q_rotated, k_rotated))
        ones = v.new_ones((*v.shape[:3], 1), dtype=wide)
        s = z = None
        if initial_state is not None:
            s, z = initial_state[..., :-1], initial_state[..., -1:]
        numerator, s = _sum(q_rotated, k_rotated, v.to(wide), s, segments, "chunk", chunk_size)
        denominator, z = _sum(q, k, ones, z, segments, "chunk", chunk_size)
        return (numerator / (denominator + eps)).to(v.dtype), torch.cat((s, z), -1)


def _zero_state(k: Tensor, values: Tensor) -> Tensor:
    return k.new_zeros(k.shape[0], k.shape[1], k.shape[3], values.shape[3])


def _sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    algorithm: str,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    if algorithm == "chunk" and (q.shape[2] > 1 or segments is not None):
        return chunked_sum(q, k, v, state, segments, chunk_size)
    state = _zero_state(k, v) if state is None else state
    if q.shape[2] == 1 and segments is None:
        return recurrent_sum(q, k, v, state)
    return ALGORITHMS[algorithm](q, k, v, state, segments)


def kernel_takes(v: Tensor, features: int) -> bool:
    """Whether the Triton kernels take these values and this number of features."""
    return serves(v) and v.dtype in KERNEL_DTYPES and max(features, v.shape[-1]) <= WIDEST_KERNEL_HEAD


def kernel_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`linear_attention` by the kernels, for values that `kernel_takes`; q, k, v of one dtype.

    options: eps and segments; with feature_map, exponent [B, H, T] and floor, q and k are mapped there too.
    """
    given = None if initial_state is None else (initial_state[..., :-1], initial_state[..., -1])
    o, (s, z) = kernels.linear_attention(q, k, v, initial_state=given, return_state=True, **options)
    return o, torch.cat((s, z.unsqueeze(-1)), -1)
