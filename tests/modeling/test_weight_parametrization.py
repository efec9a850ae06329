"""Projections that multiply with a function of their stored matrix: equations, gradients, legality."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmnorm.modeling import LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.parametrized_linear import (
    ParametrizedLinear,
    SpectralLinear,
    power_iteration,
    top_vectors,
)
from llmnorm.modeling.weight_parametrization import (
    PARAMETRIZATIONS,
    norms_away,
    settle_weight_parametrization,
)
from llmnorm.optim import project_weights
from llmnorm.optim.roles import classify_parameters

ONE_BY_ONE = [{"name": name} for name in PARAMETRIZATIONS]
SPECTRAL = ["spectral_norm", "sigma_reparam"]
DOCS = Path(__file__).parents[2] / "docs" / "lipschitz.md"


def layer(steps: Any, m: int = 6, n: int = 9, dtype: torch.dtype = torch.float64) -> Any:
    """A layer of m outputs and n inputs with a Gaussian W, u and v up to date."""
    settled = settle_weight_parametrization(steps)
    assert settled is not None
    linear = nn.Linear(n, m, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(m, n, generator=torch.Generator().manual_seed(m * n)))
    kind = SpectralLinear if any("method" in step for step in settled) else ParametrizedLinear
    made: Any = kind.of(linear, settled).to(dtype)
    for name, value in made.derived_values(made.weight.detach()).items():
        getattr(made, name).data.copy_(value)
    return made


def gradient(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A random G with respect to What, and what it is with respect to W."""
    upstream = torch.randn(made.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (made.effective_weight() * upstream).sum().backward()
    return upstream, made.weight.grad


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("name", SPECTRAL)
def test_o5_the_largest_singular_value_is_exact_by_svd_also_after_the_weights_moved(name, m, n):
    made = layer(
        {"name": name, **({"scale": 2.5} if name == "spectral_norm" else {"initial_gain": 2.5})}, m, n
    )
    for _ in range(2):
        assert torch.linalg.svdvals(made.effective_weight())[0].item() == pytest.approx(2.5, rel=1e-12)
        with torch.no_grad():
            made.weight.add_(torch.randn(m, n, generator=torch.Generator().manual_seed(8)))
        made.project_weights_()


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_o5_the_spectral_gradient_is_the_published_formula_and_the_true_derivative(m, n):
    made = layer({"name": "spectral_norm"}, m, n)
    upstream, found = gradient(made)
    left, right = top_vectors(made.weight.detach())
    sigma, effective = left @ made.weight.detach() @ right, made.effective_weight().detach()
    expected = (upstream - (upstream * effective).sum() * torch.outer(left, right)) / sigma
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # Since u and v are exact, treating them as constants loses nothing: the derivative of W / ||W||_2.
    free = made.weight.detach().clone().requires_grad_()
    (free / torch.linalg.matrix_norm(free, 2) * upstream).sum().backward()
    torch.testing.assert_close(found, free.grad, rtol=1e-9, atol=1e-12)


def test_o5_power_iteration_is_never_above_svd_and_reaches_it_after_100():
    matrix = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigma = torch.linalg.matrix_norm(matrix, 2)
    found = []
    for iterations in (1, 2, 100):
        left, right = power_iteration(matrix, start, iterations)
        found.append(float(left @ matrix @ right / sigma))
    assert found == sorted(found) and found[0] < 0.95
    # A Gaussian's largest singular values are near each other, which slows the direction and not the value.
    assert found[-1] == pytest.approx(1.0, abs=1e-3) and max(found) <= 1 + 1e-12


def test_power_starts_from_the_former_vectors():
    made = layer({"name": "spectral_norm", "method": "power", "iterations": 1}, 24, 40)
    for _ in range(2000):  # the weights stand still, so that single iterations add up
        made.project_weights_()
    assert torch.linalg.svdvals(made.effective_weight())[0].item() == pytest.approx(1.0, abs=1e-6)


def test_o5_weight_norm_starts_as_the_plain_matrix_and_its_gradient_is_orthogonal_to_each_row():
    made = layer({"name": "weight_norm"})
    torch.testing.assert_close(made.effective_weight(), made.weight, rtol=1e-14, atol=0)
    upstream, found = gradient(made)
    rows, gain = made.weight.detach(), made.row_gain.detach()
    lengths = rows.norm(dim=1, keepdim=True)
    unit = rows / lengths
    expected = gain[:, None] / lengths * (upstream - (upstream * unit).sum(1, keepdim=True) * unit)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found * rows).sum(1).abs().max() < 1e-12
    torch.testing.assert_close(made.row_gain.grad, (upstream * unit).sum(1), rtol=1e-12, atol=1e-12)


def test_o5_standardized_rows_have_mean_0_and_variance_1_or_the_learned_length():
    plain = layer({"name": "weight_standardization", "scaled": False}).effective_weight()
    assert plain.mean(1).abs().max() < 1e-14
    torch.testing.assert_close(plain.var(1, unbiased=False), torch.ones(6, dtype=torch.float64))
    made = layer({"name": "weight_standardization"})
    made.row_gain.data.copy_(torch.arange(1.0, 7.0))
    rows = made.effective_weight()
    assert rows.mean(1).abs().max() < 1e-14
    torch.testing.assert_close(rows.norm(dim=1), torch.arange(1.0, 7.0, dtype=torch.float64))


def test_o5_conditioning_gives_unit_rows_and_a_small_condition_number():
    made = layer({"name": "weight_conditioning"}, 6, 40)
    made.weight.data.mul_(10.0 ** torch.linspace(-2, 2, 6)[:, None])
    effective = made.effective_weight()
    torch.testing.assert_close(effective.norm(dim=1), torch.ones(6, dtype=torch.float64))
    before, after = torch.linalg.cond(made.weight), torch.linalg.cond(effective)
    assert before > 3000 and after < 3


def test_o5_a_shift_keeps_singular_values_above_shift_minus_the_largest():
    made = layer({"name": "spectral_conditioning", "shift": 20.0})
    values = torch.linalg.svdvals(made.effective_weight())
    assert values[-1] >= 20.0 - torch.linalg.matrix_norm(made.weight, 2)
    torch.testing.assert_close(
        made.effective_weight() - made.weight, 20.0 * torch.eye(6, 9, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "steps", [*ONE_BY_ONE, [{"name": "weight_norm"}, {"name": "spectral_norm"}]], ids=str
)
def test_the_length_of_the_stored_matrix_matters_only_where_it_is_said_to(steps):
    made = layer(steps)
    before = made.effective_weight().detach()
    made.weight.data.mul_(7.0)
    if isinstance(made, SpectralLinear):
        made.project_weights_()
    same = torch.allclose(made.effective_weight(), before, rtol=1e-12, atol=0)
    assert same == norms_away(settle_weight_parametrization(steps))


def test_several_apply_in_turn_and_each_holds_where_the_next_leaves_it():
    made = layer([{"name": "weight_standardization", "scaled": False}, {"name": "spectral_norm"}])
    effective = made.effective_weight()
    assert torch.linalg.svdvals(effective)[0].item() == pytest.approx(1.0, rel=1e-12)
    assert effective.mean(1).abs().max() < 1e-14
    shifted = layer([{"name": "weight_norm"}, {"name": "spectral_conditioning", "modules": list(MODULES)}])
    expected = layer({"name": "weight_norm"}).effective_weight() + 10 * torch.eye(6, 9, dtype=torch.float64)
    torch.testing.assert_close(shifted.effective_weight(), expected)


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("step", ONE_BY_ONE, ids=lambda step: step["name"])
def test_training_evaluation_and_recomputation_see_one_function(make_model, tokens, step):
    model = make_model(weight_parametrization=step, plain=True)
    expected = model.eval()(tokens).logits
    losses = {}
    for mode in ("none", "full", "selective"):
        trained = copy.deepcopy(model).train()
        trained.set_activation_checkpointing(mode)
        assert torch.equal(trained(tokens).logits, expected), mode
        trained(tokens, labels=tokens).loss.backward()
        losses[mode] = {name: p.grad for name, p in trained.named_parameters()}
        buffers = dict(model.named_buffers())
        assert all(torch.equal(value, buffers[name]) for name, value in trained.named_buffers()), mode
    for mode in ("full", "selective"):
        for name, grad in losses["none"].items():
            assert torch.equal(losses[mode][name], grad), (mode, name)


def compiled_equals_eager(eager: Any, x: torch.Tensor) -> None:
    """Output and gradients, up to another order of fp32 sums."""
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    found, expected = compiled(x).square().sum(), eager(x).square().sum()
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_layer_compiles_whole_and_computes_the_same():
    steps = ["weight_standardization", "spectral_conditioning", "sigma_reparam"]
    made = layer([{"name": name, "modules": list(MODULES)} for name in steps], dtype=torch.float32)
    compiled_equals_eager(made, torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))


@pytest.mark.slow
@pytest.mark.parametrize("step", ONE_BY_ONE, ids=lambda step: step["name"])
def test_blocks_compile_whole_and_compute_the_same(make_model, tokens, step):
    torch._dynamo.reset()  # a block's code may be compiled a limited number of times
    model = make_model(weight_parametrization=step, plain=True).double()
    expected = model(tokens, labels=tokens).loss
    expected.backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    found = model(tokens, labels=tokens).loss
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for key, p in model.named_parameters():  # another order of sums, in which large terms may cancel
        torch.testing.assert_close(p.grad, grads[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("step", ONE_BY_ONE, ids=lambda step: step["name"])
def test_a_saved_model_loads_as_it_was(make_model, tokens, step, tmp_path):
    model = make_model(weight_parametrization=step)
    project_weights(model)
    model.save_pretrained(tmp_path)
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    # Tensors of a file may be aligned otherwise, and a product with a vector sums in another order then.
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    assert loaded.config.weight_parametrization == model.config.weight_parametrization


def test_weights_without_gains_and_vectors_get_those_that_belong_to_them(make_model, tokens, tmp_path):
    plain = make_model(plain=True)
    plain.save_pretrained(tmp_path)
    config = copy.deepcopy(plain.config)
    config.weight_parametrization = settle_weight_parametrization({"name": "weight_norm"})
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path, config=config).eval()
    torch.testing.assert_close(loaded(tokens).logits, plain(tokens).logits, rtol=1e-5, atol=1e-6)
    config.weight_parametrization = settle_weight_parametrization({"name": "spectral_norm"})
    found = LlmNormForCausalLM.from_pretrained(tmp_path, config=config)
    for module in found.modules():
        if isinstance(module, SpectralLinear):
            assert torch.linalg.svdvals(module.effective_weight())[0].item() == pytest.approx(1.0, rel=1e-5)


def test_vectors_that_nobody_gave_are_not_a_number(make_config):
    with torch.device("meta"):
        model = LlmNormForCausalLM(make_config(weight_parametrization={"name": "spectral_norm"}))
    model.to_empty(device="cpu")
    linear: Any = model.model.layers[0].mlp.up_proj
    linear.rebuild_buffers()
    nn.init.ones_(linear.weight)
    assert linear.effective_weight().isnan().all()


@pytest.mark.parametrize("step", ONE_BY_ONE, ids=lambda step: step["name"])
def test_roles_gains_are_vectors_and_stored_matrices_stay_hidden_matrices(make_model, step):
    plain = classify_parameters(make_model())
    roles = classify_parameters(make_model(weight_parametrization=step))
    extra = roles.keys() - plain.keys()
    assert all(roles[name] == role for name, role in plain.items())
    assert all(roles[name] == "vector" and name.endswith("gain") for name in extra)
    expected = {"sigma_reparam": 21, "weight_norm": 21, "weight_standardization": 21}
    assert len(extra) == expected.get(step["name"], 0)


def test_only_the_named_projections_are_treated_whatever_the_attention_and_the_mlp(make_config):
    for changes in ({}, {"attention": "nalaformer"}, {"mlp": "plain"}, {"tie_word_embeddings": True}):
        step = {"name": "weight_conditioning", "modules": ["o_proj", "up_proj"]}
        model = LlmNormForCausalLM(make_config(weight_parametrization=step, **changes))
        treated = {name for name, module in model.named_modules() if isinstance(module, ParametrizedLinear)}
        expected = {
            f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.o_proj", "mlp.up_proj")
        }
        assert treated == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nope", "name='nope' is not a choice"),
        ({"scale": 1.0}, "must be null, a mapping such as"),
        ({"name": "weight_norm", "scale": 2.0}, "scale=2.0 does nothing with name=weight_norm"),
        ({"name": "spectral_norm", "scale": 0}, "scale=0 must be a number above 0"),
        ({"name": "spectral_norm", "iterations": 2}, "iterations=2 does nothing with method=exact"),
        ({"name": "spectral_norm", "method": "lanczos"}, "must be one of exact, power"),
        ({"name": "weight_norm", "modules": ["lm_head"]}, "must be a list of different ones of q_proj"),
        ({"name": "weight_norm", "modules": []}, "must be a list of different ones of q_proj"),
        (["spectral_norm", "weight_norm"], "weight_norm undoes what spectral_norm before it does"),
        (["weight_norm", "weight_conditioning"], "weight_conditioning undoes what weight_norm"),
        (["spectral_norm", "sigma_reparam"], "sigma_reparam undoes what spectral_norm"),
        (["weight_standardization", "weight_norm"], "undoes the gains of weight_standardization before it"),
        (["weight_norm", "spectral_conditioning"], "have other modules"),
    ],
)
def test_options_that_mean_nothing_are_refused(make_config, given, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_config(weight_parametrization=given)


# row of the table in docs/lipschitz.md -> keys beside {name: spectral_norm}, and the verdict
BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "`weight_constraint`": ({"weight_constraint": {"name": "spectral_cap"}}, "refused"),
    "`quantization`": ({"quantization": {"group_size": 8}}, "refused"),
    "`mup`": ({"mup": True}, "refused"),
    "`norm: ngpt`": ({"norm": "ngpt"}, "refused"),
    "`norm_options.recentered`": ({"norm_options": {"recentered": True}}, "refused"),
    "`norm: pre_crmsnorm`": ({"norm": "pre_crmsnorm"}, "refused"),
    "matrices that start at 0": ({"norm": "none"}, "refused"),
    "`norm: scalenorm`": ({"norm": "scalenorm", "norm_options": {"fixnorm": True}}, "allowed"),
    "`tie_word_embeddings`": ({"tie_word_embeddings": True}, "allowed"),
    "linear attention": ({"attention": "nalaformer"}, "allowed"),
}


@pytest.mark.parametrize("place", BESIDE)
def test_legality_of_the_model_is_as_the_page_says(make_config, place):
    changes, verdict = BESIDE[place]
    table = [line.split("|") for line in DOCS.read_text(encoding="utf-8").splitlines()]
    written = {cells[1].strip(): cells[2].strip() for cells in table if len(cells) == 5}
    assert written[place] == verdict
    if verdict == "allowed":
        LlmNormForCausalLM(make_config(weight_parametrization="spectral_norm", **changes))
    else:
        with pytest.raises(ValueError, match="weight_parametrization"):
            make_config(weight_parametrization="spectral_norm", **changes)


def test_a_matrix_of_zeros_is_named_and_may_be_left_out(make_config):
    lipschitz = {"architecture": "lipschitz", "weight_parametrization": {"name": "spectral_norm"}}
    with pytest.raises(ValueError, match=r"cannot treat o_proj of layers.0, which init=orthogonal"):
        make_config(**lipschitz)
    lipschitz["weight_parametrization"] = {"name": "spectral_norm", "modules": [*MODULES[:3], *MODULES[5:]]}
    model = LlmNormForCausalLM(make_config(**lipschitz))
    initialize_weights(model, seed=0)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
