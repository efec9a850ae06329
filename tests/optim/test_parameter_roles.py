"""Roles follow from module identity, whatever a parameter is called."""

import pytest
import torch
import torch.nn as nn

from llmnorm.optim import Role, classify_parameters, route_parameters


def test_every_parameter_of_a_llama_has_the_role_of_its_module(llama):
    model = llama()
    roles = classify_parameters(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert roles["model.embed_tokens.weight"] is Role.EMBEDDING
    assert roles["lm_head.weight"] is Role.LM_HEAD
    hidden = {name for name, role in roles.items() if role is Role.HIDDEN_MATRIX}
    assert hidden == {
        f"model.layers.{layer}.{part}.weight"
        for layer in range(2)
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    vectors = {name for name, role in roles.items() if role is Role.VECTOR}
    assert vectors == {name for name, parameter in model.named_parameters() if parameter.ndim == 1}


def test_a_tied_weight_is_one_parameter_and_counts_as_head(llama):
    roles = classify_parameters(llama(tied=True))
    assert roles["model.embed_tokens.weight"] is Role.LM_HEAD
    assert "lm_head.weight" not in roles


class Misnamed(nn.Module):
    """Names that would fool a rule about names; shapes that would fool a rule about ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head_like = nn.Linear(8, 40, bias=False)
        self.norm = nn.Embedding(40, 8)
        self.scalar_head = nn.Linear(8, 1, bias=False)
        self.temperature = nn.Parameter(torch.ones(()))
        self.experts = nn.Parameter(torch.ones(3, 8, 8))
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def test_names_and_ranks_do_not_decide():
    assert classify_parameters(Misnamed()) == {
        "temperature": Role.VECTOR,
        "experts": Role.HIDDEN_MATRIX,
        "lm_head_like.weight": Role.HIDDEN_MATRIX,
        "norm.weight": Role.EMBEDDING,
        "scalar_head.weight": Role.VECTOR,
    }


def test_a_module_settles_the_role_of_its_own_parameters():
    class Gate(nn.Linear):
        parameter_roles = {"weight": "vector"}  # noqa: RUF012

    assert classify_parameters(nn.Sequential(Gate(4, 4), nn.Linear(4, 4, bias=False))) == {
        "0.weight": Role.VECTOR,
        "0.bias": Role.VECTOR,
        "1.weight": Role.HIDDEN_MATRIX,
    }


@pytest.mark.parametrize("tied", [False, True])
def test_routed_parameters_are_the_model_s_own_objects(llama, tied):
    model = llama(tied)
    assert {id(routed.parameter) for routed in route_parameters(model)} == {id(p) for p in model.parameters()}
