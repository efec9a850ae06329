"""The grids of fake quantization by hand, its invariants, and the inputs it refuses."""

from __future__ import annotations

import pytest
import torch

import llmnorm_kernels as kernels


def quantized(values, *given, **options):
    return kernels.fake_quantize(torch.tensor([values]), *given, **options)[0].tolist()


def test_grids_by_hand():
    assert quantized([7.0, -3.4, 0.5, 1.5], "int4", 4) == [7.0, -3.0, 0.0, 2.0]
    assert quantized([6.0, -2.4, 2.5, 0.25], "fp4", 4) == [6.0, -2.0, 2.0, 0.0]
    assert quantized([6.0, 5.0, 3.5, 0.75], "fp4", 4) == [6.0, 4.0, 4.0, 1.0]
    assert quantized([4.0, 1.4, -0.5, 3.0], "uniform9", 4) == [4.0, 1.0, 0.0, 3.0]
    assert quantized([-5.0, 10.0, 0.4, 3.6], "int4_asymmetric", 4) == [-5.0, 10.0, 0.0, 4.0]


def test_mxfp4_scales_are_powers_of_two():
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([7.0, 1.2, 0.4])
    # floor(log2 7) - 2 = 0: 7 saturates at 6, the rest rounds on the unit grid.
    assert kernels.fake_quantize(x, "mxfp4")[0, :3].tolist() == [6.0, 1.0, 0.5]


def test_nvfp4_largest_number_is_exact_and_scales_are_e4m3():
    x = torch.randn(8, 64)
    y = kernels.fake_quantize(x, "nvfp4")
    place = x.abs().argmax()
    torch.testing.assert_close(y.view(-1)[place], x.view(-1)[place])
    stretch = 2688.0 / x.abs().max()
    top = x.view(8, 4, 16).abs().amax(-1)
    scale = (top / 6 * stretch).to(torch.float8_e4m3fn).float() / stretch
    levels = (y.view(8, 4, 16) / scale.unsqueeze(-1)).abs()
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert (levels.unsqueeze(-1) - grid).abs().amin(-1).max() < 1e-5


def test_outliers_stay_and_the_rest_gets_a_finer_scale():
    x = torch.randn(4, 256)
    x[:, 5], x[:, 9] = 100.0, -80.0
    y = kernels.fake_quantize(x, "uniform9", 256, outliers=2)
    assert torch.equal(y[:, [5, 9]], x[:, [5, 9]])
    coarse = kernels.fake_quantize(x, "uniform9", 256)
    assert (y - x).norm() < 0.3 * (coarse - x).norm()


@pytest.mark.parametrize("name", ["int4", "fp4", "uniform9", "mxfp4"])
def test_idempotent_and_odd(name):
    x = torch.randn(3, 96)
    y = kernels.fake_quantize(x, name, 32)
    torch.testing.assert_close(kernels.fake_quantize(y, name, 32), y)
    assert torch.equal(kernels.fake_quantize(-x, name, 32), -y)


@pytest.mark.parametrize("name", ["int4", "int4_asymmetric", "fp4", "nvfp4", "mxfp4", "uniform9"])
def test_stochastic_rounding_is_right_on_average_between_two_neighbors(name):
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).clamp(-2.4, 2.4)
    x[0, ::16], x[0, 1::16] = 2.5, -2.5  # the ends of every range
    draws = torch.cat([kernels.fake_quantize(x, name, seed=1, step=step) for step in range(2000)])
    # A rounded zero point, or scale, cuts the ends.
    inner = x[0].abs() < (2.3 if name in ("int4_asymmetric", "nvfp4") else 3.0)
    spread = draws.amax(0) - draws.amin(0)
    assert all(len(column.unique()) <= 2 for column in draws.T)
    # A number between two neighbors is a Bernoulli draw: 4 sigma of 2000.
    bias = (draws.double().mean(0) - x[0]).abs()
    assert (bias <= 4 * 0.5 * spread / 2000**0.5 + 1e-6)[inner].all()
    assert spread[inner].max() > 0


def test_gradient_passes_straight_through():
    x = torch.randn(2, 40, requires_grad=True)
    up = torch.randn(2, 40)
    kernels.fake_quantize(x, "int4", 16).backward(up)
    assert torch.equal(x.grad, up)


X = torch.randn(2, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.fake_quantize(X, "int3"), r"format='int3' is unknown"),
        (
            lambda: kernels.fake_quantize(X, "nvfp4", 32),
            r"group_size=32 contradicts nvfp4, whose groups have 16",
        ),
        (lambda: kernels.fake_quantize(X, "int4", 1), r"group_size=1 must be between 2 and 1024"),
        (lambda: kernels.fake_quantize(X, outliers=9), r"outliers=9 must be between 0 and 8"),
        (lambda: kernels.fake_quantize(X, outliers="two"), r"outliers='two' must be an integer"),
        (lambda: kernels.fake_quantize(X, group_size=2.5), r"group_size=2.5 must be between 2 and 1024"),
        (lambda: kernels.fake_quantize(X, seed="x"), r"seed='x' must be an integer"),
        (lambda: kernels.fake_quantize(X, seed=1.5), r"seed=1.5 must be an integer"),
        (lambda: kernels.fake_quantize(X, seed=1, step=None), r"step=None must be an integer"),
        (lambda: kernels.fake_quantize(X.double()), r"x has dtype torch.float64"),
        (lambda: kernels.fake_quantize(X.int()), r"x has dtype torch.int32"),
        (lambda: kernels.fake_quantize(torch.tensor(1.0)), r"x has no dimension to group"),
    ],
)
def test_refused_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
