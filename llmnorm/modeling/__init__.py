"""What is trained: a Llama-compatible causal language model with interchangeable parts.

The other files of this folder travel with every saved checkpoint, so they import torch, transformers and each
other.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .attention_health import attention_health
from .configuration_llmnorm import LlmNormConfig
from .initialization import INIT_RULES, initialize_weights
from .modeling_llmnorm import LlmNormForCausalLM, LlmNormModel, LlmNormPreTrainedModel
from .residual import PRESETS, residual_plan

AutoConfig.register(LlmNormConfig.model_type, LlmNormConfig, exist_ok=True)
AutoModel.register(LlmNormConfig, LlmNormModel, exist_ok=True)
AutoModelForCausalLM.register(LlmNormConfig, LlmNormForCausalLM, exist_ok=True)
# save_pretrained copies these files beside the weights.
LlmNormConfig.register_for_auto_class()
LlmNormModel.register_for_auto_class("AutoModel")
LlmNormForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "INIT_RULES",
    "PRESETS",
    "LlmNormConfig",
    "LlmNormForCausalLM",
    "LlmNormModel",
    "LlmNormPreTrainedModel",
    "attention_health",
    "initialize_weights",
    "residual_plan",
]
