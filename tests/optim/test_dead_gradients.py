"""Rows and columns of a gradient that are zero or rounding error, and momentum that nothing may write to."""

from __future__ import annotations

import pytest
import torch
from matrix_cases import SHAPES, gradients, groups, make_parameters

from llmnorm.optim.registry import MATRIX_METHODS

METHODS = sorted(MATRIX_METHODS)
ROW, COLUMN = 3, 4
# Methods whose own equation moves an entry without gradient: LAWN, AdamP and GradNormLoRP subtract a part
# along the weights, and a basis that is not the gradient's (cosines, triangular factors) mixes columns or
# rows before Adam or the whitening acts on each coordinate. SWAN does where it subtracts the mean of a row.
BY_DEFINITION = {"adamp", "dct_adamw", "gradnorm_lorp", "lawn", "psgd_kron"}
OPTIONS = {"swan": {"center": False}}
NORMALIZING = ["conda", "lanton", "muon", "normuon", "scale", "sinkgd", "swan"]


def largest_dead_update(name: str, dead: float, dtype: torch.dtype, roles: set[str]) -> float:
    """RMS of the updates of one row and one column whose gradients are `dead` times the others', over the RMS
    of all updates of the matrix; the largest of all matrices of these roles, after four steps."""
    parameters = make_parameters(dtype=dtype)
    with torch.no_grad():
        for parameter in parameters.values():  # bf16 weights of zero keep the smallest updates
            parameter.mul_(name == "lamb")
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer = MATRIX_METHODS[name](groups(parameters), lr=1e-2, **OPTIONS.get(name, {}))
    for grads in gradients(4):
        for key, parameter in parameters.items():
            grad = grads[key].clone()
            if grad.ndim > 1:
                grad[..., ROW, :] *= dead
                grad[..., COLUMN] *= dead
            parameter.grad = grad.to(dtype)
        optimizer.step()
    ratios = []
    for key, parameter in parameters.items():
        moved = parameter.detach().double() - before[key].double()
        assert moved.isfinite().all(), key
        if SHAPES[key][0] in roles:
            parts = moved[..., ROW, :], moved[..., COLUMN]
            assert moved.abs().max() > 0, key
            ratios += [(part.square().mean() / moved.square().mean()).sqrt().item() for part in parts]
    return max(ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in BY_DEFINITION])
def test_rows_and_columns_without_gradient_get_no_update(name, dtype):
    """Where products of a basis leave rounding in place of zero (galore, fira) it stays rounding."""
    roles = {"hidden_matrix", "embedding", "lm_head"}
    assert largest_dead_update(name, 0.0, dtype, roles) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMALIZING)
def test_rows_and_columns_of_rounding_error_are_not_made_full_size(name, dtype):
    """1e-9 of the other gradients: floors are at 1e-7, and Newton-Schulz multiplies by up to 1e3."""
    roles = {"hidden_matrix"} | ({"embedding", "lm_head"} if name in ("lanton", "scale") else set())
    assert largest_dead_update(name, 1e-9, dtype, roles) < 0.02


# Methods that keep the plain average of the gradients of a hidden matrix: options, its key, its decay rate.
AVERAGES = [
    ("adamp", {}, "exp_avg", 0.9),
    ("conda", {}, "exp_avg", 0.9),
    ("lamb", {}, "exp_avg", 0.9),
    ("lanton", {}, "momentum_buffer", 0.95),
    ("muon", {}, "momentum_buffer", 0.95),
    ("muon", {"nesterov": False}, "momentum_buffer", 0.95),
    ("normuon", {}, "momentum_buffer", 0.95),
    ("normuon", {"variant": "paper"}, "momentum_buffer", 0.95),
    ("psgd_kron", {}, "momentum_buffer", 0.9),
]


@pytest.mark.parametrize("name, options, key, decay", AVERAGES)
def test_bf16_momentum_stays_the_average_of_the_gradients(name, options, key, decay):
    """A step that writes to a buffer of its own dtype, as torch.optim.Muon's without Nesterov, would show."""
    parameters = make_parameters(dtype=torch.bfloat16)
    optimizer = MATRIX_METHODS[name](groups(parameters), lr=1e-2, **options)
    expected = {name: torch.zeros(shape, dtype=torch.float64) for name, (_, shape) in SHAPES.items()}
    for grads in gradients(8):
        for parameter_name, parameter in parameters.items():
            parameter.grad = grads[parameter_name].bfloat16()
            expected[parameter_name].lerp_(parameter.grad.double(), 1 - decay)
        optimizer.step()
    hidden = [name for name, (role, _) in SHAPES.items() if role == "hidden_matrix"]
    for parameter_name in hidden:
        kept = optimizer.state[parameters[parameter_name]][key].double()
        # Eight roundings of 2^-9 of values of about 1.
        torch.testing.assert_close(kept, expected[parameter_name], rtol=0, atol=0.02)
