"""normalize_and_project: every matrix but the last returns to the Frobenius norm it started with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import Role, create_optimizer, project_weights, route_parameters
from llmnorm.optim.norm_keeping import KEPT

SIZES: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENS = torch.arange(16).reshape(2, 8)
NAP = {"name": "normalize_and_project"}


def build(seed: int = 0, **changes: Any) -> LlmNormForCausalLM:
    model = LlmNormForCausalLM(LlmNormConfig(**{**SIZES, "weight_constraint": NAP, **changes}))
    initialize_weights(model, seed)
    return model


def norms(model: LlmNormForCausalLM, roles: tuple[Role, ...] = KEPT) -> torch.Tensor:
    kept = (parameter for _, parameter, role in route_parameters(model) if role in roles)
    return torch.stack([parameter.detach().double().norm() for parameter in kept])


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_o5_norms_are_the_initial_ones_after_every_step_and_the_head_is_free(method):
    model = build()
    project_weights(model)
    initial, head = norms(model), norms(model, (Role.LM_HEAD,))
    optimizer = create_optimizer(method, model, lr=1e-2)
    for _ in range(4):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert ((norms(model) / initial - 1).abs() > 1e-4).any()
        project_weights(model, optimizer)
        torch.testing.assert_close(norms(model), initial, rtol=1e-6, atol=0)
    assert (norms(model, (Role.LM_HEAD,)) / head - 1).abs() > 1e-4


def test_the_first_projection_changes_no_bit_and_a_second_changes_nothing():
    model = build()
    drawn = {name: p.detach().clone() for name, p in model.named_parameters()}
    project_weights(model)
    assert all(torch.equal(p, drawn[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
    project_weights(model)
    once = {name: p.detach().clone() for name, p in model.named_parameters()}
    project_weights(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, once[name], rtol=3e-7, atol=0)
    kept = {name for name, _, role in route_parameters(model) if role in KEPT}
    for name, value in once.items():
        expected = drawn[name] if name in kept else drawn[name] * 1.7
        torch.testing.assert_close(value, expected, rtol=3e-7, atol=0)


def test_o5_what_does_not_depend_on_the_length_of_its_matrices_is_unchanged():
    """Projections whose rows are normalized; the embedding is at its norm already."""
    model = build(weight_parametrization="weight_conditioning")
    project_weights(model)
    expected = model(TOKENS).logits
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_proj" in name:
                p.mul_(3.0)
    tripled = norms(model)
    project_weights(model)
    assert (norms(model) / tripled - 1).abs().max() > 0.5
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)


def test_saved_norms_are_those_that_a_loaded_model_returns_to(tmp_path):
    model = build()
    project_weights(model)
    initial = norms(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    model.save_pretrained(tmp_path)
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path)
    project_weights(loaded)
    torch.testing.assert_close(norms(loaded), initial, rtol=1e-6, atol=0)
    fresh = build(seed=1)  # forgets those of a model that is drawn anew
    fresh.load_state_dict(model.state_dict())
    initialize_weights(fresh, 2)
    expected = norms(fresh)
    project_weights(fresh)
    torch.testing.assert_close(norms(fresh), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "none"}, "would keep o_proj of layers.0 at 0, where init=hf_llama with norm=none"),
        ({"architecture": "lipschitz", "norm": "convex"}, "would keep o_proj of layers.0 at 0"),
        ({"tie_word_embeddings": True}, "cannot treat the tied weight"),
        ({"norm": "ngpt"}, "cannot hold beside norm=ngpt"),
        ({"weight_constraint": {**NAP, "max_norm": 1.0}}, "max_norm=1.0 does nothing with name=norm"),
        ({"weight_parametrization": "spectral_conditioning"}, "depend on the length"),
    ],
)
def test_what_cannot_keep_its_norms_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_four_bit_weights_may_keep_theirs():
    model = build(quantization={"group_size": 8})
    project_weights(model)
    initial = norms(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7)
    project_weights(model)
    torch.testing.assert_close(norms(model), initial, rtol=1e-6, atol=0)
