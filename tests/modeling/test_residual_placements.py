"""What is true of the placements with output norms, scaled shortcuts, learned scales and none at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM

from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights, residual_plan
from llmnorm.modeling.equation import Layer, LearnedScale, ProjectionNorm, Sublayer
from llmnorm.modeling.initialization import parameter_rule
from llmnorm.modeling.norms import rms_norm

ModelMaker = Callable[..., LlmNormForCausalLM]
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def _alpha(num_layers: int) -> float:
    return (2 * num_layers) ** 0.25


PRE_AND_OUT = Sublayer(norm_in="layernorm", norm_out="layernorm")
REORDERED = Layer(
    Sublayer(norm_out="rmsnorm", projection_norm=ProjectionNorm("rmsnorm", "width")),
    Sublayer(norm_out="rmsnorm"),
)


def _learned(initial: float, per: Any) -> Sublayer:
    return Sublayer(norm_in="rmsnorm", learned_branch_scale=LearnedScale(initial, per))


@pytest.mark.parametrize(
    ("norm", "options", "layer", "embedding_norm", "final_norm"),
    [
        ("deepnorm", {}, Sublayer(norm_post="rmsnorm", shortcut_scale=8**0.25), None, "rmsnorm"),
        ("sandwich", {"norm_type": "layernorm"}, PRE_AND_OUT, None, "layernorm"),
        ("peri_ln", {"norm_type": "layernorm"}, PRE_AND_OUT, None, "layernorm"),
        (
            "peri_ln",
            {"norm_type": "layernorm", "embedding_norm": True},
            PRE_AND_OUT,
            "layernorm",
            "layernorm",
        ),
        ("reordered", {}, REORDERED, None, "rmsnorm"),
        ("skipinit", {}, _learned(0.5, "sublayer"), None, "rmsnorm"),
        ("skipinit", {"skip_scale": 0}, _learned(0.0, "sublayer"), None, "rmsnorm"),
        ("rezero", {}, _learned(0.0, "layer"), None, "rmsnorm"),
        ("layerscale", {}, _learned(0.1, "feature"), None, "rmsnorm"),
        ("layerscale", {"layer_scale": 1e-3}, _learned(1e-3, "feature"), None, "rmsnorm"),
        ("none", {}, Sublayer(), None, None),
    ],
)
def test_plan(
    norm: str, options: dict[str, Any], layer: Any, embedding_norm: str | None, final_norm: str | None
) -> None:
    plan = residual_plan(norm, options, 4)
    assert plan.layers == ((layer if isinstance(layer, Layer) else Layer(layer, layer)),) * 4
    assert (plan.embedding_norm, plan.final_norm) == (embedding_norm, final_norm)


@pytest.mark.parametrize(("num_layers", "initial"), [(18, 0.1), (19, 1e-5), (24, 1e-5), (25, 1e-6)])
def test_published_layerscale(num_layers: int, initial: float) -> None:
    scale = residual_plan("layerscale", {}, num_layers).layers[0].mlp.learned_branch_scale
    assert scale == LearnedScale(initial, "feature")


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("deepnorm", {"own_init": 1}, "norm_options.own_init=1 must be true (the method's own"),
        ("sandwich", {"embedding_norm": True}, "embedding_norm is not an option of norm=sandwich"),
        ("peri_ln", {"embedding_norm": "yes"}, "norm_options.embedding_norm='yes' must be true or false"),
        ("skipinit", {"skip_scale": "0"}, "norm_options.skip_scale='0' must be null or a finite number"),
        ("layerscale", {"layer_scale": math.inf}, "norm_options.layer_scale=inf must be null or a finite"),
        ("rezero", {"skip_scale": 0.0}, "skip_scale is not an option of norm=rezero"),
        ("none", {"norm_type": "rmsnorm"}, "norm_type is not an option of norm=none"),
    ],
)
def test_mistakes(make_config: Callable, norm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_config(norm=norm, norm_options=options)
    assert message in str(error.value)


@pytest.mark.parametrize("norm", ["deepnorm", "none"])
def test_an_init_that_would_be_overruled_is_refused(make_config: Callable, norm: str) -> None:
    with pytest.raises(ValueError, match=f"init='scaled' draws matrices that norm={norm} draws"):
        make_config(norm=norm, init="scaled")
    make_config(norm=norm, init="scaled", norm_options={"own_init": False})
    if norm == "deepnorm":
        make_config(norm=norm, init="scaled_embed")  # DeepNorm leaves the embedding alone


# O7: the published constants of decoder-only DeepNorm.
DEEPNORM = [(12, 2.21336, 0.319472), (24, 2.63215, 0.268642), (32, 2.82843, 0.25)]


@pytest.mark.parametrize(("num_layers", "alpha", "beta"), DEEPNORM)
def test_o7_deepnorm_constants(num_layers: int, alpha: float, beta: float) -> None:
    config = LlmNormConfig(
        vocab_size=8, hidden_size=16, intermediate_size=40, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, norm="deepnorm",
    )  # fmt: skip
    plan = residual_plan(config.norm, config.norm_options, num_layers)
    for sublayer in (plan.layers[0].attention, plan.layers[-1].mlp):
        assert sublayer.shortcut_scale == pytest.approx(alpha, rel=1e-5)
    with torch.device("meta"):
        layer = LlmNormForCausalLM(config).model.layers[num_layers - 1]
    gains = {"q_proj": 1.0, "k_proj": 1.0, "v_proj": beta, "o_proj": beta}
    gains |= {"gate_proj": beta, "up_proj": beta, "down_proj": beta}
    for name, gain in gains.items():
        matrix = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        matrix = getattr(matrix, name)
        xavier = math.sqrt(2 / (matrix.in_features + matrix.out_features))
        rule: Any = parameter_rule(matrix, "weight", config)
        assert rule.std == pytest.approx(gain * xavier, rel=1e-5), name


def test_o7_deepnorm_is_post_norm_with_scaled_writers(make_model: ModelMaker, tokens: Tensor) -> None:
    """N(a x + f(x)) = N(x + f(x) / a) at eps 0, in fp64 to its rounding."""
    deep = make_model(norm="deepnorm", rms_norm_eps=0.0).double()
    post = make_model(norm="post_rmsnorm", rms_norm_eps=0.0).double()
    post.load_state_dict(deep.state_dict(), strict=True)
    with torch.no_grad():
        for layer in post.model.layers:
            for name in WRITERS:
                layer.get_submodule(name).weight.div_(_alpha(3))
    torch.testing.assert_close(deep(tokens).logits, post(tokens).logits, rtol=0, atol=1e-12)


def test_o7_deepnorm_gradients_are_flat_over_depth() -> None:
    """Norm of each layer's gradient at initialization, 12 layers: max / min below 1.4."""
    config = LlmNormConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=12,
        num_attention_heads=4, norm="deepnorm",
    )  # fmt: skip
    model = LlmNormForCausalLM(config)
    initialize_weights(model, seed=0)
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    profile = [
        math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters() if p.dim() == 2))
        for layer in model.model.layers
    ]
    assert max(profile) / min(profile) < 1.4


@pytest.mark.parametrize("norm", ["sandwich", "peri_ln", "reordered"])
def test_o9_output_norms_ignore_the_scale_of_the_writers(
    make_model: ModelMaker, tokens: Tensor, norm: str
) -> None:
    """O9: W_o and W_down times a constant change nothing at eps 0."""
    model = make_model(norm=norm, rms_norm_eps=0.0)
    before = model(tokens).logits
    with torch.no_grad():
        for layer in model.model.layers:
            for name in WRITERS:
                layer.get_submodule(name).weight.mul_(8)  # a power of two rounds nothing
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)


def test_sandwich_adds_one_to_the_variance_per_sublayer() -> None:
    """mean(gain_out^2) = 1 each, branches nearly uncorrelated with the stream: 2 per layer, within 8 %."""
    config = LlmNormConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=4, norm="sandwich",
    )  # fmt: skip
    model = LlmNormForCausalLM(config)
    initialize_weights(model, seed=2)
    streams: list[float] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, x: streams.append(x.square().mean().item()))
    tokens = torch.randint(0, 2000, (4, 128), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model(tokens, use_cache=False)
    assert streams == pytest.approx([2.0 * depth for depth in range(1, 7)], rel=0.08)


def test_peri_ln_normalizes_the_embedding(make_model: ModelMaker, tokens: Tensor) -> None:
    """Its embedding norm, applied by hand to the input of a sandwich with the same weights."""
    peri = make_model(norm="peri_ln", norm_options={"embedding_norm": True})
    sandwich = make_model(norm="sandwich")
    missing, unexpected = sandwich.load_state_dict(peri.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["model.embed_norm.weight"])
    x = rms_norm(peri.model.embed_tokens(tokens), peri.model.embed_norm.weight, 1e-6)
    assert torch.equal(peri(tokens).logits, sandwich(inputs_embeds=x).logits)
    assert (sandwich(tokens).logits - peri(tokens).logits).abs().max() > 0.1

    plain = make_model(norm="peri_ln")
    assert list(plain.state_dict()) == list(sandwich.state_dict())


def test_reordered_is_olmo_2(make_model: ModelMaker, tokens: Tensor) -> None:
    """Equal to transformers' Olmo2ForCausalLM on the same weights, grouped heads and cache included."""
    model = make_model(norm="reordered")
    config = model.config
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters",
    )  # fmt: skip
    olmo = Olmo2ForCausalLM(Olmo2Config(**{key: getattr(config, key) for key in keys})).eval()
    renamed = {
        name.replace("post_self_attn_layernorm", "post_attention_layernorm").replace(
            "post_mlp_layernorm", "post_feedforward_layernorm"
        ): value
        for name, value in model.state_dict().items()
    }
    olmo.load_state_dict(renamed, strict=True)
    # fp32: the two round the norms in another order.
    torch.testing.assert_close(model(tokens).logits, olmo(tokens).logits, rtol=1e-5, atol=2e-5)


SCALED = {
    "skipinit": ("attention_sum", "mlp_sum", 1),
    "rezero": ("attention_sum", "attention_sum", 1),
    "layerscale": ("attention_sum", "mlp_sum", 32),
}


@pytest.mark.parametrize("norm", SCALED)
def test_o10_a_learned_scale_is_a_scale_of_the_writers(
    make_model: ModelMaker, tokens: Tensor, norm: str
) -> None:
    """x + s f(N(x)) = x + f'(N(x)) with W' = diag(s) W, and ds = the row sums of W * dW'."""
    attention_owner, mlp_owner, size = SCALED[norm]
    scaled, pre = make_model(norm=norm).double(), make_model(norm="pre_rmsnorm").double()
    names = [name for name in scaled.state_dict() if name.endswith(".scale")]
    owners = sorted({attention_owner, mlp_owner})
    assert names == [f"model.layers.{i}.{owner}.scale" for i in range(3) for owner in owners]
    pre.load_state_dict({k: v for k, v in scaled.state_dict().items() if k not in names}, strict=True)
    with torch.no_grad():
        for mine, theirs in zip(scaled.model.layers, pre.model.layers, strict=True):
            for owner, name in zip((attention_owner, mlp_owner), WRITERS, strict=True):
                scale = mine.get_submodule(owner).scale
                assert scale.shape == (size,)
                theirs.get_submodule(name).weight.mul_(scale[:, None])
    torch.testing.assert_close(scaled(tokens).logits, pre(tokens).logits, rtol=0, atol=1e-12)

    for model in (scaled, pre):
        model(tokens, labels=tokens).loss.backward()
    for mine, theirs in zip(scaled.model.layers, pre.model.layers, strict=True):
        expected: dict[str, Tensor] = {}
        for owner, name in zip((attention_owner, mlp_owner), WRITERS, strict=True):
            rows = (mine.get_submodule(name).weight * theirs.get_submodule(name).weight.grad).sum(1)
            expected[owner] = expected.get(owner, 0) + (rows if size > 1 else rows.sum().reshape(1))
        for owner, gradient in expected.items():
            torch.testing.assert_close(mine.get_submodule(owner).scale.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("norm", "initial"), [("skipinit", 3**-0.5), ("rezero", 0.0), ("layerscale", 0.1)])
def test_learned_scales_start_as_published(make_model: ModelMaker, norm: str, initial: float) -> None:
    state = make_model(plain=True, norm=norm).state_dict()
    scales = torch.cat([value for name, value in state.items() if name.endswith(".scale")])
    torch.testing.assert_close(scales, torch.full_like(scales, initial), rtol=0, atol=0)


def test_rezero_starts_as_the_identity(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(plain=True, norm="rezero")
    x = model.model.embed_tokens(tokens)
    assert torch.equal(model(tokens).logits, model.lm_head(model.model.norm(x)))


def test_none_has_no_norm_and_starts_as_fixup(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(plain=True, norm="none", hidden_size=128, intermediate_size=256, vocab_size=256)
    assert not [name for name in model.state_dict() if "norm" in name]
    layer = model.model.layers[1]
    for zero in (layer.self_attn.o_proj, layer.mlp.down_proj, model.lm_head):
        assert not zero.weight.any()
    for matrix, std in (
        (model.model.embed_tokens, 1.0),
        (layer.self_attn.q_proj, 0.02),
        (layer.self_attn.v_proj, 0.02 / math.sqrt(6)),
        (layer.mlp.up_proj, 0.02 / math.sqrt(6)),
    ):
        assert matrix.weight.std().item() == pytest.approx(std, rel=0.05)

    plain = make_model(norm="none", norm_options={"own_init": False})
    x = plain.model.embed_tokens(tokens)
    position_embeddings = tuple(p.unsqueeze(1) for p in plain.model.rotary_emb(x, torch.arange(12)[None]))
    for layer in plain.model.layers:
        x = x + layer.self_attn(x, position_embeddings)[0]
        x = x + layer.mlp(x)
    torch.testing.assert_close(plain(tokens).logits, plain.lm_head(x), rtol=1e-5, atol=1e-5)
