"""generate: with and without a cache, with left padding, compiled caches, and never a padding row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM

ModelMaker = Callable[..., LlmNormForCausalLM]
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_cache_changes_nothing(make_model: ModelMaker, tokens: Tensor, row: dict[str, Any]) -> None:
    model = make_model(**row)
    mask = torch.ones_like(tokens)
    with_cache = model.generate(tokens, attention_mask=mask, use_cache=True, **GREEDY)
    without = model.generate(tokens, attention_mask=mask, use_cache=False, **GREEDY)
    assert with_cache.shape == (2, 22)
    assert torch.equal(with_cache, without)
    assert len(set(with_cache[:, 12:].flatten().tolist())) > 2  # a constant would prove nothing


def test_left_padding_changes_nothing(make_model: ModelMaker, tokens: Tensor, row: dict[str, Any]) -> None:
    model = make_model(**row)
    short = tokens[1:, :7]
    padded = tokens.clone()
    padded[1, :5], padded[1, 5:] = 0, short
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    for use_cache in (True, False):
        together = model.generate(padded, attention_mask=mask, use_cache=use_cache, **GREEDY)
        first = model.generate(tokens[:1], attention_mask=mask[:1], use_cache=use_cache, **GREEDY)
        alone = model.generate(short, attention_mask=torch.ones_like(short), use_cache=use_cache, **GREEDY)
        assert torch.equal(together[:1], first)
        assert torch.equal(together[1:, 12:], alone[:, 7:])


def test_static_cache(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(norm="mix_ln")
    mask = torch.ones_like(tokens)
    options = {"attention_mask": mask, "disable_compile": True, **GREEDY}
    static = model.generate(tokens, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(tokens, **options))


def test_padding_rows_are_never_generated(make_model: ModelMaker, tokens: Tensor) -> None:
    """With the head's padding rows made the most likely of all, generate still keeps to the vocabulary."""
    model = make_model(true_vocab_size=50)
    with torch.no_grad():
        model.lm_head.weight[50:] *= 100
    assert (model(tokens).logits[:, -1].argmax(-1) >= 50).any()
    torch.manual_seed(0)
    text = model.generate(tokens.clamp(max=49), attention_mask=torch.ones_like(tokens), **GREEDY)
    assert (text < 50).all()
    sampled = model.generate(
        tokens.clamp(max=49), attention_mask=torch.ones_like(tokens), **{**GREEDY, "do_sample": True}
    )
    assert (sampled < 50).all()
