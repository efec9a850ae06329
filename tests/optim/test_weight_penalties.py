"""Penalties of card 5: each gradient against autograd of the definition, its minimum, and what uses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import Role, route_parameters
from llmnorm.optim.weight_penalties import (
    PENALTIES,
    PENALTY_OPTIONS,
    Penalty,
    add_penalties,
    check_penalties,
)

SHAPES = [(6, 10), (10, 6), (8, 8)]


def defined(name: str, w: Tensor, **options: float) -> Tensor:
    """The definitions by singular values and rows, for autograd."""
    s, k = torch.linalg.svdvals(w), min(w.shape)
    r = (s.square() - 1).square().sum().sqrt()
    blocks = w.chunk(int(options.get("groups", 1)))
    return {
        "norm_loss": lambda: (1 - w.norm(dim=1)).square().sum(),
        "soft_orthogonality": lambda: r**2,
        "srip": lambda: (s.square() - 1).abs().max(),
        "gor": lambda: sum((torch.linalg.svdvals(b).square() - 1).square().sum() for b in blocks),
        "lambda_orthogonality": lambda: torch.sigmoid(options["sharpness"] * (r - options["threshold"])) * r,
        "cauchy_schwarz": lambda: k * s.pow(4).sum() - s.square().sum().square(),
        "spectral": lambda: (s[0] ** options["power"] - 1).square(),
    }[name]()


def options_of(name: str) -> dict[str, float]:
    return {**PENALTY_OPTIONS.get(name, {}), **({"groups": 2} if name == "gor" else {})}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_the_definition(name: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    w = (0.4 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    expected = defined(name, w, **options_of(name))
    (slope,) = torch.autograd.grad(expected, w)
    value, gradient = PENALTIES[name](w.detach(), **options_of(name))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-10)
    assert float(gradient.abs().max()) > 1e-4
    # fp32 in, fp32 inside: 1e-7 of the largest number, times the products' length.
    small = PENALTIES[name](w.detach().float(), **options_of(name))[1]
    torch.testing.assert_close(small.double(), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PENALTIES if name not in ("norm_loss", "gor")])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthonormal_matrices_are_minima(name: str, shape: tuple[int, int]) -> None:
    w = torch.nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64))
    scale = 3.0 if name == "cauchy_schwarz" else 1.0  # which does not see the scale
    value, gradient = PENALTIES[name](scale * w, **options_of(name))
    assert float(value.abs()) < 1e-12 * scale**4 * 64
    if name not in ("srip", "lambda_orthogonality"):  # whose slope at the minimum has a kink
        assert float(gradient.abs().max()) < 1e-12 * scale**3 * 64


def test_unit_rows_are_minima_of_norm_loss_and_a_zero_row_stays() -> None:
    w = torch.nn.functional.normalize(torch.randn(5, 7, dtype=torch.float64), dim=1)
    w[2] = 0
    value, gradient = PENALTIES["norm_loss"](w)
    assert float(value) == pytest.approx(1.0, abs=1e-12)
    assert float(gradient.abs().max()) < 1e-12


def test_one_group_of_gor_is_soft_orthogonality() -> None:
    w = torch.randn(6, 9, dtype=torch.float64)
    for mine, theirs in zip(PENALTIES["gor"](w, groups=1), PENALTIES["soft_orthogonality"](w), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_lambda_orthogonality_is_free_below_its_threshold() -> None:
    w = torch.nn.init.orthogonal_(torch.empty(8, 8, dtype=torch.float64)) * 1.01  # r = 0.0201 sqrt(8)
    r = 0.0201 * 8**0.5
    for threshold, expected in ((10.0, 0.0), (-10.0, r)):
        value, _ = PENALTIES["lambda_orthogonality"](w, threshold=threshold, sharpness=10.0)
        assert float(value) == pytest.approx(expected, abs=1e-12)


def test_added_to_the_gradients_of_hidden_matrices_alone() -> None:
    config = LlmNormConfig(
        vocab_size=19, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlmNormForCausalLM(config)
    initialize_weights(model, seed=0)
    ids = torch.arange(12)[None] % 19
    model(input_ids=ids, labels=ids).loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    penalties = [Penalty("norm_loss", 0.5), Penalty("gor", 0.25, {"groups": 2})]
    add_penalties(model, penalties)
    for name, parameter, role in route_parameters(model):
        added = parameter.grad - before[name]
        if role is Role.HIDDEN_MATRIX:
            w = parameter.detach()
            expected = 0.5 * PENALTIES["norm_loss"](w)[1] + 0.25 * PENALTIES["gor"](w, groups=2)[1]
            torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-6)
        else:
            assert float(added.abs().max()) == 0.0, name


def test_groups_must_divide_every_matrix() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model = LlmNormForCausalLM(LlmNormConfig(vocab_size=19, **sizes))
    check_penalties(model, [Penalty("gor", 1.0, {"groups": 4}), Penalty("srip", 1.0)])
    with pytest.raises(UserError, match=r"groups=8 of gor does not divide the 12 rows of .*gate_proj"):
        check_penalties(model, [Penalty("gor", 1.0, {"groups": 8})])


@pytest.mark.parametrize("name", PENALTIES)
def test_descent_along_each_gradient_lowers_its_value(name: str) -> None:
    w = 0.5 * torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    first, _ = PENALTIES[name](w, **options_of(name))
    for _ in range(50):
        w = w - 2e-3 * PENALTIES[name](w, **options_of(name))[1]
    assert float(PENALTIES[name](w, **options_of(name))[0]) < 0.9 * float(first)
