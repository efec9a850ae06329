"""The optimizer steps in torch: equality with known optimizers, the statistics of rounding, and the inputs
refused."""

from __future__ import annotations

import math

import pytest
import torch

import llmnorm_kernels as kernels
from llmnorm_kernels.optimizer_steps import decode_moments, rounding_key


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs(weight_decay):
    start = torch.randn(40)
    stock = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([stock], lr=1e-2, betas=(0.8, 0.95), weight_decay=weight_decay)
    param, m, v = start.clone(), torch.zeros(40), torch.zeros(40)
    for step in range(1, 6):
        stock.grad = torch.randn(40)
        optimizer.step()
        kernels.adamw_(
            param, stock.grad, m, v, step=step, lr=1e-2, betas=(0.8, 0.95), weight_decay=weight_decay
        )
    torch.testing.assert_close(param, stock.detach(), rtol=1e-5, atol=1e-6)
    assert torch.allclose(v, optimizer.state[stock]["exp_avg_sq"])


def test_8_bit_moments_follow_the_exact_ones():
    torch.manual_seed(0)
    param = torch.randn(4096)
    exact, m, v = param.clone(), torch.zeros(4096), torch.zeros(4096)
    codes = kernels.quantized_moments(param)
    for step in range(1, 11):
        grad = torch.randn(4096) * torch.logspace(-2, 0, 4096)
        kernels.adamw_(exact, grad, m, v, step=step, lr=1e-3)
        kernels.adamw_(param, grad, *codes[:2], step=step, lr=1e-3, scales=codes[2:])
    decoded_m, decoded_v = decode_moments(*codes)
    # One code is 2 / 127 of a number in m and 4 / 255 in v at the top of a block; errors of ten steps do not
    # add up.
    assert (decoded_m - m).norm() / m.norm() < 0.02
    assert (decoded_v - v).norm() / v.norm() < 0.02
    assert (param - exact).norm() / (10 * 1e-3 * math.sqrt(4096)) < 0.05
    assert (codes[1][v > 0] > 0).all()


def test_stochastic_rounding_is_unbiased_and_exact_on_the_grid():
    value = 1.0 + 0.3 * 2**-7
    count = 1 << 16
    param = torch.ones(count).bfloat16()
    # m / sqrt(v) = 1, so the step is lr: 1 goes to `value`, 0.3 of a bfloat16 spacing up.
    kernels.adamw_(
        param, torch.full((count,), -1.0), torch.zeros(count), torch.zeros(count),
        step=1, lr=0.3 * 2**-7, eps=0.0, seed=5,
    )  # fmt: skip
    assert set(param.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    mean = (param.double().mean() - 1.0) * 2**7
    assert abs(mean - 0.3) < 4 * math.sqrt(0.3 * 0.7 / count)
    assert value > 1.0
    still = torch.randn(1000).bfloat16()
    kept = still.clone()
    kernels.adamw_(still, torch.zeros(1000), torch.zeros(1000), torch.ones(1000), step=1, lr=1.0, seed=5)
    assert torch.equal(still, kept)


def test_rounding_keys_differ():
    keys = {rounding_key(seed, step) for seed in range(30) for step in range(100)}
    assert len(keys) == 3000


def test_scale_and_sinkgd_by_hand():
    # SinkGD's golden vector: one iteration turns [[3, 4], [0, 5]] into [[1.414214, .883452], [0, 1.104315]].
    param = torch.zeros(2, 2)
    kernels.sinkgd_step_(param, torch.tensor([[3.0, 4.0], [0.0, 5.0]]), lr=1.0, iterations=1)
    torch.testing.assert_close(
        -param, torch.tensor([[1.414214, 0.883452], [0.0, 1.104315]]), rtol=1e-5, atol=1e-6
    )
    param = torch.ones(2, 2)
    kernels.normalized_step_(param, torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=1, lr=1.0, weight_decay=0.5)
    expected = 0.5 - torch.tensor([[3.0, 4.0], [0.0, 0.0]]) / math.sqrt(12.5)
    torch.testing.assert_close(param, expected)
    param = torch.zeros(2, 1)
    kernels.normalized_step_(param, torch.tensor([[3.0], [4.0]]), dim=0, lr=1.0)
    torch.testing.assert_close(-param, torch.tensor([[3.0], [4.0]]) / math.sqrt(12.5))


def test_sinkgd_balances_rows_and_columns():
    torch.manual_seed(0)
    grad, param = torch.randn(64, 96), torch.zeros(64, 96)
    kernels.sinkgd_step_(param, grad, lr=1.0)
    torch.testing.assert_close(param.norm(dim=0), torch.full((96,), 8.0))
    torch.testing.assert_close(param.norm(dim=1), torch.full((64,), math.sqrt(96)), rtol=1e-3, atol=0)
    assert torch.equal(param.sign(), -grad.sign())


def test_newton_schulz_range_and_vectors():
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(24, 24).double())
    v, _ = torch.linalg.qr(torch.randn(60, 24).double())
    singular = torch.logspace(-2, 0, 24).double()
    x = u * singular @ v.t()
    for matrix, left, right in ((x, u, v), (x.t().contiguous(), v, u)):
        y = kernels.newton_schulz(matrix, dtype=torch.float32).double()
        inside = left.t() @ y @ right
        values = inside.diag()
        # The norm of x divides first: the smallest singular value enters as 4e-3, within the range of the
        # coefficients.
        assert values.min() > 0.66 and values.max() < 1.21
        assert (inside - values.diag()).norm() < 1e-3
    assert kernels.newton_schulz(torch.zeros(3, 4)).eq(0).all()
    assert kernels.newton_schulz(torch.randn(5, 3, 4)).dtype == torch.bfloat16


P, S = torch.randn(4, 6), torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.adamw_(P, P[:2], S, S, step=1, lr=0.1),
            r"grad has shape \(2, 6\) but param has \(4, 6\)",
        ),
        (lambda: kernels.adamw_(P.t(), P.t(), S, S, step=1, lr=0.1), r"param has strides"),
        (lambda: kernels.adamw_(P, P, S, S, step=0, lr=0.1), r"step=0 must count from 1"),
        (lambda: kernels.adamw_(P, P, S, S, step=1, lr=-0.1), r"lr=-0.1 must be zero or positive"),
        (lambda: kernels.adamw_(P, P, S, S, step=1, lr=0.1, betas=(1.0, 0.9)), r"betas=\(1.0, 0.9\)"),
        (
            lambda: kernels.adamw_(P, P, S[:2], S, step=1, lr=0.1),
            r"exp_avg must be contiguous and have the shape",
        ),
        (lambda: kernels.adamw_(P, P, S.to(torch.int8), S, step=1, lr=0.1), r"exp_avg has dtype torch.int8"),
        (lambda: kernels.adamw_(P, P, S, S, step=1, lr=0.1, seed=1), r"stochastic rounding is for bfloat16"),
        (
            lambda: kernels.adamw_(P.double(), P.double(), S, S, step=1, lr=0.1),
            r"param has dtype torch.float64",
        ),
        (
            lambda: kernels.normalized_step_(P[0], P[0], dim=1, lr=0.1),
            r"param has shape \(6,\); it must be a matrix",
        ),
        (lambda: kernels.normalized_step_(P, P, dim=2, lr=0.1), r"dim=2 must be 0"),
        (lambda: kernels.sinkgd_step_(P, P, lr=0.1, iterations=0), r"iterations=0 must be at least 1"),
        (lambda: kernels.symmetric_product(P, P), r"addend has shape \(4, 6\)"),
        (lambda: kernels.symmetric_product(P[0]), r"x has shape \(6,\)"),
        (lambda: kernels.newton_schulz(P, ()), r"coefficients=\(\) must be a sequence of triples"),
        (lambda: kernels.newton_schulz(P, dtype=torch.float64), r"dtype=torch.float64 must be"),
        (lambda: kernels.newton_schulz(P[:0]), r"x has shape \(0, 6\)"),
    ],
)
def test_refused_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
