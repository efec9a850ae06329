"""PRepBN against torch's BatchNorm and numerical gradients, and lambda from 1 to 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmnorm.modeling.batch_statistics import TokenSet, commit_statistics, defer_statistics
from llmnorm.modeling.norms import LlmNormLayerNorm, LlmNormRMSNorm, make_norm
from llmnorm.modeling.prepbn import PRepBN
from llmnorm.modeling.residual import residual_plan

EPS, D = 1e-5, 3


def prepbn(**options: Any) -> PRepBN:
    """A norm in fp64 and training mode, its parameters off their initial values."""
    settings = residual_plan("prepbn", {"interpolation_steps": 4, **options}, 1).final_norm_settings
    norm = make_norm("prepbn", D, EPS, settings=settings).train().double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(norm, PRepBN)
    return norm


def inputs(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, 2, 5, D, dtype=torch.float64, generator=generator) for _ in range(number)]
    return [(2 * x + 0.5, dy) for x, dy in draw]


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_o2_two_norms_and_torchs_batch_norm_through_the_interpolation(norm_type: str) -> None:
    """Eight steps: values, gradients and running statistics of lambda N + (1 - lambda) (BN + eta x)."""
    norm = prepbn(norm_type=norm_type, hold_steps=2)
    batch_norm = nn.BatchNorm1d(D, EPS).double()
    token_norm = {"rmsnorm": LlmNormRMSNorm, "layernorm": LlmNormLayerNorm}[norm_type](D, EPS).double()
    token_norm.load_state_dict(norm.token_norm.state_dict())
    batch_norm.weight.data, batch_norm.bias.data = norm.weight.data.clone(), norm.bias.data.clone()
    eta = norm.identity_scale.detach().clone().requires_grad_()
    shares = []
    for step, (x, dy) in enumerate(inputs(8)):
        share = 1.0 if step < 2 else max(0, 4 - (step - 2)) / 4
        shares.append(norm.token_share)
        theirs, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = share * token_norm(theirs)
        if share < 1:
            standardized = batch_norm(theirs.flatten(0, 1)).view_as(x)
            y = y + (1 - share) * (standardized + eta * theirs)
        found = norm(mine)
        torch.testing.assert_close(found, y)
        for module in (norm, batch_norm, token_norm):
            module.zero_grad()
        eta.grad = None
        found.backward(dy)
        y.backward(dy)
        torch.testing.assert_close(mine.grad, theirs.grad)
        pairs = [
            (norm.weight, batch_norm.weight),
            (norm.bias, batch_norm.bias),
            (norm.identity_scale, eta),
        ]
        pairs += zip(norm.token_norm.parameters(), token_norm.parameters(), strict=True)
        for ours, other in pairs:
            # What a step does not read has a gradient of zero here, and none there.
            expected = torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(ours.grad, expected)
        torch.testing.assert_close(norm.running_mean, batch_norm.running_mean)
        torch.testing.assert_close(norm.running_variance, batch_norm.running_var)
    assert shares == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("statistics", ["batch", "prefix", "running"])
def test_o2_gradcheck(statistics: str, masked: bool) -> None:
    """True gradients, also for tokens that do not count but have a dy."""
    norm = prepbn(statistics=statistics)
    norm.updates.fill_(2)  # lambda = 1/2
    norm.running_mean.fill_(0.3)
    defer_statistics(norm)
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    ((x, _),) = inputs(1)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        norm.tokens = TokenSet(mask if masked else None)
        names = [name for name, _ in norm.named_parameters()]
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *norm.parameters()))


def test_prefix_statistics_are_those_of_the_tokens_up_to_each() -> None:
    norm = prepbn(statistics="prefix")
    norm.updates.fill_(4)  # lambda = 0
    ((x, _),) = inputs(1)
    begins = torch.tensor([[0, 0, 2, 2, 2], [0] * 5])
    norm.tokens = TokenSet(None, begins)
    y = norm(x)
    for b in range(2):
        for t in range(5):
            read = x[b, begins[b, t] : t + 1]
            xhat = (x[b, t] - read.mean(0)) / (read.var(0, unbiased=False) + EPS).sqrt()
            if len(read) == 1:  # one token has no variance: the running statistics, 0 and 1 here
                xhat = x[b, t] / (1 + EPS) ** 0.5
            expected = norm.weight * xhat + norm.bias + norm.identity_scale * x[b, t]
            torch.testing.assert_close(y[b, t], expected)


def test_a_large_common_mean_does_not_drown_the_variance() -> None:
    """fp32 and a mean of 1000 standard deviations: sums of squares alone would be off by 6 %."""
    norm = prepbn(statistics_decay=0.0).float()
    norm.updates.fill_(1)
    x = 1000 + torch.randn(4, 64, D, generator=torch.Generator().manual_seed(0))
    norm(x)
    exact = x.double().flatten(0, 1)
    torch.testing.assert_close(norm.running_variance, exact.var(0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_mean, exact.mean(0).float(), rtol=1e-6, atol=0)


def test_o12_lambda_falls_once_for_each_commit() -> None:
    """t=0 -> 1, T/2 -> 1/2, T and beyond -> 0, whether a commit gathers 1, 4 or 16 forward passes."""
    for accumulation in (1, 4, 16):
        norm = prepbn()
        defer_statistics(norm)
        shares = []
        for _ in range(6):
            shares.append(norm.token_share)
            for x, dy in inputs(accumulation):
                norm(x.requires_grad_()).backward(dy)
            assert norm.token_share == shares[-1]
            commit_statistics(norm)
        assert shares == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        assert norm.updates.item() == 6


def test_eval_mode_keeps_lambda_and_folds_only_at_the_end() -> None:
    """Half-way, eval mode is half of each norm; at lambda = 0 it is a * x + b."""
    norm = prepbn()
    ((x, _),) = inputs(1)
    norm.updates.fill_(2)
    norm.running_mean.fill_(0.2)
    norm.running_variance.fill_(3.0)
    norm.eval()
    standardized = norm.weight * (x - 0.2) / (3 + EPS) ** 0.5 + norm.bias
    repbn = standardized + norm.identity_scale * x
    torch.testing.assert_close(norm(x), (norm.token_norm(x) + repbn) / 2)
    with pytest.raises(ValueError, match=r"lambda=0\.5 after 2 updates, and is 0 only after .* = 4"):
        norm.coefficients()
    norm.updates.fill_(4)
    a, b = norm.coefficients()
    torch.testing.assert_close(norm(x), repbn)
    torch.testing.assert_close(a * x + b, repbn)


def test_it_begins_with_an_empty_branch() -> None:
    settings = residual_plan("prepbn", {}, 1).final_norm_settings
    norm = make_norm("prepbn", D, EPS, settings=settings)
    assert (norm.weight == 0).all() and (norm.bias == 0).all() and (norm.identity_scale == 0).all()
    ones = make_norm("prepbn", D, EPS, settings=tuple({**dict(settings), "branch_init": 1}.items()))
    assert (ones.weight == 1).all() and (ones.identity_scale == 1).all() and (ones.bias == 0).all()
    assert ones.initial_values == {"weight": 1.0, "bias": 0.0, "identity_scale": 1.0}
