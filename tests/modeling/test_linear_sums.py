"""The sum behind linear attention: three algorithms, one result, its gradient, its state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmnorm.modeling.linear_attention import (
    ALGORITHMS,
    linear_attention,
    quadratic_sum,
    rotated_linear_attention,
)

DOUBLE = torch.float64
TIMES, CHUNKS = (1, 2, 63, 64, 65, 257, 1000), (16, 64, 128)
FAST = {(1, 16), (2, 16), (63, 16), (64, 64), (65, 64), (257, 128)}


def inputs(
    time: int, heads: int = 2, groups: int = 2, features: int = 6, width: int = 5, dtype: torch.dtype = DOUBLE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k with positive entries, v, and a state that such keys would leave."""
    generator = torch.Generator().manual_seed(time)
    q = torch.rand(2, heads, time, features, dtype=DOUBLE, generator=generator)
    k = torch.rand(2, groups, time, features, dtype=DOUBLE, generator=generator)
    v = torch.randn(2, groups, time, width, dtype=DOUBLE, generator=generator)
    state = torch.rand(2, groups, features, width + 1, dtype=DOUBLE, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype), state.to(dtype)


def gradients(
    x: tuple[Tensor, ...], algorithm: str, chunk: int = 64, segments: Tensor | None = None
) -> list[Tensor]:
    """Output, state, and the gradients of both with respect to q, k, v and the first state."""
    q, k, v, state = (y.clone().requires_grad_() for y in x)
    o, after = linear_attention(
        q, k, v, initial_state=state, algorithm=algorithm, chunk_size=chunk, segments=segments
    )
    (o.sin().sum() + (after * 0.01).cos().sum()).backward()
    return [o.detach(), after.detach(), *(y.grad for y in (q, k, v, state))]  # type: ignore[misc]


def assert_algorithms_agree(x: tuple[Tensor, ...], chunk: int, segments: Tensor | None = None) -> None:
    expected = gradients(x, "quadratic", segments=segments)
    for algorithm in set(ALGORITHMS) - {"quadratic"}:
        for one, other in zip(expected, gradients(x, algorithm, chunk, segments), strict=True):
            torch.testing.assert_close(other, one, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("time", "chunk"),
    [
        pytest.param(time, chunk, marks=[] if (time, chunk) in FAST else [pytest.mark.slow])
        for time, chunk in itertools.product(TIMES, CHUNKS)
    ],
)
def test_o2_1_the_algorithms_agree(time: int, chunk: int) -> None:
    """fp64: they differ by rounding, some 1e-13 here; gradients too."""
    assert_algorithms_agree(inputs(time), chunk)
    assert_algorithms_agree(inputs(time, heads=4, groups=2), chunk)


@pytest.mark.parametrize(
    ("head", "groups", "chunk"),
    [
        pytest.param(head, groups, chunk, marks=[] if (head, chunk) == (32, 64) else [pytest.mark.slow])
        for head, groups, chunk in itertools.product((32, 64, 128), (1, 2, 4), CHUNKS)
    ],
)
def test_o2_1_in_fp32_at_real_head_sizes(head: int, groups: int, chunk: int) -> None:
    """fp32 rounds at 6e-8 and some 130 terms are summed: 1e-5, for values of size 1."""
    q, k, v, _ = inputs(257 if head > 32 else 130, 4, groups, 2 * head, head, torch.float32)
    expected, state = linear_attention(q.double(), k.double(), v.double(), algorithm="quadratic")
    for algorithm in ALGORITHMS:
        o, after = linear_attention(q, k, v, algorithm=algorithm, chunk_size=chunk)
        torch.testing.assert_close(o.double(), expected, atol=1e-5, rtol=1e-5)
        # A sum of 257 terms that partly cancel: relative to the largest entry, of size 100.
        torch.testing.assert_close(after.double(), state, atol=1e-6 * state.abs().max().item(), rtol=0)


def test_o2_1_equals_the_definition() -> None:
    """The quadratic form itself against A = tril(q k^T), o = A v / (A 1 + eps), without a column of ones."""
    q, k, v, _ = inputs(20)
    scores = (q @ k.mT).tril()
    o, state = linear_attention(q, k, v, eps=1e-3, algorithm="quadratic")
    torch.testing.assert_close(o, scores @ v / (scores.sum(-1, keepdim=True) + 1e-3))
    torch.testing.assert_close(state, torch.cat((k.mT @ v, k.sum(2)[..., None]), -1))


def test_o2_2_gradcheck() -> None:
    q, k, v, state = (x[:1].requires_grad_() for x in inputs(5, heads=2, groups=1, features=3, width=2))

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(x[0], x[1], x[2], initial_state=x[3], chunk_size=2)

    assert torch.autograd.gradcheck(run, (q, k, v, state))


def test_o2_2_the_gradient_of_the_normalizer_is_there() -> None:
    """With v = 1 the output is 1 for any q and k, so their gradients vanish; without dD they would not."""
    q, k, _, _ = (x.clone().requires_grad_() for x in inputs(30))
    o, _ = linear_attention(q, k, torch.ones(2, 2, 30, 5, dtype=DOUBLE), eps=0.0, chunk_size=8)
    o.square().sum().backward()
    assert q.grad is not None and k.grad is not None
    assert q.grad.abs().max() < 1e-10
    assert k.grad.abs().max() < 1e-10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_o2_3_causality(algorithm: str) -> None:
    q, k, v, _ = inputs(40)
    o, _ = linear_attention(q, k, v, algorithm=algorithm, chunk_size=8)
    for place in (0, 7, 8, 25):
        moved = [x.clone() for x in (q, k, v)]
        for x in moved:
            x[:, :, place] += 1.0
        again, _ = linear_attention(*moved, algorithm=algorithm, chunk_size=8)
        assert torch.equal(again[:, :, :place], o[:, :, :place])
        assert not torch.equal(again[:, :, place:], o[:, :, place:])


def test_o2_3_no_gradient_reaches_the_future() -> None:
    q, k, v, _ = (x.clone().requires_grad_() for x in inputs(40))
    o, _ = linear_attention(q, k, v, chunk_size=8)
    o[:, :, :19].sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert x.grad[:, :, 19:].abs().max() == 0
        assert x.grad[:, :, :19].abs().max() > 0


def test_o2_4_constant_values_come_out() -> None:
    q, k, _, _ = inputs(70)
    k[:, :, ::3] = 0  # as padding is
    v = torch.full((2, 2, 70, 5), 3.0, dtype=DOUBLE)
    o, _ = linear_attention(q, k, v, eps=0.0)
    torch.testing.assert_close(o[:, :, 1:], v[:, :, 1:], atol=1e-12, rtol=0)


def test_o2_5_scales_of_features_cancel() -> None:
    q, k, v, _ = inputs(70)
    o, _ = linear_attention(q, k, v, eps=0.0)
    scaled, _ = linear_attention(q * torch.rand(2, 2, 70, 1).double() * 100, k * 1e-4, v, eps=0.0)
    torch.testing.assert_close(scaled, o, atol=1e-10, rtol=0)


@pytest.mark.parametrize("split", [0, 1, 7, 8, 9, 30])
def test_o2_6_split_and_resume(split: int) -> None:
    q, k, v, _ = inputs(31, heads=4)
    whole, state = linear_attention(q, k, v, chunk_size=8)
    parts, resumed = [], None
    if split:
        first, resumed = linear_attention(*(x[:, :, :split] for x in (q, k, v)), chunk_size=8)
        parts.append(first)
    for t in range(split, 31):
        step, resumed = linear_attention(*(x[:, :, t : t + 1] for x in (q, k, v)), initial_state=resumed)
        parts.append(step)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(resumed, state, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("chunk", [2, 16, 128])
def test_o2_7_documents_are_apart(chunk: int) -> None:
    """Against each document alone, values and gradients, with boundaries on and off those of chunks."""
    q, k, v, state = inputs(45, heads=4)
    lengths = (1, 15, 16, 13)
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).expand(2, -1)
    packed = gradients((q, k, v, state), "chunk", chunk, segments)
    start = 0
    for index, length in enumerate(lengths):
        part = tuple(x[:, :, start : start + length] for x in (q, k, v))
        first = state if index == 0 else torch.zeros_like(state)
        o, after = linear_attention(*part, initial_state=first, algorithm="quadratic")
        torch.testing.assert_close(packed[0][:, :, start : start + length], o, atol=1e-10, rtol=0)
        start += length
    torch.testing.assert_close(packed[1], after, atol=1e-10, rtol=0)
    assert_algorithms_agree((q, k, v, state), chunk, segments)


@pytest.mark.parametrize("steps", [1024, pytest.param(16_384, marks=pytest.mark.slow)])
def test_o2_8_a_long_decode_in_bf16(steps: int) -> None:
    """A bf16 z is off by 0.3 after 1,024 tokens; the fp32 one must stay below 1e-3."""
    generator = torch.Generator().manual_seed(0)
    k = torch.rand(steps, 8, generator=generator).bfloat16()
    state, exact = None, k.double().sum(0)
    for t in range(steps):
        x = k[t].view(1, 1, 1, 8)
        o, state = linear_attention(x, x, x[..., :2], initial_state=state)
    assert state is not None
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    error = (state[0, 0, :, -1].double() - exact).abs() / exact
    assert error.max() < 1e-3


def test_autocast_leaves_the_sums_in_fp32() -> None:
    q, k, v, _ = inputs(70, dtype=torch.float32)
    expected, _ = linear_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = linear_attention(q, k, v)
    assert torch.equal(o, expected)
    assert state.dtype == torch.float32


def test_rotation_of_the_numerator_alone() -> None:
    """Unrotated features on both sides give the plain form; z always sums unrotated keys."""
    q, k, v, _ = inputs(30, heads=4)
    plain, state = linear_attention(q, k, v)
    same, after = rotated_linear_attention(q, k, q, k, v)
    torch.testing.assert_close(same, plain)
    torch.testing.assert_close(after, state)
    o, after = rotated_linear_attention(q, k, -q, k, v)
    torch.testing.assert_close(o, -plain)
    torch.testing.assert_close(after[..., -1], k.sum(2))


def test_queries_that_share_keys_agree_with_repeated_keys() -> None:
    q, k, v, _ = inputs(50, heads=6, groups=2)
    shared, _ = linear_attention(q, k, v)
    repeated, _ = linear_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(shared, repeated)


def test_the_definition_is_what_the_kernel_package_computes() -> None:
    """Same function name, same equation: the reference of llmnorm_kernels."""
    kernels = pytest.importorskip("llmnorm_kernels")
    q, k, v, _ = inputs(70)
    expected, (s, z) = kernels.linear_attention(q, k, v, eps=1e-6, return_state=True)
    o, state = linear_attention(q, k, v, eps=1e-6)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, torch.cat((s, z[..., None]), -1))


def test_cost_grows_with_the_length() -> None:
    """Multiply-adds of the chunked form, counted: 4 times the tokens cost 4 times, not 16."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(time: int) -> int:
        q, k, v, _ = inputs(time, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            linear_attention(q, k, F.pad(v, (0, 0)))
        return counter.get_total_flops()

    assert flops(1024) == 4 * flops(256) > 0
    with FlopCounterMode(display=False) as counter:
        q, k, v, state = inputs(256, dtype=torch.float32)
        quadratic_sum(q, k, F.pad(v, (0, 1)), state)
    assert counter.get_total_flops() > 2 * flops(256)
