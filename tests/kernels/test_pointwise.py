"""The torch references of swiglu and rotary embeddings: what they equal, and the inputs they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import llmnorm_kernels as kernels


def test_swiglu_is_llamas_in_float32():
    gate, up = torch.randn(4, 24), torch.randn(4, 24)
    assert torch.equal(kernels.swiglu(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(kernels.swiglu(torch.cat([gate, up], -1)), F.silu(gate) * up)
    torch.testing.assert_close(
        kernels.swiglu(gate, up, activation="gelu_tanh"), F.gelu(gate, approximate="tanh") * up
    )
    assert torch.equal(kernels.swiglu(gate, up, activation="relu"), F.relu(gate) * up)


def llama_angles(time, dim):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=64)
    return LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(time)[None])


def test_rope_is_llamas():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    cos, sin = llama_angles(9, 16)
    for ours, stock in zip(
        kernels.apply_rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6)


def test_rope_depends_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 16).double(), torch.randn(1, 1, 1, 16).double()
    cos, sin = (t.double() for t in llama_angles(40, 16))

    def score(i, j):
        a, _ = kernels.apply_rope(q, q, cos[:, i : i + 1], sin[:, i : i + 1])
        _, b = kernels.apply_rope(k, k, cos[:, j : j + 1], sin[:, j : j + 1])
        return float((a * b).sum())

    # The tables are float32, so distances agree to their rounding.
    assert score(7, 3) == pytest.approx(score(30, 26), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_qk_norm_rope_is_the_norm_then_the_rotation():
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    wq, wk = torch.randn(16), torch.randn(16)
    cos, sin = llama_angles(9, 16)
    expected = kernels.apply_rope(kernels.rms_norm(q, wq, 1e-5), kernels.rms_norm(k, wk, 1e-5), cos, sin)
    for a, b in zip(kernels.qk_norm_rope(q, k, wq, wk, cos, sin, 1e-5), expected, strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    q, k = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in llama_angles(3, 4))
    assert torch.autograd.gradcheck(lambda q, k, w: kernels.qk_norm_rope(q, k, w, w, cos, sin), (q, k, w))
    gate = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: kernels.swiglu(g, activation="gelu_tanh"), (gate,))


Q, T = torch.randn(2, 4, 6, 8), torch.ones(6, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.swiglu(T, T[:3]), r"up has shape \(3, 8\) but gate has \(6, 8\)"),
        (lambda: kernels.swiglu(T, T.double()), r"up has dtype torch.float64 but gate has torch.float32"),
        (lambda: kernels.swiglu(T[:, :7]), r"gate has shape \(6, 7\); packed \[gate \| up\] needs an even"),
        (lambda: kernels.swiglu(T, T, activation="swish"), r"activation='swish' is unknown"),
        (lambda: kernels.swiglu(T.int(), T), r"gate has dtype torch.int32"),
        (lambda: kernels.apply_rope(Q[0], Q, T, T), r"q has shape \(4, 6, 8\); it must be \(batch, heads"),
        (lambda: kernels.apply_rope(Q, Q[:1], T, T), r"k has shape \(1, 4, 6, 8\)"),
        (lambda: kernels.apply_rope(Q, Q, T[:5], T), r"cos has shape \(5, 8\)"),
        (lambda: kernels.apply_rope(Q, Q, T, T[:, :3]), r"sin has shape \(6, 3\)"),
        (lambda: kernels.apply_rope(Q, Q, T.clone().requires_grad_(), T), r"cos requires a gradient"),
        (lambda: kernels.apply_rope(Q[..., :7], Q[..., :7], T, T), r"q has head_dim 7"),
        (lambda: kernels.qk_norm_rope(Q, Q, torch.ones(4), None, T, T), r"q_weight has shape \(4,\)"),
        (lambda: kernels.qk_norm_rope(Q, Q, None, None, T, T, -1.0), r"eps=-1.0 must be zero or positive"),
        (lambda: kernels.qk_norm_rope(Q, Q, None, None, T, T, cast="x"), r"cast='x' is unknown"),
    ],
)
def test_refused_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
