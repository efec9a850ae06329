"""The kernels of swiglu, apply_rope and qk_norm_rope against the float64 reference, and inside autograd and
compile."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_matches_reference, outputs_and_gradients
from torch.utils.checkpoint import checkpoint

import llmnorm_kernels as kernels

OPS = torch.ops.llmnorm_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "sigmoid"])
def test_gated_activations(device, activation, dtype):
    gate, up = (torch.randn(3, 5, 129, device=device).to(dtype) for _ in range(2))
    assert_matches_reference(lambda g, u: kernels.swiglu(g, u, activation=activation), gate, up)


@pytest.mark.parametrize("width", [1, 64, 1000, 2730])
def test_gated_packed(device, width):
    packed = torch.randn(2, 3, 2 * width, device=device).bfloat16()
    assert_matches_reference(kernels.swiglu, packed)


@pytest.mark.parametrize("layout", ["halves", "transposed", "expanded", "shifted", "empty"])
def test_gated_layouts(device, layout):
    gate, up = torch.randn(6, 80, device=device).chunk(2, -1)
    if layout == "transposed":
        gate = torch.randn(40, 6, device=device).t()
    elif layout == "expanded":
        up = torch.randn(6, 1, device=device).expand(6, 40)
    elif layout == "shifted":
        gate = torch.randn(241, device=device)[1:].view(6, 40)
    elif layout == "empty":
        gate, up = gate[:0], up[:0]
    assert_matches_reference(kernels.swiglu, gate, up)


def test_gated_extreme_gates(device):
    """exp overflows beyond 88 in float32; the limits of silu and of its derivative are finite."""
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=device, requires_grad=True)
    y = kernels.swiglu(gate, torch.ones_like(gate))
    y.sum().backward()
    assert torch.equal(y.detach().cpu(), torch.tensor([-0.0, -0.0, 0.0, 100.0, 1e4]))
    assert torch.equal(gate.grad.cpu(), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_gated_beyond_32_bit_offsets(device):
    gate = torch.empty_strided((3, 64), (2**30, 1), dtype=torch.bfloat16, device=device)
    gate.copy_(torch.randn(3, 64))
    assert_matches_reference(kernels.swiglu, gate, torch.randn(3, 64, device=device).bfloat16())


def heads(batch, count, time, dim, dtype, device, layout="bthd"):
    if layout == "bthd":
        return torch.randn(batch, time, count, dim, device=device).to(dtype).transpose(1, 2)
    return torch.randn(batch, count, time, dim, device=device).to(dtype)


def angles(time, dim, device, batch=None):
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    position = torch.arange(time, device=device, dtype=torch.float64)
    if batch is not None:
        position = position + 3 * torch.arange(batch, device=device)[:, None]
    angle = position[..., None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos().float(), angle.sin().float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("dim", [2, 64, 96])
def test_rope(device, dim, layout, dtype):
    q, k = heads(2, 5, 7, dim, dtype, device, layout), heads(2, 2, 7, dim, dtype, device)
    cos, sin = angles(7, dim, device, batch=2)
    assert_matches_reference(lambda q, k: kernels.apply_rope(q, k, cos, sin), q, k)


@pytest.mark.parametrize("table", ["time", "one", "half"])
def test_rope_tables(device, table):
    q, k = heads(2, 3, 5, 32, torch.float32, device), heads(2, 3, 5, 32, torch.float32, device)
    cos, sin = angles(5, 32, device)
    if table == "one":
        cos, sin = cos[None], sin[None]
    elif table == "half":
        cos, sin = cos[:, :16], sin[:, :16]
    assert_matches_reference(lambda q, k: kernels.apply_rope(q, k, cos, sin), q, k)


def test_rope_keeps_the_memory_order(device):
    q, k = heads(2, 3, 5, 16, torch.float32, device), heads(2, 3, 5, 16, torch.float32, device, "bhtd")
    rotated_q, rotated_k = kernels.apply_rope(q, k, *angles(5, 16, device))
    assert rotated_q.stride() == q.stride() and rotated_k.stride() == k.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "time"), [(64, 9), (48, 70)])
@pytest.mark.parametrize("cast", ["llama", "float32"])
def test_qk_norm_rope(device, cast, dim, time, dtype):
    q, k = heads(2, 4, time, dim, dtype, device), heads(2, 1, time, dim, dtype, device)
    wq, wk = (torch.randn(dim, device=device).to(dtype) for _ in range(2))
    cos, sin = angles(time, dim, device)

    def call(q, k, wq, wk):
        return kernels.qk_norm_rope(q, k, wq, wk, cos, sin, cast=cast, zero_centered=cast == "float32")

    assert_matches_reference(call, q, k, wq, wk)


def test_qk_norm_rope_without_gains_on_a_packed_projection(device):
    """q and k as slices of one [q | k | v] product: strided heads, and gradients of their own."""
    qkv = torch.randn(2, 6, 4 * 32, device=device).view(2, 6, 4, 32)
    q, k = qkv[:, :, :2].transpose(1, 2), qkv[:, :, 2:3].transpose(1, 2)
    cos, sin = angles(6, 32, device)
    assert_matches_reference(lambda q, k: kernels.qk_norm_rope(q, k, None, None, cos, sin), q, k)


def test_gradcheck_of_the_kernels(device):
    q, k = (heads(1, 1, 2, 4, torch.float64, device).requires_grad_() for _ in range(2))
    wq, wk = (torch.randn(4, device=device, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = (t.double() for t in angles(2, 4, device))
    assert torch.autograd.gradcheck(lambda *g: kernels.qk_norm_rope(*g, cos, sin), (q, k, wq, wk))
    packed = torch.randn(2, 6, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kernels.swiglu(x, activation="gelu_tanh"), (packed,))


@pytest.mark.parametrize("op", ["gated", "rope", pytest.param("norm_rope", marks=pytest.mark.slow)])
def test_opcheck(device, op):
    x = torch.randn(4, 40, device=device)
    q, k = heads(2, 4, 5, 16, torch.float32, device), heads(2, 2, 5, 16, torch.float32, device, "bhtd")
    cos, sin = (t[None] for t in angles(5, 16, device))
    w = torch.randn(16, device=device)
    if op == "gated":
        torch.library.opcheck(OPS.gated_forward.default, (x[:, :20], x[:, 20:], "silu"))
        torch.library.opcheck(OPS.gated_backward.default, (x[:, :20], x, None, "silu"))
    elif op == "rope":
        torch.library.opcheck(OPS.rope.default, (q, k, cos, sin, True))
    else:
        torch.library.opcheck(OPS.norm_rope.default, (q, k, w, None, cos, sin, 1e-6, False, True))
        torch.library.opcheck(
            OPS.norm_rope_backward.default, (q, k, q, k, w, None, cos, sin, 1e-6, False, True)
        )


def test_compiles_checkpoints_and_ignores_autocast(device):
    cos, sin = angles(5, 16, device)

    def block(q, k, wq, wk, packed):
        q, k = kernels.qk_norm_rope(q, k, wq, wk, cos, sin)
        q, k = kernels.apply_rope(q, k, cos, sin)
        return q, k, kernels.swiglu(packed)

    given = (
        heads(2, 4, 5, 16, torch.bfloat16, device),
        heads(2, 2, 5, 16, torch.bfloat16, device),
        torch.randn(16, device=device),
        torch.randn(16, device=device),
        torch.randn(2, 48, device=device),
    )
    eager = outputs_and_gradients(block, given)
    torch._dynamo.reset()
    for other in (
        torch.compile(block, fullgraph=True, backend="aot_eager"),
        lambda *tensors: checkpoint(block, *tensors, use_reentrant=False),
        torch.autocast(device, torch.bfloat16)(block),
    ):
        same = outputs_and_gradients(other, given)
        for a, b in zip(eager[0] + eager[1], same[0] + same[1], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
