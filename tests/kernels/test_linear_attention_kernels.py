"""The linear-attention kernels against the float64 reference: outputs, gradients, states, layouts."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_matches_reference, outputs_and_gradients, relative_error

import llmnorm_kernels as kernels
from llmnorm_kernels import use_backend
from llmnorm_kernels.linear_attention import largest_magnitude

OPS = torch.ops.llmnorm_kernels


def operands(batch, heads, time, features, width, dtype, device):
    """Features as a ReLU map makes them, with a floor that keeps the denominators away from zero."""
    q, k = (torch.rand(batch, time, heads, features, device=device).add(0.05).to(dtype) for _ in range(2))
    v = torch.randn(batch, time, heads, width, device=device).to(dtype)
    return [x.transpose(1, 2) for x in (q, k, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("time", "features", "width"),
    [(3, 16, 16), (65, 24, 20), pytest.param(130, 32, 70, marks=pytest.mark.slow)],
)
def test_outputs_and_gradients(device, time, features, width, dtype):
    # 16-bit: the operands of every product are rounded once more (scores, states, slopes), a few 2^-9.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    given = operands(2, 2, time, features, width, dtype, device)
    assert_matches_reference(kernels.linear_attention, *given, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("features", "width"), [(128, 64), (256, 128), (64, 256), (130, 130)])
def test_wide_heads(device, features, width):
    given = operands(1, 2, 70, features, width, torch.float32, device)
    assert_matches_reference(kernels.linear_attention, *given, tolerance=5e-5)


@pytest.mark.parametrize(("split", "time"), [(0, 3), (1, 3), (31, 34), (32, 34), (33, 34)])
def test_prefill_then_decode_equals_one_run(device, split, time):
    q, k, v = operands(1, 2, time, 16, 16, torch.float32, device)
    whole, state = kernels.linear_attention(q, k, v, return_state=True)
    parts = [x[:, :, :split] for x in (q, k, v)]
    first, carried = kernels.linear_attention(*parts, return_state=True)
    outputs = [first]
    for t in range(split, time):
        one, carried = kernels.linear_attention(
            *(x[:, :, t : t + 1] for x in (q, k, v)), initial_state=carried, return_state=True
        )
        outputs.append(one)
    assert relative_error(torch.cat(outputs, 2), whole) < 1e-5
    for a, b in zip(carried, state, strict=True):
        assert relative_error(a, b) < 1e-5


def test_gradients_with_an_initial_state(device):
    given = operands(1, 2, 70, 16, 24, torch.float32, device)
    state = torch.rand(1, 2, 16, 24, device=device), torch.rand(1, 2, 16, device=device) * 3

    def call(q, k, v):
        return kernels.linear_attention(q, k, v, initial_state=state)

    assert_matches_reference(call, *given, tolerance=2e-5)


def test_causal_and_constant_values(device):
    q, k, v = operands(1, 1, 70, 16, 16, torch.float32, device)
    before = kernels.linear_attention(q, k, v)
    changed = v.clone()
    changed[:, :, 40:] += 5.0
    assert torch.equal(kernels.linear_attention(q, k, changed)[:, :, :40], before[:, :, :40])
    ones = kernels.linear_attention(q, k, torch.ones_like(v), eps=0.0)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-5)


def test_no_tokens_and_refusals(device):
    q, k, v = operands(2, 2, 0, 16, 16, torch.float32, device)
    assert kernels.linear_attention(q, k, v).shape == (2, 2, 0, 16)
    big = torch.ones(1, 1, 2, 300, device=device)
    with pytest.raises(ValueError, match="300 features"):
        kernels.linear_attention(big, big, big)


def test_one_token_attends_to_itself(device):
    """o = v whatever q and k are, so their gradients vanish: what is left is eps and the rounding of the
    terms."""
    given = operands(1, 1, 1, 16, 16, torch.float32, device)
    (o,), (dq, dk, dv), (up,) = outputs_and_gradients(kernels.linear_attention, given)
    torch.testing.assert_close(o, given[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dv, up, rtol=1e-5, atol=1e-6)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


def test_compiles_to_one_graph(device):
    given = operands(1, 2, 20, 16, 16, torch.float32, device)
    eager = outputs_and_gradients(kernels.linear_attention, given)
    torch._dynamo.reset()
    compiled = torch.compile(kernels.linear_attention, fullgraph=True, backend="aot_eager")
    traced = outputs_and_gradients(compiled, given)
    assert all(torch.equal(a, b) for a, b in zip(eager[0] + eager[1], traced[0] + traced[1], strict=True))


def raw_operands(heads, groups, time, width, columns, dtype, device, feature_map):
    """(q, k, v, exponent or None) as a projection leaves them, of both signs; one query is zero."""
    q = torch.randn(1, time, heads, width, device=device)
    q[:, time // 2 : time // 2 + 1] = 0
    k, v = (torch.randn(1, time, groups, size, device=device) for size in (width, columns))
    p = torch.rand(1, heads, time, device=device) * 3 + 1 if feature_map == "relu_split" else None
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v)] + [p]


def documents(time, *starts, device):
    """Numbers that grow at each start, as packed documents have."""
    return torch.tensor([[sum(t >= start for start in starts) for t in range(time)]], device=device)


@pytest.mark.parametrize(
    ("feature_map", "floor", "packed", "dtype"),
    [
        ("relu_split", 0.3, True, torch.float32),
        ("relu_split", 0.0, False, torch.float32),
        ("relu_split", 0.1, True, torch.bfloat16),
        ("relu", 0.2, True, torch.float32),
        pytest.param("relu", 0.0, False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("relu_split", 0.2, False, torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_maps_documents_and_shared_keys(device, feature_map, floor, packed, dtype):
    """Outputs and the gradients of q, k, v and the exponents, two query heads on each key head.

    A boundary inside a chunk, one at a chunk's end (32), a document of one token, one over two chunks.
    """
    given = raw_operands(2, 1, 75, 20, 24, dtype, device, feature_map)
    segments = documents(75, 5, 6, 32, 72, device=device) if packed else None

    def call(q, k, v, p):
        return kernels.linear_attention(
            q, k, v, feature_map=feature_map, exponent=p, floor=floor, segments=segments, eps=1e-2
        )

    # As in `test_outputs_and_gradients`; here the features are rounded as well.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    assert_matches_reference(call, *given, tolerance=tolerance)


def test_a_document_does_not_feel_the_others(device):
    """To the last bit, outputs and gradients: another first document, and a given state, change nothing."""
    segments = documents(40, 9, 36, device=device)

    def run(first):
        q, k, v, p = raw_operands(2, 1, 40, 16, 16, torch.float32, device, "relu_split")
        for x in (k, v):
            x[:, :, :9] = first
        leaves = [x.requires_grad_() for x in (q, k, v)]
        state = (
            torch.full((1, 1, 33, 16), first, device=device),
            torch.full((1, 1, 33), first, device=device),
        )
        o, final = kernels.linear_attention(
            *leaves, feature_map="relu_split", exponent=p, floor=0.5, segments=segments, initial_state=state,
            return_state=True,
        )  # fmt: skip
        gradients = torch.autograd.grad(o[:, :, 9:].square().sum(), leaves)
        return [o[:, :, 9:], *final, *(x[:, :, 9:] for x in gradients)], [x[:, :, :9] for x in gradients]

    torch.manual_seed(0)
    plain, early = run(1.0)
    torch.manual_seed(0)
    moved, _ = run(3.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))
    assert all((x == 0).all() for x in early), "no gradient reaches the first document"


def test_decoding_with_a_map_goes_on_where_the_prefill_stopped(device):
    q, k, v, p = raw_operands(2, 1, 36, 16, 16, torch.float32, device, "relu_split")
    options = {"feature_map": "relu_split", "floor": 0.3, "return_state": True, "eps": 1e-2}
    whole, state = kernels.linear_attention(q, k, v, exponent=p, **options)
    first, carried = kernels.linear_attention(
        *(x[:, :, :34] for x in (q, k, v)), exponent=p[..., :34], **options
    )
    parts = [first]
    for t in (34, 35):
        one = [x[:, :, t : t + 1] for x in (q, k, v)]
        o, carried = kernels.linear_attention(
            *one, exponent=p[..., t : t + 1], initial_state=carried, **options
        )
        parts.append(o)
    assert relative_error(torch.cat(parts, 2), whole) < 1e-5
    with use_backend("torch"):
        _, expected = kernels.linear_attention(q, k, v, exponent=p, **options)
    for a, b, c in zip(carried, state, expected, strict=True):
        assert a.shape == c.shape and relative_error(a, c) < 1e-5 and relative_error(b, c) < 1e-5


def test_an_empty_continuation_keeps_the_state(device):
    q, k, v, _ = raw_operands(2, 2, 0, 16, 16, torch.float32, device, None)
    state = torch.rand(1, 2, 16, 16, device=device), torch.rand(1, 2, 16, device=device)
    o, final = kernels.linear_attention(q, k, v, initial_state=state, return_state=True)
    assert o.shape == (1, 2, 0, 16)
    assert all(torch.equal(a, b) for a, b in zip(final, state, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("feature_map", [None, "relu_split"])
def test_opcheck(device, feature_map):
    q, k, v, p = raw_operands(2, 1, 20, 16, 16, torch.float32, device, feature_map)
    rows = (None, None) if p is None else (p, largest_magnitude(q))
    map_code = 0 if p is None else 2
    segments = documents(20, 7, device=device).int()
    given = (
        q.abs() if p is None else q,
        k.abs() if p is None else k,
        v,
        *rows,
        segments,
        None,
        None,
        1e-6,
        0.5,
    )
    torch.library.opcheck(OPS.linear_attention.default, (*given, map_code, True))
    o, den, _, _ = OPS.linear_attention(*given, map_code, False)
    torch.library.opcheck(OPS.linear_attention_backward.default, (o, o, den, *given, map_code))


def test_reference_agrees_on_the_same_backend_switch(device):
    given = operands(1, 1, 5, 16, 16, torch.float32, device)
    with use_backend("torch"):
        plain, (s, z) = kernels.linear_attention(*given, return_state=True)
    fused, (fused_s, fused_z) = kernels.linear_attention(*given, return_state=True)
    for a, b in ((fused, plain), (fused_s, s), (fused_z, z)):
        assert relative_error(a, b) < 1e-5
