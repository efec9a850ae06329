"""Activation checkpointing: the same loss and gradients, with the layers computed again or in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.batch_statistics import defer_statistics

ModelMaker = Callable[..., LlmNormForCausalLM]
MODES = ("none", "full", "selective")


def _loss_and_gradients(model: LlmNormForCausalLM, tokens: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_gradients_are_identical(make_model: ModelMaker, tokens: Tensor, row: dict[str, Any]) -> None:
    model = make_model(**row).train()
    defer_statistics(model)  # running statistics stay where they are
    results = []
    for mode in (*MODES, "none"):
        model.set_activation_checkpointing(mode)
        results.append(_loss_and_gradients(model, tokens))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_are_identical_with_dropout(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(attention_dropout=0.3, attn_implementation="eager").train()
    results = []
    for mode in MODES:
        model.set_activation_checkpointing(mode)
        torch.manual_seed(0)
        results.append(_loss_and_gradients(model, tokens))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _flops(model: LlmNormForCausalLM, tokens: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    return counter.get_total_flops()


def test_full_computes_the_layers_again_and_selective_no_product(
    make_model: ModelMaker, tokens: Tensor
) -> None:
    model = make_model().train()
    flops = {}
    for mode in MODES:
        model.set_activation_checkpointing(mode)
        flops[mode] = _flops(model, tokens)
    head = 2 * tokens.numel() * 32 * 61
    layers = (flops["none"] - 3 * head) / 3  # a third of a step: the backward costs two forwards
    assert flops["selective"] == flops["none"]
    # 5 %: attention's backward costs more than two forwards.
    assert flops["full"] == pytest.approx(flops["none"] + layers, rel=0.05)


def test_transformers_own_switch(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model().train()
    expected = _loss_and_gradients(model, tokens)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    for a, b in zip(expected, _loss_and_gradients(model, tokens), strict=True):
        assert torch.equal(a, b)
    model.set_activation_checkpointing("none")
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_cache_is_switched_off_or_refused(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model().train()
    model.set_activation_checkpointing("full")
    assert model(tokens).past_key_values is None  # use_cache is on by default
    cache = model.eval()(tokens[:, :4], use_cache=True).past_key_values
    model.train()
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model(tokens[:, 4:5], past_key_values=cache, use_cache=True)


def test_unknown_mode(make_model: ModelMaker) -> None:
    with pytest.raises(ValueError, match="activation_checkpointing='half' is not a choice"):
        make_model().set_activation_checkpointing("half")
