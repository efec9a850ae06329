"""Norms inside attention, HybridNorm and ScaleNorm: against transformers' Qwen 3 and the equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from llmnorm.modeling import LlmNormForCausalLM, residual_plan
from llmnorm.modeling.equation import Layer, ProjectionNorm, Sublayer
from llmnorm.modeling.norms import make_norm, rms_norm

ModelMaker = Callable[..., LlmNormForCausalLM]
PRE = Sublayer(norm_in="rmsnorm")
QK, QKV = (ProjectionNorm("rmsnorm", "head", tuple(names)) for names in ("qk", "qkv"))
HYBRID = Layer(Sublayer(projection_norm=QKV), Sublayer(norm_in="rmsnorm", shortcut="normed"))
FIRST = Layer(Sublayer(norm_in="rmsnorm", projection_norm=QKV), PRE)


@pytest.mark.parametrize(
    ("norm", "options", "layers", "final_norm"),
    [
        ("qk_norm", {}, [Layer(Sublayer(norm_in="rmsnorm", projection_norm=QK), PRE)] * 3, "rmsnorm"),
        ("hybrid_norm", {}, [HYBRID] * 3, "rmsnorm"),
        ("hybrid_norm", {"first_layer": "pre"}, [FIRST, HYBRID, HYBRID], "rmsnorm"),
        (
            "scalenorm",
            {},
            [Layer(Sublayer(norm_in="scalenorm"), Sublayer(norm_in="scalenorm"))] * 3,
            "scalenorm",
        ),
    ],
)
def test_plan(norm: str, options: dict[str, Any], layers: list[Layer], final_norm: str) -> None:
    plan = residual_plan(norm, options, 3)
    assert (plan.layers, plan.final_norm, plan.embedding_norm) == (tuple(layers), final_norm, None)


def test_mistakes(make_config: Callable) -> None:
    with pytest.raises(ValueError, match=r"norm_options\.first_layer='post' must be hybrid or pre"):
        make_config(norm="hybrid_norm", norm_options={"first_layer": "post"})
    with pytest.raises(ValueError, match="norm_type is not an option of norm=scalenorm"):
        make_config(norm="scalenorm", norm_options={"norm_type": "rmsnorm"})


def test_qk_norm_is_qwen_3(make_model: ModelMaker, tokens: Tensor) -> None:
    """Equal to transformers' Qwen3ForCausalLM on the same state dict, grouped heads included."""
    model = make_model(norm="qk_norm")
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
    )  # fmt: skip
    qwen = Qwen3ForCausalLM(Qwen3Config(**{key: getattr(model.config, key) for key in keys})).eval()
    qwen.load_state_dict(model.state_dict(), strict=True)
    # fp32: the two round the norms in another order.
    torch.testing.assert_close(model(tokens).logits, qwen(tokens).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("norm", ["qk_norm", "reordered", "hybrid_norm"])
def test_normed_projections_ignore_their_scale(make_model: ModelMaker, tokens: Tensor, norm: str) -> None:
    """At eps 0, W_q and W_k (HybridNorm: W_v too) times a constant change nothing."""
    model = make_model(norm=norm, rms_norm_eps=0.0)
    before = model(tokens).logits
    with torch.no_grad():
        for layer in model.model.layers:
            for name in "qkv" if norm == "hybrid_norm" else "qk":
                getattr(layer.self_attn, f"{name}_proj").weight.mul_(8)  # a power of two rounds nothing
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)


def test_qk_norm_bounds_the_logits(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(norm="qk_norm")
    queries: list[Tensor] = []
    for layer in model.model.layers:
        for name in ("q_norm", "k_norm"):
            getattr(layer.self_attn, name).register_forward_hook(lambda m, i, y: queries.append(y))
    model(tokens)
    for layer, (q, k) in zip(model.model.layers, zip(queries[::2], queries[1::2], strict=True), strict=True):
        attention = layer.self_attn
        largest = q.norm(dim=-1).max() * k.norm(dim=-1).max() * attention.scaling
        bound = math.sqrt(8) * attention.q_norm.weight.abs().max() * attention.k_norm.weight.abs().max()
        assert largest <= bound * (1 + 1e-5)


def test_hybrid_norm_by_its_equation(make_model: ModelMaker, tokens: Tensor) -> None:
    """One block, written out in fp64 with 4 heads over 2 key-value heads."""
    block = make_model(norm="hybrid_norm").double().model.layers[1]
    x = torch.randn(2, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = torch.ones(1, 1, 12, 8).double(), torch.zeros(1, 1, 12, 8).double()  # no rotation
    attention = block.self_attn

    def heads(name: str, count: int) -> Tensor:
        projected = getattr(attention, f"{name}_proj")(x).view(2, 12, count, 8)
        normed = projected / (projected.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return (normed * getattr(attention, f"{name}_norm").weight).transpose(1, 2)

    q, k, v = heads("q", 4), *(heads(name, 2).repeat_interleave(2, 1) for name in "kv")
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(
        torch.ones(12, 12).triu(1).bool(), -math.inf
    )
    y = x + attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 12, 32))
    z = rms_norm(y, block.post_attention_layernorm.weight, 1e-6)
    mlp = block.mlp
    expected = z + mlp.down_proj(F.silu(mlp.gate_proj(z)) * mlp.up_proj(z))
    actual = block(x, position_embeddings=(cos, sin), attention_mask=None)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_scalenorm_is_rms_norm_with_tied_gains() -> None:
    """g x / ||x|| with gains g / sqrt(d), dg = sum(dgain) / sqrt(d), in fp64 to its rounding."""
    norm = make_norm("scalenorm", 16, 1e-5).double()
    assert norm.weight.tolist() == [4.0]
    torch.nn.init.constant_(norm.weight, 2.5)
    x, dy = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    gain = torch.full((16,), 2.5 / 4, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = norm(x), rms_norm(other, gain, 0.0)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-15)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(norm.weight.grad, gain.grad.sum().reshape(1) / 4, rtol=1e-12, atol=1e-14)


def test_scalenorm_of_nothing_and_of_little() -> None:
    """A zero row stays zero with a finite gradient; below eps the length is eps."""
    norm = make_norm("scalenorm", 4, 1e-2)
    x = torch.tensor([[0.0, 0, 0, 0], [3e-3, 0, 0, 4e-3]], requires_grad=True)
    y = norm(x)
    torch.testing.assert_close(y, 200 * x)  # sqrt(4) / 1e-2
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    half = torch.full((2, 64), 300.0, dtype=torch.float16)
    assert torch.equal(make_norm("scalenorm", 64, 1e-6)(half), torch.ones_like(half))  # 300^2 exceeds fp16
