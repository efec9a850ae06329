"""The block equation: the table of norms, their options, and what a block computes for any terms."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmnorm.modeling import PRESETS, LlmNormForCausalLM, residual_plan
from llmnorm.modeling.block import LlmNormBlock
from llmnorm.modeling.equation import NORM_NAMES, Layer, Sublayer, identity
from llmnorm.modeling.placements import Preset
from llmnorm.modeling.residual import settle_options
from llmnorm.modeling.sums import weighted_sum

PRE, POST = Sublayer(norm_in="rmsnorm"), Sublayer(norm_post="rmsnorm")


def _scaled(depth: int) -> Sublayer:
    return Sublayer(norm_in="rmsnorm", norm_in_scale=1 / math.sqrt(depth))


def _both(*sublayers: Sublayer) -> tuple[Layer, ...]:
    return tuple(Layer(attention=sublayer, mlp=sublayer) for sublayer in sublayers)


@pytest.mark.parametrize(
    ("norm", "options", "layers", "final_norm"),
    [
        ("pre_ln", {}, _both(*[Sublayer(norm_in="layernorm")] * 4), "layernorm"),
        ("pre_rmsnorm", {}, _both(PRE, PRE, PRE, PRE), "rmsnorm"),
        ("post_ln", {}, _both(*[Sublayer(norm_post="layernorm")] * 4), "layernorm"),
        ("post_rmsnorm", {}, _both(POST, POST, POST, POST), "rmsnorm"),
        ("post_rmsnorm", {"final_norm": False}, _both(POST, POST, POST, POST), None),
        ("mix_ln", {}, _both(POST, PRE, PRE, PRE), "rmsnorm"),
        ("mix_ln", {"post_fraction": 0.7}, _both(POST, POST, PRE, PRE), "rmsnorm"),
        ("mix_ln", {"num_post_layers": 3}, _both(POST, POST, POST, PRE), "rmsnorm"),
        ("layernorm_scaling", {}, _both(*[_scaled(depth) for depth in (1, 2, 3, 4)]), "rmsnorm"),
        (["post_ln", "pre_rmsnorm", "layernorm_scaling", "mix_ln"], {}, None, "rmsnorm"),
    ],
)
def test_plan(norm: Any, options: dict, layers: tuple[Layer, ...] | None, final_norm: str | None) -> None:
    plan = residual_plan(norm, options, 4)
    assert plan.final_norm == final_norm
    if layers is None:  # the mixed list: each row speaks for its own depth
        layers = _both(Sublayer(norm_post="layernorm"), PRE, _scaled(3), PRE)
    assert plan.layers == layers


# layers, share -> number of Post-LN layers: the cells published for Mix-LN, and rounding.
@pytest.mark.parametrize(
    ("num_layers", "fraction", "count"),
    [
        *((12, 0.25, 3), (24, 0.25, 6), (32, 0.0625, 2), (24, 1 / 6, 4), (24, 5 / 12, 10), (24, 0.5, 12)),
        *((6, 0.25, 1), (3, 0.25, 0), (7, 0.0, 0), (7, 1.0, 7), (100, 0.29, 29), (10, 0.19, 1)),
    ],
)
def test_mix_ln_counts_down(num_layers: int, fraction: float, count: int) -> None:
    options = settle_options("mix_ln", {"post_fraction": fraction}, num_layers)
    assert options == {"norm_type": "rmsnorm", "num_post_layers": count}
    assert settle_options("mix_ln", options, num_layers) == options


def test_settled_options_stay_settled(row: dict[str, Any]) -> None:
    given = row.get("norm_options", {})
    before = dict(given)
    options = settle_options(row["norm"], given, 3)
    assert given == before
    assert settle_options(row["norm"], options, 3) == options
    assert residual_plan(row["norm"], options, 3) == residual_plan(row["norm"], given, 3)


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("mixln", {}, "norm='mixln' is not a norm; did you mean mix_ln?"),
        ("qqq", {}, "norm='qqq' is not a norm; known are pre_ln, pre_rmsnorm"),
        (None, {}, "norm=None is not a norm"),
        (["pre_ln"] * 3, {}, "norm lists 3 layers but num_hidden_layers=4"),
        (["pre_ln", "pre_ln", "pre_ln", ["pre_ln"]], {}, "norm=['pre_ln'] is not a norm"),
        ("pre_ln", {"norm_type": "rmsnorm"}, "norm_options.norm_type is not an option of norm=pre_ln"),
        ("mix_ln", {"post_fractoin": 0.5}, "did you mean post_fraction?"),
        ("mix_ln", {"post_fraction": 1.5}, "norm_options.post_fraction=1.5 must be a number in [0, 1]"),
        ("mix_ln", {"post_fraction": -0.1}, "norm_options.post_fraction=-0.1 must be a number in [0, 1]"),
        ("mix_ln", {"post_fraction": True}, "norm_options.post_fraction=True must be a number"),
        ("mix_ln", {"post_fraction": "0.5"}, "norm_options.post_fraction='0.5' must be a number"),
        ("mix_ln", {"num_post_layers": 5}, "norm_options.num_post_layers=5 must be an integer from 0"),
        ("mix_ln", {"num_post_layers": 1.0}, "norm_options.num_post_layers=1.0 must be an integer"),
        ("mix_ln", {"num_post_layers": 1, "post_fraction": 0.25}, "two ways to say one thing"),
        ("mix_ln", {"norm_type": "batchnorm"}, "norm_options.norm_type='batchnorm' must be rmsnorm, "),
        ("post_ln", {"final_norm": 1}, "norm_options.final_norm=1 must be true or false"),
        ("layernorm_scaling", {"final_norm": True}, "final_norm is not an option of norm=layernorm_scaling"),
    ],
)
def test_mistakes(norm: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        settle_options(norm, options, 4)
    assert message in str(error.value)


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.5, 1.0), (1.0, 0.3), (2.5, 0.3)])
def test_weighted_sum(a: float, b: float) -> None:
    xs, y = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(weighted_sum(a, b)(xs, y), a * xs + b * y, rtol=1e-14, atol=1e-15)


def test_nothing_is_multiplied_by_one(make_model: Callable[..., LlmNormForCausalLM]) -> None:
    """A Pre-LN block has two norms and two additions; what it lacks is the identity, not a product."""
    block = make_model(norm="pre_rmsnorm").model.layers[1]
    assert block.attention_sum is operator.add
    assert block.mlp_sum is operator.add
    absent = [
        name for place in NORM_NAMES.values() for name in place.values() if getattr(block, name) is identity
    ]
    assert sorted(absent) == [
        "attention_residual_norm",
        "mlp_residual_norm",
        "post_mlp_layernorm",
        "post_self_attn_layernorm",
    ]
    assert block.to_stream is identity


TERMS = {
    "every_norm": Sublayer(norm_in="rmsnorm", norm_out="layernorm", norm_post="rmsnorm"),
    "no_norm": Sublayer(),
    "deepnorm": Sublayer(norm_post="layernorm", shortcut_scale=1.7),
    "branch": Sublayer(norm_in="rmsnorm", norm_in_scale=0.6, branch_scale=0.3),
    "normed": Sublayer(norm_in="rmsnorm", shortcut="normed", shortcut_scale=1.2, branch_scale=0.9),
    "output_after_norm": Sublayer(norm_out="rmsnorm", norm_post="rmsnorm", output_scale=0.7),
    "output_without_norm": Sublayer(norm_in="rmsnorm", output_scale=0.7, branch_scale=0.5),
}


def _literal(spec: Sublayer, x: Tensor, f: Callable[[Tensor], Tensor], gains: dict[str, Tensor]) -> Tensor:
    """The five lines of the equation, with eps 1e-6 and shift 0, in fp64."""

    def norm(slot: str, x: Tensor) -> Tensor:
        kind = getattr(spec, slot)
        if kind is None:
            return x
        centered = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
        return gains[slot] * centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    z = spec.norm_in_scale * norm("norm_in", x)
    y = norm("norm_out", f(z))
    xs = norm("norm_in", x) if spec.shortcut == "normed" else x
    u = spec.shortcut_scale * xs + spec.branch_scale * y
    return spec.output_scale * norm("norm_post", u)


@pytest.mark.parametrize("terms", TERMS)
def test_block_computes_the_equation(make_config: Callable[..., Any], terms: str) -> None:
    torch.manual_seed(0)
    spec = TERMS[terms]
    block = LlmNormBlock(make_config(), 0, Layer(attention=spec, mlp=spec)).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, parameter in block.named_parameters():
        if name.endswith("norm.bias"):
            nn.init.zeros_(parameter)

    class Attention(nn.Module):  # any function of z will do
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32).double()

        def forward(self, z: Tensor) -> tuple[Tensor, None]:
            return torch.tanh(self.linear(z)), None

    block.self_attn = Attention()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = x
    for place, f in (("attention", lambda z: block.self_attn(z)[0]), ("mlp", block.mlp)):
        gains = {
            slot: getattr(block, name).weight
            for slot, name in NORM_NAMES[place].items()
            if getattr(block, name) is not identity
        }
        expected = _literal(spec, expected, f, gains)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "terms",
    [
        {"norm_in_scale": 0.5},
        {"shortcut": "normed"},
        {"norm_in": "rmsnorm", "shortcut": "normed", "norm_in_scale": 0.5},
    ],
)
def test_terms_that_contradict_each_other(terms: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        Sublayer(**terms)


def test_a_new_placement_is_one_row(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., LlmNormForCausalLM], tokens: Tensor
) -> None:
    terms = Sublayer(norm_in="rmsnorm", norm_out="rmsnorm")
    row = Preset(
        layer=lambda depth, num_layers, options: Layer(terms, terms),
        final_norm=lambda options: "rmsnorm",
    )
    monkeypatch.setitem(PRESETS, "my_placement", row)
    model = make_model(norm="my_placement", rms_norm_eps=1e-12)
    norms = [
        name for name in model.state_dict() if name.startswith("model.layers.0.") and "layernorm" in name
    ]
    assert norms == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_self_attn_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.post_mlp_layernorm.weight",
    ]
    # N_out makes the block blind to the scale of the matrix before it.
    before = model(tokens).logits
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(7)
            layer.self_attn.o_proj.weight.mul_(7)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)


STATE_DICT_NORMS = {
    "pre_rmsnorm": {"input_layernorm.weight", "post_attention_layernorm.weight"},
    "post_rmsnorm": {"attention_residual_norm.weight", "mlp_residual_norm.weight"},
}


def test_names_of_the_norms_in_the_state_dict(make_model: Callable[..., LlmNormForCausalLM]) -> None:
    model = make_model(norm="mix_ln", norm_options={"num_post_layers": 2})
    for i, kind in enumerate(("post_rmsnorm", "post_rmsnorm", "pre_rmsnorm")):
        names = {name for name in model.model.layers[i].state_dict() if "norm" in name}
        assert names == STATE_DICT_NORMS[kind]
