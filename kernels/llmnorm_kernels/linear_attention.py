"""Causal linear attention with its normalizer and its feature map, chunk by chunk: linear time, float32
state, packed documents, prefill and decode.

    S_t = S_{t-1} + k_t v_t^T,   z_t = z_{t-1} + k_t,   o_t = S_t^T q_t / (q_t . z_t + eps)

q and k are features, whose inner products are not negative: given, or formed inside the kernel,

    relu         phi(x) = relu(x)                                  SLA, arXiv 2405.11582
    relu_split   phi_q(q) = [f 1(q > 0); f 1(q < 0)],  f = (|q| / max |q|)^p,   p one exponent per query
                 phi_k(k) = [relu(k)^3; relu(-k)^3]                NaLaFormer, arXiv 2506.21137

each with a constant feature `floor` if that is not 0. The chunked form is the same sum: inside a chunk tril(Q
K^T), before it the state. A packed row holds several documents: sum and state stay inside one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .checks import check_floats, check_given, check_numbers
from .dispatch import INTERPRETED, accumulator, current_backend, operator, register, runs_triton
from .rope import empty_heads_like

REFERENCE_CHUNK = 64
WIDEST_HEAD = 256
# feature_map -> its number in the kernels, and features per entry of q
FEATURE_MAPS: dict[str | None, tuple[int, int]] = {None: (0, 1), "relu": (1, 1), "relu_split": (2, 2)}
RATIO_FLOOR = 1e-30
State = tuple[Tensor, Tensor]


def largest_magnitude(q: Tensor) -> Tensor:
    """max |q| of each query in float32 or wider, (batch, heads, time); a zero query has 1e-30."""
    top = q.abs().max(-1).values if q.shape[-1] else q.new_zeros(q.shape[:-1])
    return top.to(accumulator(q.dtype)).clamp_min(RATIO_FLOOR)


def mapped_features(
    q: Tensor, k: Tensor, feature_map: str | None, power: Tensor | None, floor: float
) -> tuple[Tensor, Tensor]:
    """phi_q(q) and phi_k(k) of the module's equations in the accumulator dtype."""
    q, k = q.to(accumulator(q.dtype)), k.to(accumulator(k.dtype))
    if feature_map == "relu":
        q, k = q.relu(), k.relu()
    if feature_map == "relu_split":
        assert power is not None
        ratio = (q.abs() / largest_magnitude(q).unsqueeze(-1)).clamp_min(RATIO_FLOOR)
        f = (power.to(q.dtype).unsqueeze(-1) * ratio.log()).exp()
        q = torch.cat((torch.where(q > 0, f, 0.0), torch.where(q < 0, f, 0.0)), -1)
        cube = k * k * k
        k = torch.cat((cube.clamp_min(0.0), (-cube).clamp_min(0.0)), -1)
    if floor:
        q, k = F.pad(q, (0, 1), value=floor), F.pad(k, (0, 1), value=floor)
    return q, k


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, state: Tensor | None, normalizer: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, final S, final z) of the first equation for features, in the accumulator dtype, chunk by chunk."""
    acc = accumulator(v.dtype)
    batch, groups, time, features = k.shape
    shared = q.shape[1] // groups
    s = q.new_zeros(batch, groups, features, v.shape[-1], dtype=acc) if state is None else state.to(acc)
    z = q.new_zeros(batch, groups, features, dtype=acc) if normalizer is None else normalizer.to(acc)
    if segments is None:
        segments = torch.zeros(batch, time, dtype=torch.int32, device=q.device)
    parts = [v.new_empty(batch, q.shape[1], 0, v.shape[-1], dtype=acc)]
    for start in range(0, time, REFERENCE_CHUNK):
        chunk = slice(start, start + REFERENCE_CHUNK)
        own = segments[:, chunk]
        before, last = segments[:, max(start - 1, 0)], own[:, -1]
        carries = (own == before[:, None])[:, None, :, None].to(acc)
        stays = (own == last[:, None])[:, None, :, None].to(acc)
        passes = (before == last)[:, None, None].to(acc)
        qc, kc, vc = (x[:, :, chunk].to(acc) for x in (q, k, v))
        keys, values, held, sums = (x.repeat_interleave(shared, 1) for x in (kc, vc, s, z))
        scores = (qc @ keys.mT).tril() * (own[:, None, :, None] == own[:, None, None, :])
        numerator = scores @ values + carries * (qc @ held)
        denominator = scores.sum(-1, keepdim=True) + carries * (qc @ sums.unsqueeze(-1))
        parts.append(numerator / (denominator + eps))
        kc = kc * stays
        s, z = s * passes.unsqueeze(-1) + kc.mT @ vc, z * passes + kc.sum(-2)
    return torch.cat(parts, 2).to(v.dtype), s, z


def _fake_forward(q, k, v, power, top, segments, state, normalizer, eps, floor, map_code, final):
    batch, heads, time, width = q.shape
    features = width * (2 if map_code == 2 else 1) + (floor != 0.0)
    shape = (batch, k.shape[1], features, v.shape[-1]) if final else (0,)
    den = q.new_empty((batch, heads, time), dtype=torch.float32)
    states = (q.new_empty(s, dtype=torch.float32) for s in (shape, shape[:3]))
    return (empty_heads_like(q, v.shape[-1]), den, *states)


def _fake_backward(do, o, den, q, k, v, power, top, segments, state, normalizer, eps, floor, map_code):
    rows = q.shape[:3] if map_code == 2 else (0,)
    dpower, dtop = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return (*(empty_heads_like(x) for x in (q, k, v)), dpower, dtop)


register(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? power, Tensor? top, Tensor? segments, "
    "Tensor? state, Tensor? normalizer, float eps, float floor, int map_code, bool final) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "linear_attention_launch:launch_attention",
    _fake_forward,
)
register(
    "linear_attention_backward(Tensor do, Tensor o, Tensor den, Tensor q, Tensor k, Tensor v, Tensor? power, "
    "Tensor? top, Tensor? segments, Tensor? state, Tensor? normalizer, float eps, float floor, int map_code) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "linear_attention_launch:launch_attention_backward",
    _fake_backward,
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, power: Tensor | None, top: Tensor | None,
        segments: Tensor | None, state: Tensor | None, normalizer: Tensor | None, eps: float, floor: float,
        map_code: int, final: bool,
    ) -> Any:  # fmt: skip
        constants = (segments, state, normalizer)
        o, den, s, z = torch.ops.llmnorm_kernels.linear_attention(
            q, k, v, power, top, *constants, eps, floor, map_code, final
        )
        ctx.save_for_backward(o, den, q, k, v, power, top, *constants)
        ctx.numbers = (eps, floor, map_code)
        ctx.mark_non_differentiable(s, z)
        return o, s, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, ds: Any, dz: Any) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
        *slopes, dpower, dtop = torch.ops.llmnorm_kernels.linear_attention_backward(do, *saved, *ctx.numbers)
        reads_rows = saved[5] is not None
        return (*slopes, *((dpower, dtop) if reads_rows else (None, None)), *(None,) * 7)


def _kernel_takes(q: Tensor, v: Tensor, halves: int) -> bool:
    """Whether the kernels serve these shapes and dtype; an error where they were asked for by name and do
    not."""
    # float32 products spill registers on NVIDIA; the interpreter has no registers, and its tests want exact
    # sums.
    dtypes = (torch.bfloat16, torch.float16, *((torch.float32,) if INTERPRETED else ()))
    if q.dtype in dtypes and max(halves * q.shape[-1], v.shape[-1]) <= WIDEST_HEAD:
        return True
    if current_backend() == "triton":
        raise ValueError(
            f"q has {halves * q.shape[-1]} features, v {v.shape[-1]} columns of {q.dtype}; the kernels take "
            f"up to {WIDEST_HEAD} of bfloat16 or float16 numbers; choose use_backend('auto')"
        )
    return False


@operator
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6, feature_map: str | None = None,
    exponent: Tensor | None = None, floor: float = 0.0, segments: Tensor | None = None,
    initial_state: State | None = None, return_state: bool = False,
) -> Any:  # fmt: skip
    """o of the module's equation; with `return_state` (o, (S, z)), from which the next call goes on.

    q: (batch, heads, time, width), k: (batch, groups, time, width), v: (batch, groups, time, columns), of one
    dtype, any strides with contiguous last dimension; heads is a multiple of groups, whose keys and values
    consecutive query heads share. feature_map: None for q and k that are features already, relu, or
    relu_split with `exponent`, p (batch, heads, time) > 0 of any floating dtype. floor: see above. segments
    (batch, time), integers: tokens with one number, which stand together, are one document; a given state
    belongs to the first token's. initial_state, the state returned: S (batch, groups, F, columns) and z
    (batch, groups, F) over the F features, float32 and constant for autograd: gradients reach q, k, v and
    exponent only. time = 1 with a state is a decoding step. o: (batch, heads, time, columns).

    The kernels take F without the floor and columns up to 256, of bfloat16 or float16; other inputs run on
    the reference (an error under backend triton). Matrix work per head and token, chunk C: C (F + V) + 2 F V
    multiply-adds. Raises ValueError for shapes, dtypes, eps, floor, and a map that is unknown or lacks its
    exponent.
    """
    _check(q, k, v, eps, feature_map, exponent, floor, segments)
    map_code, halves = FEATURE_MAPS[feature_map]
    features = halves * q.shape[-1] + (floor != 0.0)
    state, normalizer = _checked_state(initial_state, k, v, features)
    if segments is not None:
        segments = segments.to(torch.int32).contiguous()
    if runs_triton(q) and _kernel_takes(q, v, halves):
        top = None
        if exponent is not None:
            exponent, top = exponent.float().contiguous(), largest_magnitude(q)
        o, s, z = _LinearAttention.apply(
            q, k, v, exponent, top, segments, state, normalizer, float(eps), float(floor), map_code,
            return_state,
        )  # fmt: skip
    else:
        qf, kf = mapped_features(q, k, feature_map, exponent, floor)
        o, s, z = attention_reference(qf, kf, v, segments, state, normalizer, eps)
    return (o, (s.detach(), z.detach())) if return_state else o


def _check(
    q: Tensor, k: Tensor, v: Tensor, eps: float, feature_map: str | None, exponent: Tensor | None,
    floor: float, segments: Tensor | None,
) -> None:  # fmt: skip
    check_given(q=q, k=k, v=v)
    check_floats(q=q, k=k, v=v, exponent=exponent)
    rows = (q.shape[0], q.shape[2]) if q.dim() == 4 else None
    if rows is None or any(x.dim() != 4 or (x.shape[0], x.shape[2]) != rows for x in (k, v)) or (
        k.shape[-1] != q.shape[-1] or k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]
    ):  # fmt: skip
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; they must be (batch, "
            "heads, time, features), (batch, groups, time, features) and (batch, groups, time, columns), "
            "with groups a divisor of heads"
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must have one")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"q has {q.shape[-1]} features and v {v.shape[-1]} columns; neither may be zero")
    check_numbers(eps=eps, floor=floor)
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map={feature_map!r} is unknown; choose one of None, relu, relu_split")
    if (exponent is not None) != (feature_map == "relu_split"):
        raise ValueError(
            f"exponent is {'given' if exponent is not None else 'absent'} with feature_map={feature_map!r}; "
            "relu_split needs one exponent per query, the other maps take none"
        )
    if exponent is not None and exponent.shape != q.shape[:3]:
        raise ValueError(f"exponent has shape {tuple(exponent.shape)}; it must be {tuple(q.shape[:3])}")
    if segments is None:
        return
    check_given(segments=segments)
    if segments.shape != rows or segments.is_floating_point() or segments.device != q.device:
        raise ValueError(
            f"segments must be integers of shape {rows} on {q.device}, a number for each document; it is "
            f"{segments.dtype} {tuple(segments.shape)} on {segments.device}"
        )


def _checked_state(
    initial_state: State | None, k: Tensor, v: Tensor, features: int
) -> tuple[Tensor | None, Tensor | None]:
    if initial_state is None:
        return None, None
    if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
        raise ValueError("initial_state must be the pair (S, z) that return_state=True gives")
    state, normalizer = initial_state
    wanted = (*k.shape[:2], features, v.shape[-1])
    if state.shape != wanted or normalizer.shape != wanted[:3]:
        raise ValueError(
            f"initial_state has shapes {tuple(state.shape)} and {tuple(normalizer.shape)}; it must be "
            f"{wanted} and {wanted[:3]}"
        )
    if state.device != k.device or normalizer.device != k.device:
        raise ValueError(f"initial_state is on {state.device} but k is on {k.device}; move them together")
    acc = accumulator(k.dtype)
    return state.detach().to(acc).contiguous(), normalizer.detach().to(acc).contiguous()
