from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 97


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    """A tiny Llama with weights large enough that its losses vary by tokens (about 10 nats, not ln 97
    everywhere).
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="session")
def stream() -> np.ndarray:
    """A token stream whose length is no multiple of any window used in the tests."""
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, 1003)
