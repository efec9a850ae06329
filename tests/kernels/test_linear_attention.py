"""The torch path of linear attention: equal to the quadratic form, its derivatives, and the inputs it
refuses."""

from __future__ import annotations

import pytest
import torch

import llmnorm_kernels as kernels


def features(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.05


def quadratic(q, k, v, eps):
    scores = (q @ k.mT).tril()
    return scores @ v / (scores.sum(-1, keepdim=True) + eps)


@pytest.mark.parametrize("time", [1, 63, 64, 65, 130])
def test_equals_the_quadratic_form(time):
    q, k, v = features(2, 3, time, 8), features(2, 3, time, 8), torch.randn(2, 3, time, 5).double()
    torch.testing.assert_close(kernels.linear_attention(q, k, v, eps=1e-3), quadratic(q, k, v, 1e-3))


def test_state_is_the_sum_of_what_was_seen():
    q, k, v = features(1, 2, 70, 8), features(1, 2, 70, 8), torch.randn(1, 2, 70, 5).double()
    whole, (s, z) = kernels.linear_attention(q, k, v, return_state=True)
    torch.testing.assert_close(s, k.mT @ v)
    torch.testing.assert_close(z, k.sum(-2))
    first, state = kernels.linear_attention(*(x[:, :, :33] for x in (q, k, v)), return_state=True)
    second = kernels.linear_attention(*(x[:, :, 33:] for x in (q, k, v)), initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)


def test_gradcheck():
    q, k = (features(1, 1, 4, 3).requires_grad_() for _ in range(2))
    v = torch.randn(1, 1, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: kernels.linear_attention(q, k, v, eps=1e-3), (q, k, v))


Q, V = torch.rand(1, 2, 6, 4), torch.rand(1, 2, 6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.linear_attention(Q, Q[:, :1], V),
            r"q, k, v have shapes \(1, 2, 6, 4\), \(1, 1, 6, 4\)",
        ),
        (lambda: kernels.linear_attention(Q, Q, V.double()), r"q, k, v have dtypes"),
        (lambda: kernels.linear_attention(Q, Q, V[..., :0]), r"neither may be zero"),
        (lambda: kernels.linear_attention(Q, Q, V, eps=-1.0), r"eps=-1.0 must be zero or positive"),
        (lambda: kernels.linear_attention(Q, Q, V, initial_state=(Q, Q)), r"initial_state has shapes"),
    ],
)
def test_refused_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
