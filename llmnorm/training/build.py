"""From config and tokenizer to a model on the meta device, and to its first weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmnorm.checkpoint import newest_text
from llmnorm.config import RunConfig
from llmnorm.errors import UserError
from llmnorm.export import InitialWeights, initial_weights
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import project_weights
from llmnorm.training.statistics_checks import check_statistics
from llmnorm_kernels import describe_backends, use_backend

PURE_BF16 = "bf16_pure"


def choose_kernels(kernels: str, device: torch.device) -> str:
    """Set the implementation of every fused operator; returns the line that says which run where."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if kernels == "triton" and device.type != "cuda" and not interpreted:
        raise UserError(
            f"kernels=triton needs a GPU and this process computes on {device.type}; set kernels to auto, or "
            "set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter (thousands of times slower)"
        )
    try:
        use_backend(kernels)
    except RuntimeError as error:
        raise UserError(f"kernels={kernels}: {error}") from error
    return describe_backends(device)


@dataclass(frozen=True)
class Blueprint:
    """The model's own config, and the weights it starts from if not from drawn ones."""

    model_config: LlmNormConfig
    initial: InitialWeights | None = None


def draw_blueprint(config: RunConfig, tokenizer: PreTrainedTokenizerBase, checkpoints: Path) -> Blueprint:
    """Settle the model's config, with the tokenizer's size and special tokens.

    It is the run's `model` section, or that of the weights in `model.init_from`; a run that goes on takes the
    latter from its checkpoint.
    """
    specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if config.model.init_from is not None:
        return _from_weights(config, tokenizer, specials, checkpoints)
    arguments: dict[str, Any] = config.model.arguments(len(tokenizer), config.data.sequence_length)
    try:
        return Blueprint(LlmNormConfig(**arguments, **specials))
    except ValueError as error:
        raise UserError(f"model: {error}") from error


def _from_weights(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, specials: dict[str, int | None], checkpoints: Path
) -> Blueprint:
    assert config.model.init_from is not None
    saved = newest_text(checkpoints, "model_config.json")
    if saved is not None:
        resumed = LlmNormConfig.from_dict(json.loads(saved))
        resumed._attn_implementation = config.model.attn_implementation
        return Blueprint(resumed)
    given = config.model.model_dump(include=config.model.model_fields_set)
    if "norm" in given:
        given["norm"] = config.model.norm_names()
    weights = initial_weights(
        config.model.init_from,
        {"attn_implementation": config.model.attn_implementation, **given, **specials},
    )
    weights.check_tokenizer(tokenizer)
    check_statistics(config, weights.config)
    return Blueprint(weights.config, weights)


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


def fill_weights(model: LlmNormForCausalLM, blueprint: Blueprint, seed: int) -> None:
    """First weights of a run: drawn from the seed, or those of `model.init_from`, made to obey what their
    modules ask for. A run that goes on has such weights and is left as it is, to the last bit.
    """
    if blueprint.initial is None:
        initialize_weights(model, seed)
    else:
        rebuild(model)
        blueprint.initial.copy_into(model)
    project_weights(model)


def rebuild(model: LlmNormForCausalLM) -> None:
    """Redo what giving a meta-device model memory undoes: tied weights and computed buffers."""
    model.tie_weights()
    for module in model.modules():
        if hasattr(module, "rebuild_buffers"):
            module.rebuild_buffers()  # type: ignore[operator]
