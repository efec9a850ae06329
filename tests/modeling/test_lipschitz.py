"""architecture=lipschitz and its parts: bounded slopes, bounded streams, refusals, round trips."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmnorm.evaluation.certificate import certify
from llmnorm.evaluation.lipschitz_bounds import NoCertificate
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.lipschitz import ARCHITECTURES, MAX_SLOPES, FloorNorm, floor_rms_norm
from llmnorm.modeling.mlp import LlmNormPlainMLP

ConfigMaker = Callable[..., LlmNormConfig]
LLAMA_BLOCKS: dict[str, Any] = {
    "architecture": "lipschitz",
    "norm": "qk_norm",
    "norm_options": {"norm_type": "floor_rmsnorm", "floor": 0.7},
    "mlp": "gated",
    "mlp_options": {"clip": 3.0},
    "hidden_act": "silu",
    "attention_options": {"logits_over": "sqrt_head_dim", "output_factor": "inverse_sqrt_heads"},
}


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def jacobian_norm(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The largest singular value of the Jacobian at x, in the l2 norm of the last dimension."""
    jacobian = torch.autograd.functional.jacobian(f, x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))


@pytest.fixture
def block_model() -> LlmNormForCausalLM:
    config = LlmNormConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        architecture="lipschitz",
    )
    model = LlmNormForCausalLM(config).double()
    initialize_weights(model, seed=0)
    for layer in model.model.layers:  # W_o starts at 0
        nn.init.orthogonal_(layer.self_attn.o_proj.weight)
    return model.eval()


def test_floor_norm_is_rmsnorm_above_the_floor_and_linear_below() -> None:
    x = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gain = torch.linspace(0.5, 2, 24, dtype=torch.float64)
    large, small = 3 * x / rms(x)[:, None], 0.2 * x / rms(x)[:, None]
    torch.testing.assert_close(
        floor_rms_norm(large, gain, 0.5), torch.nn.functional.rms_norm(large, (24,), gain, eps=0.0)
    )
    torch.testing.assert_close(floor_rms_norm(small, gain, 0.5), gain * small / 0.5)
    torch.testing.assert_close(floor_rms_norm(small, gain, 0.5, scale=0.25), 0.25 * gain * small / 0.5)
    assert float(rms(floor_rms_norm(x * 100, torch.ones_like(gain), 0.5)).max()) <= 1 + 1e-12


@pytest.mark.parametrize("length", [0.0, 0.1, 0.5, 3.0])
def test_d3_floor_norm_has_slope_max_gain_over_floor(length: float) -> None:
    norm = FloorNorm(12, eps=1e-6, floor=0.4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1.5, 1, 12))
    x = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slope = jacobian_norm(norm, length * x / rms(x))
    assert slope <= 1.5 / 0.4 * (1 + 1e-12)
    if length < 0.4:
        assert slope == pytest.approx(1.5 / 0.4, rel=1e-12)  # attained, so the bound is exact


def test_f2_max_slopes_bound_the_activations() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-12, 12, 480_001, dtype=torch.float64, requires_grad=True)
    measured = {}
    for name, bound in MAX_SLOPES.items():
        y = ACT2FN[name](x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        measured[name] = float(slope.abs().max())
        assert measured[name] <= bound
        assert bool((y.abs() <= x.abs() + 1e-15).all()), name
    # Golden values: GELU at sqrt(2), its tanh form, SiLU; the grid's step is 5e-5, its error its square.
    assert measured["gelu"] == pytest.approx(1.128904145, abs=2e-9)
    assert measured["gelu_pytorch_tanh"] == pytest.approx(1.128993, abs=1e-6)
    assert measured["silu"] == pytest.approx(1.099839, abs=1e-6)


def test_plain_mlp_and_attention_are_the_papers_equations(block_model: LlmNormForCausalLM) -> None:
    """(1 - a) x + a f(x), f = W_o softmax(q k^T / D) v / 3 and W_down gelu(W_up x) / 1.1290; no norms."""
    attention, mlp = block_model.model.layers[0].self_attn, block_model.model.layers[0].mlp
    x = torch.randn(1, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    position = block_model.model._rotary(x, torch.arange(5)[None])
    cos, sin = position[0][0, 0], position[1][0, 0]

    def rotate(y: Tensor) -> Tensor:
        return y * cos + torch.cat((-y[:, 4:], y[:, :4]), dim=-1) * sin

    k, v = rotate(attention.k_proj(x)[0]), attention.v_proj(x)[0]
    heads = []
    for q in attention.q_proj(x)[0].split(8, dim=-1):
        scores = (rotate(q) @ k.T / 8).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    y = attention.o_proj(torch.cat(heads, dim=-1)) / 3
    after = 5 / 6 * x[0] + 1 / 6 * y
    hidden = torch.nn.functional.gelu(mlp.up_proj(after)) / 1.1290
    after = 5 / 6 * after + 1 / 6 * mlp.down_proj(hidden)
    # Rotary tables are fp32, so cos and sin agree to 1e-7.
    torch.testing.assert_close(
        block_model.model.layers[0](x, position_embeddings=position)[0], after, rtol=1e-6, atol=1e-6
    )


def test_o4_8_the_stream_stays_in_the_ball_of_its_embedding(block_model: LlmNormForCausalLM) -> None:
    """Norm-1 matrices: the MLP grows no token and attention at most sqrt(H) / 3 < 1 of the largest."""
    embedding = block_model.model.embed_tokens.weight
    with torch.no_grad():
        embedding.div_(rms(embedding)[:, None])
    ids = torch.randint(0, 19, (4, 12), generator=torch.Generator().manual_seed(3))
    outputs = block_model(ids, output_hidden_states=True)
    for state in outputs.hidden_states:
        assert float(rms(state.detach()).max()) <= 1 + 1e-6  # fp32 rotary tables


def test_clipped_glu_is_lipschitz_where_swiglu_is_not(make_config: ConfigMaker) -> None:
    bound_by_clip, slopes = {}, {}
    for clip in (2.0, None):
        model = LlmNormForCausalLM(make_config(mlp_options={"clip": clip}, init="scaled_embed")).double()
        initialize_weights(model, seed=1)
        mlp = model.model.layers[0].mlp
        with torch.no_grad():
            for weight in mlp.parameters():
                weight.div_(torch.linalg.matrix_norm(weight, 2))
        x = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        slopes[clip] = [jacobian_norm(mlp, scale * x) for scale in (0.1, 1.0, 10.0, 300.0)]
        bound_by_clip[clip] = 2.0 * (1 + MAX_SLOPES["silu"])
    assert max(slopes[2.0]) <= bound_by_clip[2.0]
    assert slopes[None][-1] > 5 * bound_by_clip[2.0]
    assert slopes[2.0][0] == pytest.approx(slopes[None][0], rel=1e-12)  # not cut off: SwiGLU itself


def test_orthogonal_init_has_unit_root_mean_square_norm(make_config: ConfigMaker) -> None:
    model = LlmNormForCausalLM(make_config(architecture="lipschitz"))
    initialize_weights(model, seed=0)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        singular = torch.linalg.svdvals(module.weight.double())
        expected = 0.0 if name.endswith("o_proj") else math.sqrt(module.out_features / module.in_features)
        torch.testing.assert_close(singular, torch.full_like(singular, expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.model.embed_tokens.weight.std(), torch.tensor(1.0), rtol=0.05, atol=0)


def test_logit_and_output_factors_are_what_they_say(make_model: Callable[..., Any], tokens: Tensor) -> None:
    """Twice the logits and half the output from one option each equal the same folded into W_q and W_o."""
    options = {"logit_factor": 2.0, "output_factor": 0.5, "logits_over": "hidden_size"}
    model, plain = make_model(attention_options=options, final_scale=3.0), make_model()
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.q_proj.weight.mul_(2.0 * math.sqrt(8) / 32)
            layer.self_attn.o_proj.weight.mul_(0.5)
        torch.testing.assert_close(model(tokens).logits, 3 * plain(tokens).logits, rtol=1e-4, atol=1e-4)
    by_heads = make_model(attention_options={"output_factor": "inverse_sqrt_heads"})
    assert by_heads.model.layers[0].self_attn.output_factor == 0.5
    # The loss without logits is of the scaled ones too.
    whole = model(tokens, labels=tokens).loss
    torch.testing.assert_close(model(tokens, labels=tokens, return_logits=False).loss, whole)


@pytest.mark.parametrize("changes", [{"architecture": "lipschitz"}, LLAMA_BLOCKS])
def test_saved_and_cached_models_compute_the_same(
    make_model: Callable[..., Any], tokens: Tensor, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = make_model(**changes)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = LlmNormForCausalLM.from_pretrained(tmp_path).eval()
    for key in ("architecture", "norm", "norm_options", "attention_options", "mlp", "mlp_options", "init"):
        assert getattr(again.config, key) == getattr(model.config, key)
    assert torch.equal(again(tokens).logits, expected)
    first = model(tokens[:, :7], use_cache=True)
    rest = model(tokens[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, expected[:, 7:], rtol=1e-4, atol=1e-5)
    assert not model.config.is_llama and not again.config.is_llama


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "pre_rmsnorm"}, "norm='pre_rmsnorm' has no Lipschitz certificate"),
        (
            {"norm": "sandwich"},
            "use norm=convex, or a placement with norm_options.norm_type=floor_rmsnorm",
        ),
        ({"attention": "sla"}, "attention='sla' has no Lipschitz certificate"),
        ({"hidden_act": "quick_gelu", "mlp": "gated"}, "hidden_act='quick_gelu'"),
        ({"mlp": "gated", "quantization": {"group_size": 16}}, "rounding jumps"),
        ({"architecture": "lipshitz"}, "did you mean lipschitz?"),
        ({"mlp": "dense"}, "mlp='dense' is not a choice"),
        ({"mlp_options": {"clip": 2.0}}, "mlp_options.clip is not an option of mlp=plain"),
        (
            {"mlp": "gated", "mlp_options": {"clip": 0}},
            "mlp_options.clip=0 must be null (SwiGLU) or a number",
        ),
        ({"final_scale": 0}, "final_scale=0 must be a number above 0"),
        (
            {"norm_options": {"floor": 0.5}},
            "needs norm_options.norm_in=floor_rmsnorm or norm_options.qk_norm",
        ),
        ({"norm_options": {"alpha": 1.5}}, "norm_options.alpha=1.5 must be null"),
        ({"attention_options": {"output_factor": "half"}}, "must be a number above 0 or inverse_sqrt_heads"),
        (
            {"mup": True},
            "mup={'base_hidden_size': 256, 'base_head_dim': 64} sets the scale of attention logits",
        ),
    ],
)
def test_a_part_without_a_bound_is_refused(
    make_config: ConfigMaker, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        make_config(**{"architecture": "lipschitz", **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_o4_7_what_is_let_through_is_what_can_be_certified(
    make_config: ConfigMaker, row: dict[str, Any]
) -> None:
    """Every norm, with softmax attention: accepted if and only if the certificate has a bound for it."""
    model = LlmNormForCausalLM(make_config(**row))
    initialize_weights(model, seed=0)
    try:
        certify(model)
        certified = True
    except NoCertificate:
        certified = False
    accepted = True
    try:
        make_config(architecture="lipschitz", mlp="gated", hidden_act="silu", **{"init": "hf_llama", **row})
    except ValueError as refusal:
        accepted = False
        assert "has no Lipschitz certificate (architecture=lipschitz)" in str(refusal)
    assert accepted == certified


def test_other_keys_that_an_mlp_does_not_fit(make_config: ConfigMaker) -> None:
    with pytest.raises(ValueError, match="no slope for hidden_act=quick_gelu"):
        make_config(mlp="plain", hidden_act="quick_gelu")
    with pytest.raises(ValueError, match="has no 4-bit form"):
        make_config(mlp="plain", quantization={"group_size": 16})
    with pytest.raises(ValueError, match="not defined for norm=ngpt"):
        make_config(mlp_options={"clip": 2.0}, norm="ngpt")
    model = LlmNormForCausalLM(
        make_config(mlp="plain", hidden_act="quick_gelu", mlp_options={"unit_slope": False})
    )
    assert [type(layer.mlp) for layer in model.model.layers] == [LlmNormPlainMLP] * 3
    assert model.model.layers[0].mlp.slope == 1.0


def test_the_architectures_defaults_yield_to_what_is_given(make_config: ConfigMaker) -> None:
    config = make_config(architecture="lipschitz")
    for key, value in ARCHITECTURES["lipschitz"].items():
        assert getattr(config, key) == value
    assert config.norm_options == {"norm_in": "none", "qk_norm": "none", "alpha": 1 / 6}
    assert (config.attention_options["logits_over"], config.attention_options["output_factor"]) == (
        "head_dim",
        1 / 3,
    )
    ours = make_config(architecture="lipschitz", hidden_act="relu", attention_options={"output_factor": 1.0})
    assert (ours.hidden_act, ours.attention_options["output_factor"]) == ("relu", 1.0)
    assert ours.attention_options["logits_over"] == "head_dim"
