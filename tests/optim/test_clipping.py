"""Per-parameter clipping, AGC and ZClip against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmnorm.errors import UserError
from llmnorm.optim import Role, RoutedParameter
from llmnorm.optim.clipping import ZClip, create_clipping


def routed(
    *shapes: tuple[int, ...], role: Role = Role.HIDDEN_MATRIX, scale: float = 1.0
) -> list[RoutedParameter]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.randn(shape, generator=generator))
        parameter.grad = scale * torch.randn(shape, generator=generator)
        found.append(RoutedParameter(f"p{index}", parameter, role))
    return found


NORM = torch.tensor(1.0)


def test_per_parameter_scales_long_gradients_only():
    parameters = routed((4, 6), (3,), (5, 2))
    parameters[1].parameter.grad *= 0.01
    before = [p.parameter.grad.clone() for p in parameters]
    create_clipping("per_parameter", 0.5).clip(parameters, NORM)
    for (_, parameter, _), grad in zip(parameters, before, strict=True):
        expected = grad * min(1.0, 0.5 / grad.norm().item())
        torch.testing.assert_close(parameter.grad, expected)
    assert parameters[0].parameter.grad.norm().item() == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(6, 8), (2, 6, 8)])
def test_agc_limits_every_row_to_its_weight(shape):
    (parameter,) = routed(shape, scale=0.02)
    with torch.no_grad():
        parameter.parameter[..., 0, :] = 0.0
    before = parameter.parameter.grad.clone()
    create_clipping("agc", 0.02).clip([parameter], NORM)
    grad, weight = parameter.parameter.grad, parameter.parameter.detach()
    allowed = 0.02 * weight.norm(dim=-1).clamp(min=1e-3)
    factor = (allowed / before.norm(dim=-1)).clamp(max=1.0)
    torch.testing.assert_close(grad, before * factor[..., None])
    assert (factor < 1).any() and (factor == 1).any()


def test_agc_takes_a_vector_as_one_unit_and_spares_the_head():
    (vector,) = routed((5,), role=Role.VECTOR)
    create_clipping("agc", 0.01).clip([vector], NORM)
    weight = vector.parameter.detach()
    assert vector.parameter.grad.norm().item() == pytest.approx(0.01 * weight.norm().item(), rel=1e-5)
    (head,) = routed((5, 4), role=Role.LM_HEAD)
    before = head.parameter.grad.clone()
    create_clipping("agc", 0.01).clip([head], NORM)
    assert torch.equal(head.parameter.grad, before)


def feed(clipping: ZClip, norms: list[float]) -> list[float]:
    """The norms after clipping."""
    after = []
    for norm in norms:
        parameter = nn.Parameter(torch.zeros(4))
        parameter.grad = torch.full((4,), norm / 2)
        clipping.clip([RoutedParameter("p", parameter, Role.VECTOR)], torch.tensor(norm))
        after.append(parameter.grad.norm().item())
    return after


def quiet(count: int) -> list[float]:
    return [1.0 + 0.1 * math.sin(7.0 * index) for index in range(count)]


def test_zclip_pulls_back_outliers_and_nothing_else():
    clipping = ZClip(2.5)
    warm_up = quiet(25)
    warm_up[3] = 3.0  # not judged yet
    assert feed(clipping, warm_up) == pytest.approx(warm_up, rel=1e-6)
    statistics = clipping.state()
    values = torch.tensor(warm_up, dtype=torch.float64)
    assert statistics["mean"] == pytest.approx(values.mean().item())
    assert statistics["variance"] == pytest.approx(values.var(correction=0).item())

    mean, deviation = statistics["mean"], math.sqrt(statistics["variance"])
    z = (8.0 - mean) / deviation
    assert feed(clipping, [8.0])[0] == pytest.approx(mean + 2.5**2 / z * deviation, rel=1e-6)
    assert feed(clipping, [1.0, 0.2]) == pytest.approx([1.0, 0.2], rel=1e-6)


def test_zclip_resumes_where_it_was_and_ignores_what_is_not_finite():
    whole, first = ZClip(2.5), ZClip(2.5)
    norms = [*quiet(40), 9.0, *quiet(5), 4.0]
    expected = feed(whole, norms)
    start = feed(first, norms[:30])
    feed(first, [math.inf])
    second = ZClip(2.5)
    second.restore(first.state())
    assert start + feed(second, norms[30:]) == pytest.approx(expected, rel=1e-12)
    assert second.state() == whole.state()


def test_mistakes():
    with pytest.raises(UserError, match="global, per_parameter, agc, zclip"):
        create_clipping("norm", 1.0)
    with pytest.raises(UserError, match=r"train\.grad_clip=0"):
        create_clipping("agc", 0.0)
