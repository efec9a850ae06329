"""The monitors of linear attention, each on a case whose answer is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM, attention_health
from llmnorm.modeling.attention_health import effective_rank
from llmnorm.modeling.linear_mixers import LlmNormLinearAttention

ModelMaker = Callable[..., LlmNormForCausalLM]
BARE = {"short_convolution": 0, "floor": 0.1}


def layer_of(model: LlmNormForCausalLM, index: int = 0) -> LlmNormLinearAttention:
    layer = model.model.layers[index].self_attn
    assert isinstance(layer, LlmNormLinearAttention)
    return layer


def test_only_linear_layers_are_reported(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(attention={"pattern": ["softmax", "nalaformer", "sla"]})
    health = attention_health(model, tokens)
    assert set(health) == {1, 2}
    assert "saturated_exponents" in health[1] and "saturated_exponents" not in health[2]
    assert attention_health(make_model(), tokens) == {}


def test_the_smallest_denominator_is_the_floor_where_nothing_matches(
    make_model: ModelMaker, tokens: Tensor
) -> None:
    """Queries 0: every score is floor^2 = 0.01, and the first token has one key."""
    model = make_model(num_hidden_layers=1, attention="nalaformer", attention_options=BARE)
    torch.nn.init.zeros_(layer_of(model).q_proj.weight)
    assert attention_health(model, tokens)[0]["smallest_denominator"] == pytest.approx(0.01, rel=1e-4)


def test_the_output_of_equal_values_has_their_size(make_model: ModelMaker, tokens: Tensor) -> None:
    """One token repeated: all values are equal, so is their average, and every state has rank 1."""
    options = {**BARE, "eps": 1e-12}
    model = make_model(num_hidden_layers=1, attention="nalaformer", attention_options=options)
    health = attention_health(model, torch.full_like(tokens, 7))[0]
    assert health["output_to_value"] == pytest.approx(1.0, abs=1e-5)
    assert health["state_effective_rank"] == pytest.approx(1.0, abs=1e-3)
    varied = attention_health(model, tokens)[0]
    assert varied["output_to_value"] < 0.95
    assert varied["state_effective_rank"] > 2


def test_saturated_exponents_are_counted(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(num_hidden_layers=1, attention="nalaformer", attention_options=BARE)
    layer = layer_of(model)
    with torch.no_grad():
        layer.query_scale.fill_(0.0)
        layer.query_shift.copy_(torch.tensor([0.0, 9.0, -9.0, 0.5]))
    # tanh 0 and tanh 0.5 are inside the range, tanh 9 is its upper end, and tanh -9 is held at 1.
    assert attention_health(model, tokens)[0]["saturated_exponents"] == 0.5


def test_padding_is_left_out(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(attention="nalaformer")
    alone = attention_health(model, tokens[:1, :7])
    mask = torch.ones_like(tokens[:1])
    mask[:, 7:] = 0
    padded = attention_health(model, tokens[:1], mask)
    for layer, numbers in alone.items():
        assert padded[layer] == pytest.approx(numbers, rel=1e-3)


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(5)).item() == pytest.approx(5.0, rel=1e-5)
    assert effective_rank(torch.ones(4, 6)).item() == pytest.approx(1.0, abs=1e-3)
    assert effective_rank(torch.zeros(2, 3, 3)).tolist() == [0.0, 0.0]
