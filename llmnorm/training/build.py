"""From config and tokenizer to a model on the meta device, and to its first weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmnorm.config import RunConfig
from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights

PURE_BF16 = "bf16_pure"


def model_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> LlmNormConfig:
    """The model's own config: the run's `model` section, with the tokenizer's size and special tokens."""
    arguments: dict[str, Any] = config.model.arguments(len(tokenizer), config.data.sequence_length)
    if arguments["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.vocab_size={arguments['vocab_size']} is smaller than the tokenizer's {len(tokenizer)} "
            "ids; raise "
            "it, or set it to null to take the tokenizer's"
        )
    specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        return LlmNormConfig(**arguments, **specials)
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def build_on_meta(model_config: LlmNormConfig, config: RunConfig) -> LlmNormForCausalLM:
    """The model without memory, in its training dtype, its blocks set up to be checkpointed and compiled."""
    with torch.device("meta"):
        model = LlmNormForCausalLM(model_config)
    if config.train.precision == PURE_BF16:
        # Parameters only: rotary tables stay fp32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    if config.train.compile:
        for block in model.model.layers:
            block.compile()
    return model.train()


def fill_weights(model: LlmNormForCausalLM, config: RunConfig) -> None:
    """First weights of a run: drawn from the seed, or those of `model.init_from`."""
    if config.model.init_from is None:
        initialize_weights(model, config.seed)
        return
    rebuild(model)
    load_initial_weights(model, config.model.init_from)


def rebuild(model: LlmNormForCausalLM) -> None:
    """Redo what giving a meta-device model memory undoes: tied weights and computed buffers."""
    model.tie_weights()
    for module in model.modules():
        if hasattr(module, "rebuild_buffers"):
            module.rebuild_buffers()  # type: ignore[operator]
