"""The linear-attention kernels against the float64 reference: outputs, gradients, states, layouts."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_matches_reference, outputs_and_gradients, relative_error

import llmnorm_kernels as kernels
from llmnorm_kernels import use_backend

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


@pytest.mark.slow
def test_opcheck(device):
    given = operands(1, 2, 20, 16, 16, torch.float32, device)
    torch.library.opcheck(OPS.linear_attention.default, (*given, None, None, 1e-6, True))
    o, den, _, _ = OPS.linear_attention(*given, None, None, 1e-6, False)
    torch.library.opcheck(OPS.linear_attention_backward.default, (o, o, den, *given, None, None, 1e-6))


def test_reference_agrees_on_the_same_backend_switch(device):
    given = operands(1, 1, 5, 16, 16, torch.float32, device)
    with use_backend("torch"):
        plain, (s, z) = kernels.linear_attention(*given, return_state=True)
    fused, (fused_s, fused_z) = kernels.linear_attention(*given, return_state=True)
    for a, b in ((fused, plain), (fused_s, s), (fused_z, z)):
        assert relative_error(a, b) < 1e-5
