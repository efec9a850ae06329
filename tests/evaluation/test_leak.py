"""O13: what reads the future, in training and in eval mode, and that held-out text is read in eval mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.evaluation import future_leak, perplexity
from llmnorm.modeling import PRESETS, LlmNormConfig, LlmNormForCausalLM, initialize_weights

STATISTICS = ("powernorm", "unified_norm", "prepbn")
IDS = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(2))


def model_of(norm: str, **options: Any) -> LlmNormForCausalLM:
    """In the middle of its training: all running statistics moved by three updates."""
    if norm == "prepbn":
        options = {"interpolation_steps": 6, "branch_init": 1.0, **options}
    config = LlmNormConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        norm=norm,
        norm_options=options,
    )
    model = LlmNormForCausalLM(config)
    initialize_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=generator)
            )
        model.train()
        for _ in range(3):
            model(IDS, use_cache=False)
    return model


def state(model: LlmNormForCausalLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("norm", sorted(PRESETS))
def test_o13_eval_logits_do_not_read_the_future(norm: str) -> None:
    """Every norm: to the last bit, at the end and in the middle."""
    model = model_of(norm, **({"own_init": False} if norm == "none" else {}))
    for position in (5, 11):
        leak = future_leak(model, IDS, position)
        assert leak.eval == leak.eval_others == 0.0
        if norm not in STATISTICS:
            assert leak.train == leak.train_others == 0.0


@pytest.mark.parametrize("norm", STATISTICS)
def test_o13_statistics_of_the_batch_read_the_future(norm: str) -> None:
    """Visible in the logits (of size 1), in the same sequence and in the others: the meter works."""
    leak = future_leak(model_of(norm), IDS)
    assert leak.train > 1e-3
    assert leak.train_others > 1e-3


@pytest.mark.parametrize("norm", STATISTICS)
@pytest.mark.parametrize("statistics", ["prefix", "running"])
def test_o13_causal_statistics_do_not(norm: str, statistics: str) -> None:
    """In training mode, to the last bit; so also for Unified Norm's windows behind its warm-up."""
    options = {"statistics_warmup": 0, "window": 2} if norm == "unified_norm" else {}
    leak = future_leak(model_of(norm, statistics=statistics, **options), IDS)
    assert leak.train == leak.train_others == 0.0


def test_o13_powernorm_reads_the_past_alone_after_its_warm_up() -> None:
    assert future_leak(model_of("powernorm", statistics_warmup=3), IDS).train == 0.0
    assert future_leak(model_of("powernorm", statistics_warmup=4), IDS).train > 1e-3


@pytest.mark.parametrize("norm", STATISTICS)
def test_the_meter_leaves_the_model_as_it_was(norm: str) -> None:
    model = model_of(norm)
    before = state(model)
    model.model.layers[0].eval()
    generator = torch.get_rng_state()
    future_leak(model, IDS)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert model.training and not model.model.layers[0].training
    assert torch.equal(generator, torch.get_rng_state())
    assert all(not layer.input_layernorm.pending for layer in model.model.layers)


@pytest.mark.parametrize("norm", STATISTICS)
def test_o17_held_out_text_is_read_in_eval_mode(norm: str) -> None:
    """Perplexity of a model in training is that of the model in eval mode, for every batch size, and moves
    no statistic. 1e-6: fp32 products round differently for different shapes.
    """
    model = model_of(norm)
    before = state(model)
    ids = IDS.flatten()
    found = [perplexity(model, ids, context_length=5, batch_size=size).loss for size in (1, 3, 7)]
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in state(model).items())
    assert found == pytest.approx([perplexity(model.eval(), ids, context_length=5).loss] * 3, rel=1e-6)
    with torch.no_grad():
        training = model.train()(IDS, labels=IDS, use_cache=False).loss.item()
        assert abs(training - model.eval()(IDS, labels=IDS, use_cache=False).loss.item()) > 1e-3
