"""A stock LLaMA, small: the optimizers work on any model, so their tests do not need ours."""

from collections.abc import Callable

import pytest
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    def build(tied: bool = False) -> LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=40,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
        return LlamaForCausalLM(config)

    return build
