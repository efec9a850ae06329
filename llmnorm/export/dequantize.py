"""A 4-bit model as an ordinary one: weights on their grids, activations whole."""

from __future__ import annotations

import copy

import torch
from torch import nn

from llmnorm.errors import UserError
from llmnorm.export.verify import verify_same
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.quantization import QuantizedLinear, quantized_weight


@torch.no_grad()
def dequantized(model: LlmNormForCausalLM) -> LlmNormForCausalLM:
    """A model without quantization whose projections hold Q(W): what `model` computes with its activations
    left as they are, which is checked. `model` stays as it is.

    Raises UserError for a model that is not quantized.
    """
    if model.config.quantization is None:
        raise UserError("dequantize does nothing for a model without model.quantization; leave it out")
    config = copy.deepcopy(model.config)
    config.quantization = None
    plain = LlmNormForCausalLM(config)
    nn.Module.to(plain, next(model.parameters()).dtype)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = module.weight
            state[f"{name}.weight"] = quantized_weight(weight, module.quantization, weight.dtype)
    plain.load_state_dict(state)
    weights_only = copy.deepcopy(model)
    for module in weights_only.modules():
        if isinstance(module, QuantizedLinear):
            module.quantization = module.quantization.of_weights()
    verify_same(weights_only, plain, "the model without quantization")
    return plain.eval()
