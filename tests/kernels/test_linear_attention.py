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


def test_o2_1_maps_and_documents_equal_their_definition():
    """Scores of the written feature maps, cut by document; queries of two heads share a key head."""
    q, k, v = (torch.randn(2, heads, 70, size).double() for heads, size in ((4, 6), (2, 6), (2, 5)))
    q[0, 0, 3] = 0
    p = torch.rand(2, 4, 70).double() * 3 + 1
    segments = torch.tensor([[0] * 9 + [1] * 61, [0] * 64 + [1] * 6])
    f = q.abs().div(q.abs().amax(-1, keepdim=True).clamp_min(1e-30)).pow(p.unsqueeze(-1))
    phi_q = torch.cat((f * (q > 0), f * (q < 0)), -1)
    phi_k = torch.cat((k.relu() ** 3, (-k).relu() ** 3), -1).repeat_interleave(2, 1)
    scores = (phi_q @ phi_k.mT + 0.3**2).tril() * (segments[:, None, :, None] == segments[:, None, None, :])
    expected = scores @ v.repeat_interleave(2, 1) / (scores.sum(-1, keepdim=True) + 1e-3)
    options = {"eps": 1e-3, "feature_map": "relu_split", "exponent": p, "floor": 0.3, "segments": segments}
    o, (s, z) = kernels.linear_attention(q, k, v, return_state=True, **options)
    torch.testing.assert_close(o, expected)
    last = phi_k[1, ::2, 64:]
    torch.testing.assert_close(s[1, :, :-1], last.mT @ v[1, :, 64:])
    torch.testing.assert_close(s[1, :, -1], 0.3 * v[1, :, 64:].sum(1))
    torch.testing.assert_close(z[1, :, -1], torch.full((2,), 0.3 * 6).double())


def test_o2_2_gradcheck_through_a_map_and_a_boundary():
    q, k = (torch.randn(1, heads, 5, 3, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    v = torch.randn(1, 1, 5, 2, dtype=torch.float64, requires_grad=True)
    p = (torch.rand(1, 2, 5).double() + 1.5).requires_grad_()
    segments = torch.tensor([[0, 0, 1, 1, 1]])

    def call(q, k, v, p):
        return kernels.linear_attention(
            q, k, v, feature_map="relu_split", exponent=p, floor=0.5, segments=segments, eps=1e-3
        )

    assert torch.autograd.gradcheck(call, (q, k, v, p))


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
        (lambda: kernels.linear_attention(Q, Q, V, floor=-1.0), r"floor=-1.0 must be zero or positive"),
        (lambda: kernels.linear_attention(Q, Q, V, feature_map="cosine"), r"feature_map='cosine' is unknown"),
        (lambda: kernels.linear_attention(Q, Q, V, feature_map="relu_split"), r"exponent is absent"),
        (lambda: kernels.linear_attention(Q, Q, V, exponent=Q[..., 0]), r"exponent is given"),
        (
            lambda: kernels.linear_attention(Q, Q, V, feature_map="relu_split", exponent=Q),
            r"exponent has shape \(1, 2, 6, 4\); it must be \(1, 2, 6\)",
        ),
        (lambda: kernels.linear_attention(Q, Q, V, segments=torch.ones(1, 5).int()), r"segments must be"),
        (lambda: kernels.linear_attention(Q, Q, V, segments=torch.ones(1, 6)), r"segments must be integers"),
    ],
)
def test_refused_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
