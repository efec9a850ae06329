"""The torch path of the cross entropies: what it equals, its memory, and the inputs it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import llmnorm_kernels as kernels
from llmnorm_kernels.linear_cross_entropy import CHUNK_BYTES, SMALLEST_CHUNK, chunk_size


def test_equals_torch():
    logits, target = torch.randn(6, 30, dtype=torch.float64), torch.tensor([1, 2, -100, 29, 0, -100])
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            kernels.cross_entropy(logits, target, reduction=reduction),
            F.cross_entropy(logits, target, reduction=reduction),
        )
    x, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    for chunk in (1, 4, 6):
        torch.testing.assert_close(
            kernels.linear_cross_entropy(x, weight, target, chunk=chunk),
            F.cross_entropy(x @ weight.t(), target),
        )


def test_z_loss_cap_and_weights_by_hand():
    logits, target = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]), torch.tensor([2, 1])
    weights = torch.tensor([0.5, 2.0])
    capped = 3.0 * torch.tanh(logits / 3.0)
    lse = capped.exp().sum(-1).log()
    expected = weights * (lse - capped[[0, 1], target] + 0.25 * lse**2)
    given = {"softcap": 3.0, "z_loss": 0.25, "weights": weights}
    torch.testing.assert_close(kernels.cross_entropy(logits, target, reduction="none", **given), expected)
    # The mean counts targets, whatever their weights.
    torch.testing.assert_close(kernels.cross_entropy(logits, target, **given), expected.sum() / 2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    target, weights = torch.tensor([1, 0, -100, 6, 3]), torch.rand(5, dtype=torch.float64)

    def loss(x, weight, bias):
        return kernels.linear_cross_entropy(
            x, weight, target, bias, chunk=2, softcap=5.0, z_loss=0.1, weights=weights, reduction=reduction
        )

    assert torch.autograd.gradcheck(loss, (x, weight, bias))


def test_chunks_follow_the_memory_budget():
    for tokens, vocabulary in ((16384, 32000), (16384, 128256), (100, 50304), (1, 10), (0, 10)):
        chunk = chunk_size(tokens, vocabulary, 2)
        assert 1 <= chunk <= max(1, tokens)
        assert chunk * vocabulary * 2 <= max(CHUNK_BYTES, SMALLEST_CHUNK * vocabulary * 2)
        # Even chunks: the last is at most one chunk's rounding shorter.
        assert chunk * -(-tokens // chunk) - tokens < -(-tokens // chunk) + 1


def test_logits_are_never_whole(monkeypatch):
    """No tensor of tokens x vocabulary elements is made: the widest product has a chunk's rows."""
    rows = []
    stock = torch.Tensor.__matmul__

    def record(a, b):
        rows.append(a.shape[0])
        return stock(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", record)
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(100, 8)
    kernels.linear_cross_entropy(x, weight, torch.randint(0, 100, (64,)), chunk=16).backward()
    assert rows == [16] * 4


X, W, Y = torch.randn(6, 8), torch.randn(20, 8), torch.zeros(6, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.cross_entropy(X, Y.float()), r"target has dtype torch.float32"),
        (lambda: kernels.cross_entropy(X, Y[:5]), r"target has shape \(5,\); it must be \(6,\)"),
        (lambda: kernels.cross_entropy(X, Y, softcap=0.0), r"softcap=0.0 must be positive"),
        (lambda: kernels.cross_entropy(X, Y, z_loss=-1.0), r"z_loss=-1.0 must be zero or positive"),
        (lambda: kernels.cross_entropy(X, Y, weights=torch.ones(5)), r"weights has shape \(5,\)"),
        (lambda: kernels.cross_entropy(X, Y, reduction="batchmean"), r"reduction='batchmean' is unknown"),
        (lambda: kernels.cross_entropy(X, Y.to("meta")), r"target is on meta but logits is on cpu"),
        (lambda: kernels.cross_entropy(X[:, :0], Y), r"logits has shape \(6, 0\)"),
        (
            lambda: kernels.linear_cross_entropy(X, W[:, :7], Y),
            r"weight has shape \(20, 7\); .* \(..., width\) = \(6, 8\)",
        ),
        (lambda: kernels.linear_cross_entropy(X, W.double(), Y), r"weight has dtype torch.float64 but x has"),
        (
            lambda: kernels.linear_cross_entropy(X, W, Y, torch.ones(8)),
            r"bias has shape \(8,\); it must be \(20,\)",
        ),
        (lambda: kernels.linear_cross_entropy(X, W, Y, chunk=0), r"chunk=0 must be at least 1"),
        (
            lambda: kernels.linear_cross_entropy(X, W, Y, weights=torch.ones(6).requires_grad_()),
            r"weights requires a grad",
        ),
    ],
)
def test_refused_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
