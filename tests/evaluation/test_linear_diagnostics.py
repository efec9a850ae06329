"""`diagnose` on models with linear attention: the health of its layers stands beside the other numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmnorm.evaluation import diagnose
from llmnorm.evaluation.diagnostics_table import layer_table
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, attention_health


def build(attention: object) -> LlmNormForCausalLM:
    torch.manual_seed(0)
    config = LlmNormConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        attention=attention,
    )
    return LlmNormForCausalLM(config).eval()


def test_a_hybrid_reports_the_health_of_its_linear_layers() -> None:
    ids = np.random.default_rng(0).integers(0, 61, 49)
    model = build({"pattern": ["nalaformer", "softmax", "sla"]})
    numbers = diagnose(model, ids, 12, removal=False)
    expected = attention_health(model, torch.from_numpy(ids[:48]).view(4, 12))
    for name in ("smallest_denominator", "output_to_value", "state_effective_rank"):
        measured = numbers[name]
        assert measured[1] is None
        assert [measured[0], measured[2]] == pytest.approx([expected[0][name], expected[2][name]], rel=1e-5)
    assert numbers["saturated_exponents"] == [expected[0]["saturated_exponents"], None, None]
    assert numbers["attention_entropy"][0] is None and numbers["attention_entropy"][1] is not None
    numbers |= {"update_ratio": None, "update_ratio_unavailable": "not asked for"}
    head, *_ = layer_table(numbers).splitlines()
    assert "state rank" in head and "saturated" in head


def test_a_model_without_linear_attention_reports_none() -> None:
    ids = np.random.default_rng(0).integers(0, 61, 25)
    numbers = diagnose(build("softmax"), ids, 12, removal=False)
    assert "state_effective_rank" not in numbers
    numbers |= {"update_ratio": None, "update_ratio_unavailable": "not asked for"}
    assert "state rank" not in layer_table(numbers)
