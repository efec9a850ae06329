"""nGPT: its golden step, the published equations written out, unit vectors from the start and after steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.hypersphere import QueryScale, StepOnSphere, unit_vectors
from llmnorm.modeling.rotary import apply_rotary
from llmnorm.optim import create_optimizer, project_weights

ModelMaker = Callable[..., LlmNormForCausalLM]
GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "norms.json").read_text())
# What reads the stream has unit rows, what writes to it unit columns.
UNIT_DIMS = dict.fromkeys(
    ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 1
)
UNIT_DIMS |= {"o_proj": 0, "down_proj": 0}


def assert_unit(model: LlmNormForCausalLM, tolerance: float) -> None:
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    assert len(matrices) == 7 * model.config.num_hidden_layers + 2
    for name, matrix in matrices:
        lengths = matrix.detach().double().norm(dim=UNIT_DIMS[name.split(".")[-2]])
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=tolerance, msg=name)


def test_o1_step_golden() -> None:
    """8 digits of the committed vector."""
    golden = {key: torch.tensor(value, dtype=torch.float64) for key, value in GOLDEN["ngpt_step"].items()}
    step = StepOnSphere(4, initial=0.05).double()
    with torch.no_grad():
        step.weight.copy_(-golden["alpha"] / step.factor)  # the sign of the parameter does not matter
    u = step(unit_vectors(golden["h"]), unit_vectors(golden["target"]))
    torch.testing.assert_close(unit_vectors(u), golden["y"], rtol=0, atol=1e-8)


def test_o2_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, s = (
        torch.randn(n, 6, dtype=torch.float64, generator=generator).requires_grad_() for n in (3, 3, 1)
    )
    step = StepOnSphere(6, initial=0.05).double()

    def update(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
        u = torch.func.functional_call(step, {"weight": s[0]}, (unit_vectors(x), unit_vectors(y)))
        return unit_vectors(u)

    assert torch.autograd.gradcheck(update, (x, y, s))
    zero = torch.zeros(2, 4, requires_grad=True)
    unit_vectors(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()  # a padding row


@pytest.mark.parametrize("init", ["hf_llama", "mitchell", "scaled"])
def test_it_starts_with_unit_vectors_and_the_published_scales(make_model: ModelMaker, init: str) -> None:
    model = make_model(plain=True, norm="ngpt", init=init, pad_token_id=5)
    with torch.no_grad():
        assert not model.model.embed_tokens.weight[5].any()
        model.model.embed_tokens.weight[5, 0] = 1.0
    assert_unit(model, 1e-6)
    d, stored = 32, 32**-0.5
    layer = model.model.layers[1]
    scales = {
        layer.attention_sum: (stored, 0.05),
        layer.mlp_sum: (stored, 0.05),
        layer.self_attn.query_scale: (stored, 1.0),
        layer.mlp.gate_scale: (1.0, math.sqrt(d)),
        layer.mlp.up_scale: (1.0, math.sqrt(d)),
        model.logit_scale: (stored, 1.0),
    }
    for module, (raw, effective) in scales.items():
        torch.testing.assert_close(module.weight.detach(), torch.full_like(module.weight, raw))
        torch.testing.assert_close(module.effective().detach(), torch.full_like(module.weight, effective))
    assert layer.self_attn.query_scale.weight.shape == (16,)  # two key heads of 8
    assert layer.self_attn.scaling == math.sqrt(8)
    assert not [name for name, _ in model.named_parameters() if "norm" in name]


def _published(model: LlmNormForCausalLM, tokens: Tensor) -> Tensor:
    """The paper's equations on the model's weights, with s_qk on queries and on keys."""

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    config = model.config
    d, heads, groups, head_dim = config.hidden_size, config.num_attention_heads, 2, config.head_dim
    h = model.model.embed_tokens(tokens)
    batch, length = tokens.shape
    cos, sin = (p.unsqueeze(1) for p in model.model.rotary_emb(h, torch.arange(length)[None]))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        s_qk = (attention.query_scale.weight * math.sqrt(d)).view(groups, 1, head_dim)

        def split(x: Tensor) -> Tensor:
            return x.view(batch, length, -1, head_dim).transpose(1, 2)

        q = unit(apply_rotary(split(attention.q_proj(h)), cos, sin)) * s_qk.repeat_interleave(
            heads // groups, 0
        )
        k = unit(apply_rotary(split(attention.k_proj(h)), cos, sin)) * s_qk
        k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, split(attention.v_proj(h))))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=math.sqrt(head_dim)
        )
        y = unit(attention.o_proj(mixed.transpose(1, 2).flatten(2)))
        h = unit(h + (layer.attention_sum.weight * 0.05 * math.sqrt(d)).abs() * (y - h))
        v, u = mlp.gate_proj(h) * mlp.gate_scale.weight, mlp.up_proj(h) * mlp.up_scale.weight
        y = unit(mlp.down_proj(torch.nn.functional.silu(v * math.sqrt(d)) * u))
        h = unit(h + (layer.mlp_sum.weight * 0.05 * math.sqrt(d)).abs() * (y - h))
    return model.lm_head(h) * model.logit_scale.weight * math.sqrt(d)


def test_the_published_equations(make_model: ModelMaker, tokens: Tensor) -> None:
    """fp64, gradients of every parameter included; every scale off its initial value.

    The paper normalizes queries and keys after rotary positions, the model before: the same but for the fp32
    tables, which change lengths by up to 6e-8.
    """
    model = make_model(norm="ngpt").double()
    results = []
    for logits in (model(tokens).logits, _published(model, tokens)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        results.append((logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (mine, my_grads), (theirs, their_grads) = results
    torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-7)
    for name, gradient in their_grads.items():
        torch.testing.assert_close(my_grads[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_hidden_states_have_unit_length(make_model: ModelMaker, tokens: Tensor) -> None:
    states = make_model(plain=True, norm="ngpt")(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for h in states:
        torch.testing.assert_close(h.norm(dim=-1), torch.ones(2, 12), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_unit_vectors_after_every_step(
    make_config: Callable, tokens: Tensor, method: str, tied: bool
) -> None:
    """1 +- 1e-6, for any optimizer, with the one line that a loop of one's own needs."""
    model = LlmNormForCausalLM(make_config(norm="ngpt", tie_word_embeddings=tied))
    initialize_weights(model, seed=0)
    optimizer = create_optimizer(method, model, lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: project_weights(model))
    for _ in range(3):
        before = model.model.layers[0].self_attn.q_proj.weight.clone()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (model.model.layers[0].self_attn.q_proj.weight - before).abs().max() > 1e-4
        for name, matrix in ((n, p) for n, p in model.named_parameters() if p.dim() == 2):
            lengths = matrix.detach().norm(dim=UNIT_DIMS[name.split(".")[-2]])
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6, msg=name)


def test_queries_and_keys_share_their_scale_by_groups() -> None:
    scale = QueryScale(key_value_heads=2, head_dim=4, hidden_size=16)
    with torch.no_grad():
        scale.weight.copy_(0.25 * torch.arange(1.0, 9.0))  # effective 1 .. 8
    y = scale(torch.ones(1, 4, 3, 4))
    squares = torch.arange(1.0, 9.0).square().view(2, 4)
    torch.testing.assert_close(y[0, :, 0], squares.repeat_interleave(2, 0))


def test_mistakes(make_config: Callable[..., LlmNormConfig], make_model: ModelMaker) -> None:
    with pytest.raises(
        ValueError, match="norm lists ngpt beside other norms, but it also keeps the embedding"
    ):
        make_config(norm=["pre_rmsnorm", "ngpt", "ngpt"])
    make_config(norm=["ngpt"] * 3)
    for bad in (0, 1.5, "small"):
        with pytest.raises(ValueError, match=r"norm_options\.step=.* must be a number between 0 and 1"):
            make_config(norm="ngpt", norm_options={"step": bad})
    model: Any = make_model(norm="ngpt")
    with pytest.raises(ValueError, match="norm=ngpt keeps the rows of the embedding at unit length"):
        model.resize_token_embeddings(70)
    assert "bounds them; remove optimizer.qk_clip" in model.model.layers[0].self_attn.logit_obstacle()
