"""Softmax's relatives and its gate, against their definitions; why Sinkformer cannot be causal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.softmax_variants import off_by_one_attention, sigmoid_attention

ModelMaker = Callable[..., LlmNormForCausalLM]
DOUBLE = torch.float64


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, dtype=DOUBLE, generator=generator)
    k, v = torch.randn(2, 2, 2, 9, 8, dtype=DOUBLE, generator=generator)
    return q, k, v


def test_off_by_one_is_softmax_with_a_zero_key_and_value(qkv: tuple[Tensor, ...]) -> None:
    """e^x / (1 + sum e^x), computed here without the extra key."""
    q, k, v = qkv
    y, _ = off_by_one_attention(torch.nn.Module(), q, k, v, None, scaling=0.5)
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.5).exp().tril()
    expected = scores / (1 + scores.sum(-1, keepdim=True)) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(y.transpose(1, 2), expected)


def test_off_by_one_may_attend_to_nothing(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    strong = torch.cat((torch.ones_like(k[..., :1]), torch.zeros_like(k[..., 1:])), -1)
    y, _ = off_by_one_attention(torch.nn.Module(), q * 0 - 50, strong, v, None, scaling=1.0)
    assert y.abs().max() < 1e-15


def test_sigmoid_is_its_definition(qkv: tuple[Tensor, ...]) -> None:
    q, k, v = qkv
    module = torch.nn.Module().eval()
    y, weights = sigmoid_attention(module, q, k, v, None, scaling=0.5)
    visible = torch.arange(1, 10, dtype=DOUBLE)[:, None]
    scores = q @ k.repeat_interleave(2, 1).mT * 0.5
    expected = (1 / (1 + visible * (-scores).exp())).tril()  # sigma(x - ln t)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)  # logits are rounded to fp32
    torch.testing.assert_close(y.transpose(1, 2), weights @ v.repeat_interleave(2, 1))
    flat = sigmoid_attention(module, q * 0, k, v, None, scaling=0.5)[1].sum(-1)
    assert flat.min() >= 0.5 and flat.max() <= 1.0  # t / (1 + t)


@pytest.mark.parametrize("masked", ["boolean", "additive"])
def test_masks_of_both_kinds(qkv: tuple[Tensor, ...], masked: str) -> None:
    """A hidden key changes nothing, in either form of mask."""
    q, k, v = qkv
    visible = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9).clone()
    visible[1, :, :, :3] = False
    visible[1, :, :3, 0] = True
    additive = torch.zeros(2, 1, 9, 9, dtype=DOUBLE).masked_fill(~visible, -1e30)
    mask = visible if masked == "boolean" else additive
    moved = v.clone()
    moved[1, :, 1:3] += 5
    for attend in (off_by_one_attention, sigmoid_attention):
        y, _ = attend(torch.nn.Module().eval(), q, k, v, mask, scaling=0.5)
        again, _ = attend(torch.nn.Module().eval(), q, k, moved, mask, scaling=0.5)
        assert torch.equal(y[1, 3:], again[1, 3:])


def test_a_new_gate_halves_the_output(make_model: ModelMaker, tokens: Tensor) -> None:
    """W_gate is 0 at first, so every gate is sigma(0); afterwards it is a function of the layer's input."""
    for gate, columns in (("head", 4), ("elementwise", 32)):
        model = make_model(attention_options={"gate": gate}, plain=True, num_hidden_layers=1)
        layer = model.model.layers[0].self_attn
        assert layer.gate.weight.shape == (columns, 32)
        assert layer.gate.weight.abs().max() == 0
        kept: list[Tensor] = []
        layer.o_proj.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0]))
        model(tokens)
        layer.gate.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        z = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens))
        model(tokens)
        factor = torch.sigmoid(z @ layer.gate.weight.T).unflatten(-1, (4, -1))
        expected = (2 * kept[0]).unflatten(-1, (4, -1)) * factor
        torch.testing.assert_close(kept[1].unflatten(-1, (4, -1)), expected)


def test_other_implementations_are_refused(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(attention_options={"normalizer": "sigmoid"})
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' computes softmax only"):
        model.model.layers[0].self_attn._attend()


def test_a_plain_model_is_unchanged_and_a_variant_is_no_llama(make_model: ModelMaker) -> None:
    assert make_model().config.is_llama
    assert not make_model(attention_options={"gate": "head"}).config.is_llama
    assert not make_model(attention="sla").config.is_llama


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """exp(scores) with rows and columns scaled in turn to sum 1 (Sinkformer, arXiv 2110.11773)."""
    u, v = torch.zeros(2, len(scores), dtype=scores.dtype)
    for _ in range(iterations):
        u = -torch.logsumexp(scores + v, 1)
        v = -torch.logsumexp(scores + u[:, None], 0)
    return torch.exp(scores + u[:, None] + v)


def test_a_causal_doubly_stochastic_matrix_is_the_identity() -> None:
    """sum_i i r_i - sum_j j c_j = sum_ij (i - j) a_ij for row sums r and column sums c. If both are 1, the
    left side is 0, and in a triangle every term on the right is at least 0: each a_ij below the diagonal is
    0.

    Sinkhorn's iteration on causal scores tends there, slowly: the mass off the diagonal falls like 1 / n.
    """
    size = 8
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(size, size, dtype=DOUBLE, generator=generator).tril()
    place = torch.arange(size, dtype=DOUBLE)
    left = (place * a.sum(1)).sum() - (place * a.sum(0)).sum()
    terms = (place[:, None] - place) * a
    torch.testing.assert_close(left, terms.sum())
    assert terms.min() >= 0 and (terms > 0).sum() == size * (size - 1) // 2

    identity = torch.eye(size, dtype=DOUBLE)
    scores = torch.randn(size, size, dtype=DOUBLE, generator=generator)
    causal = scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf)
    masses = [(sinkhorn(causal, n) * (1 - identity)).sum().item() for n in (10, 100, 1000)]
    assert masses[0] > 5 * masses[1] > 25 * masses[2]
    free = sinkhorn(scores, 100)  # without the mask the same iteration mixes
    torch.testing.assert_close(free.sum(1), torch.ones(size, dtype=DOUBLE))
    assert (free * (1 - identity)).sum() > 1
