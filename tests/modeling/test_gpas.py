"""GPAS: its defined gradient, its gate in each base, where it starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM, residual_plan
from llmnorm.modeling.sums import gate_activations

ModelMaker = Callable[..., LlmNormForCausalLM]
BASES = {
    "pre": "pre_rmsnorm",
    "layernorm_scaling": "layernorm_scaling",
    "sandwich": "sandwich",
    "post": "post_rmsnorm",
    "deepnorm": "deepnorm",
    "mix_ln": "mix_ln",
}
BASE_OPTIONS = {"mix_ln": {"num_post_layers": 1}}  # of 3


def test_the_documented_jacobian() -> None:
    """y = (1 - SiLU(a)) x, dx = dy, da = -SiLU'(a) sum(x dy); SiLU(0.7) and its derivative by hand."""
    x, dy = torch.randn(2, 3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    gate = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    y = gate_activations(x, gate)
    y.backward(dy)
    silu, slope = 0.46773144, 0.82338678
    torch.testing.assert_close(y, (1 - silu) * x, rtol=1e-6, atol=0)
    assert torch.equal(x.grad, dy)
    torch.testing.assert_close(gate.grad, -slope * (x * dy).sum().reshape(1), rtol=1e-6, atol=0)


def test_dtype_follows_x_with_one_rounding() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate = torch.tensor([0.3])
    y = gate_activations(x, gate)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (x.float() - torch.nn.functional.silu(gate) * x.float()).bfloat16())


@pytest.mark.parametrize("base", BASES)
def test_one_gate_per_layer_on_the_base(make_model: ModelMaker, tokens: Tensor, base: str) -> None:
    """The layers written out with the base's norms and the gate after, or on the shortcut before, the sum."""
    options = BASE_OPTIONS.get(base, {})
    gpas = make_model(norm="gpas", norm_options={"base": base, **options})
    plain = make_model(norm=BASES[base], norm_options=options)
    missing, gates = plain.load_state_dict(gpas.state_dict(), strict=False)
    assert missing == []
    assert gates == [f"model.layers.{i}.attention_sum.gate" for i in range(3)]
    assert all(gpas.state_dict()[name].shape == (1,) for name in gates)

    x = plain.model.embed_tokens(tokens)
    positions = tuple(p.unsqueeze(1) for p in plain.model.rotary_emb(x, torch.arange(12)[None]))
    for block, gated in zip(plain.model.layers, gpas.model.layers, strict=True):
        gate = gated.attention_sum.gate
        factor = 1 - gate * torch.sigmoid(gate)
        on_shortcut, a = (
            hasattr(block.attention_residual_norm, "weight"),
            6**0.25 if base == "deepnorm" else 1,
        )
        y = block.post_self_attn_layernorm(block.self_attn(block.input_layernorm(x), positions)[0])
        u = factor * a * x + y if on_shortcut else factor * (x + y)
        x = block.attention_residual_norm(u)
        y = block.post_mlp_layernorm(block.mlp(block.post_attention_layernorm(x)))
        u = factor * a * x + y if on_shortcut else factor * (x + y)
        x = block.mlp_residual_norm(u)
    expected = plain.lm_head(plain.model.norm(x))
    torch.testing.assert_close(gpas(tokens).logits, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("base", BASES)
def test_it_starts_as_its_base(make_model: ModelMaker, tokens: Tensor, base: str) -> None:
    """Gates are 0: the same logits and, but for the gates, the same gradients to the last bit."""
    options = BASE_OPTIONS.get(base, {})
    gpas = make_model(plain=True, norm="gpas", norm_options={"base": base, **options})
    plain = make_model(plain=True, norm=BASES[base], norm_options=options)
    drawn = plain.state_dict()  # with the base's own initialization
    assert all(torch.equal(drawn[name], gpas.state_dict()[name]) for name in drawn)
    plain.load_state_dict(gpas.state_dict(), strict=False)
    for model in (gpas, plain):
        model(tokens, labels=tokens).loss.backward()
    assert torch.equal(gpas(tokens).logits, plain(tokens).logits)
    mine = {name: p.grad for name, p in gpas.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(mine.pop(name), parameter.grad), name
    assert len(mine) == 3
    assert all(gradient.abs().item() > 0 for gradient in mine.values())


def test_mistakes(make_config: Callable) -> None:
    assert residual_plan("gpas", {}, 2).layers[0].mlp.gate == "sum"
    with pytest.raises(
        ValueError, match=r"norm_options\.base='mix' must be pre, layernorm_scaling, sandwich"
    ):
        make_config(norm="gpas", norm_options={"base": "mix"})
    with pytest.raises(ValueError, match=r"num_post_layers=1 needs norm_options.base=mix_ln and not 'pre'"):
        make_config(norm="gpas", norm_options={"num_post_layers": 1})
    with pytest.raises(ValueError, match="init='scaled' draws matrices that norm=deepnorm draws"):
        make_config(norm="gpas", norm_options={"base": "deepnorm"}, init="scaled")


def test_options_of_the_base(make_config: Callable) -> None:
    """Only those of the base are kept, so a saved config loads as it was saved."""
    cases = {
        "pre": {},
        "deepnorm": {"own_init": True},
        "mix_ln": {"num_post_layers": 0},  # a quarter of 3
    }
    for base, own in cases.items():
        config = make_config(norm="gpas", norm_options={"base": base})
        assert config.norm_options == {"norm_type": "rmsnorm", "base": base, **own}
        again = make_config(norm="gpas", norm_options=dict(config.norm_options))
        assert again.norm_options == config.norm_options
    shared = make_config(norm=["mix_ln", "gpas", "gpas"], norm_options={"num_post_layers": 1})
    assert shared.norm_options == {"norm_type": "rmsnorm", "num_post_layers": 1, "base": "pre"}
