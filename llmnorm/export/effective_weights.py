"""A model as one without what only training needs: its matrices are those that it multiplies with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from llmnorm.export.verify import verify_same
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.parametrized_linear import ParametrizedLinear
from llmnorm.modeling.weight_constraint import keeps_norms


@torch.no_grad()
def with_effective_weights(model: LlmNormForCausalLM) -> LlmNormForCausalLM:
    """A model that computes what `model` computes, which is checked, from ordinary matrices; `model` itself
    where it has neither a `weight_parametrization` nor norms to return to. `model` stays as it is.

    normalize_and_project goes, as it is about the matrices that are stored in training.
    """
    if model.config.weight_parametrization is None and not keeps_norms(model.config):
        return model
    config = copy.deepcopy(model.config)
    config.weight_parametrization = config.weight_constraint = None
    plain = LlmNormForCausalLM(config)
    nn.Module.to(plain, next(model.parameters()).dtype)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, ParametrizedLinear):
            state[f"{name}.weight"] = module.effective_weight()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    verify_same(model, plain, "the model of its effective weights")
    return plain.eval()
