"""PowerNorm and Unified Norm: the golden step, and their definitions written out feature by feature."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.modeling.batch_statistics import TokenSet
from llmnorm.modeling.norms import make_norm
from llmnorm.modeling.power_norms import PowerNorm, UnifiedNorm
from llmnorm.modeling.residual import residual_plan

GOLDEN = json.loads((Path(__file__).parents[1] / "oracles" / "batch_norms.json").read_text())
EPS, D = 1e-5, 3


def norm_of(kind: str, width: int = D, eps: float = EPS, **options: Any) -> Any:
    """A norm in fp64 and training mode, with the settings that the placement gives it."""
    settings = residual_plan(kind, options, 1).final_norm_settings
    norm = make_norm(kind, width, eps, settings=settings).train().double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return norm


def batches(number: int, scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """(x, dy) [2, 5, D] in fp64 of so many steps, each of another size."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, 2, 5, D, dtype=torch.float64, generator=generator) for _ in range(number)]
    return [(scale * (1 + 0.3 * i) * x + 0.5, dy) for i, (x, dy) in enumerate(draw)]


def step(norm: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    y = norm(x)
    gradients = torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)
    return (y.detach(), *gradients)


# fp64: the vectors carry 8 digits. fp32: a few roundings of 6e-8 on values up to 5.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-6)])
def test_o2_powernorm_golden_step(dtype: torch.dtype, tolerance: float) -> None:
    golden = GOLDEN["powernorm"]
    options = {name: golden[name] for name in ("statistics_decay", "gradient_decay")}
    norm = norm_of("powernorm", 1, golden["eps"], statistics_warmup=0, **options).to(dtype)
    with torch.no_grad():
        norm.weight.fill_(golden["weight"])
        norm.bias.zero_()
    norm.mean_square.fill_(golden["mean_square"])
    norm.projection.fill_(golden["projection"])
    x, dy = (torch.tensor(golden[name], dtype=dtype).view(1, 4, 1) for name in ("x", "dy"))
    y, dx, dweight, dbias = step(norm, x, dy)
    found = {
        "y": y,
        "dx": dx,
        "dweight": dweight,
        "mean_square_after": norm.mean_square,
        "projection_after": norm.projection,
    }
    for name, value in found.items():
        expected = torch.tensor(golden[name], dtype=dtype)
        torch.testing.assert_close(value.flatten(), expected.flatten(), rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(dbias, dy.sum().view(1))
    assert norm.step == 1


def test_o2_powernorm_by_its_definition_through_the_warm_up() -> None:
    """Five steps, two of them warm-up, of PowerNorm's equations one feature at a time with math."""
    norm = norm_of("powernorm", statistics_warmup=2, statistics_decay=0.8, gradient_decay=0.7)
    weight, bias = norm.weight.tolist(), norm.bias.tolist()
    phi, nu = [1.0] * D, [0.0] * D
    for number, (x, dy) in enumerate(batches(5)):
        y, dx, dweight, dbias = step(norm, x, dy)
        for c in range(D):
            xs, dys = x[..., c].flatten().tolist(), dy[..., c].flatten().tolist()
            m = sum(v * v for v in xs) / len(xs)
            root = math.sqrt((m if number < 2 else phi[c]) + EPS)
            zs = [v / root for v in xs]
            gs = [weight[c] * v - (1 - 0.7) * nu[c] * z for v, z in zip(dys, zs, strict=True)]
            pairs = list(zip(dys, zs, strict=True))
            assert y[..., c].flatten().tolist() == pytest.approx([weight[c] * z + bias[c] for z in zs])
            assert dx[..., c].flatten().tolist() == pytest.approx([g / root for g in gs])
            assert dweight[c].item() == pytest.approx(sum(v * z for v, z in pairs))
            assert dbias[c].item() == pytest.approx(sum(dys))
            phi[c] = 0.8 * phi[c] + 0.2 * m
            nu[c] += sum(g * z for g, z in zip(gs, zs, strict=True)) / len(zs)
        # Statistics are sums in fp64, kept in fp64 by a norm in fp64.
        assert norm.mean_square.tolist() == pytest.approx(phi)
        assert norm.projection.tolist() == pytest.approx(nu)
        assert norm.step == number + 1


def _unified_by_definition(
    norm: UnifiedNorm, x: Tensor, dy: Tensor, state: dict[str, Any], number: int, filtered: bool
) -> tuple[list[float], ...]:
    """One step of Unified Norm on one-feature tensors [N], in plain Python; moves `state`."""
    xs, dys, weight, window = x.tolist(), dy.tolist(), norm.weight.item(), norm.window
    early = number <= window or number < norm.warmup
    m, slot = sum(v * v for v in xs) / len(xs), number % window
    roots = [math.sqrt(v) for v in state["m"]]
    average = sum(roots) / window
    spread = sum((v - average) ** 2 for v in roots) / (window - 1)
    state["m"][slot] = m
    geometric = math.prod(state["m"]) ** (1 / window)
    skip = filtered and not early and sum(state["m"]) / window - geometric > window * spread
    if skip:
        state["m"][slot] = state["phi"]
    psi2 = m if early or skip else geometric
    root = math.sqrt(psi2 + EPS)
    r = 1.0
    if number > max(norm.RATIO_FROM, norm.warmup) and not skip:
        r = min(max(root / math.sqrt(state["phi"] + EPS), 0.2), 5.0)
    state["phi"] = 0.9 * state["phi"] + 0.1 * psi2
    zs = [v / root for v in xs]
    gs = [r * weight * v for v in dys]
    gz = sum(g * z for g, z in zip(gs, zs, strict=True)) / len(xs)
    state["gz"][slot] = state["nu"] if skip else gz
    mean = gz if early or skip else sum(state["gz"]) / window
    state["nu"] = 0.9 * state["nu"] + 0.1 * mean
    taken = mean if skip else state["nu"]
    dx = [(g - taken * z) / root for g, z in zip(gs, zs, strict=True)]
    dweight = sum(v * r * z for v, z in zip(dys, zs, strict=True))
    state["skips"] += skip
    state["clipped"] += r in (0.2, 5.0)
    return [weight * z + norm.bias.item() for z in zs], dx, [dweight], [sum(dys)]


@pytest.mark.parametrize("filtered", [False, True])
def test_o2_unified_norm_by_its_definition(filtered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen steps of one feature: warm-up, geometric mean, the ratio from step 8 on with both its limits,
    and, with the filter, outliers (two steps are hundreds of times larger or smaller).
    """
    monkeypatch.setattr(UnifiedNorm, "RATIO_FROM", 7)
    norm = norm_of("unified_norm", 1, statistics_warmup=6, window=3, outlier_filter=filtered)
    state = {"m": [0.0] * 3, "gz": [0.0] * 3, "phi": 1.0, "nu": 0.0, "skips": 0, "clipped": 0}
    for number, (x, dy) in enumerate(batches(14), start=1):
        x = x[..., :1] * {10: 400.0, 13: 1e-4}.get(number, 1.0)
        found = step(norm, x, dy[..., :1])
        expected = _unified_by_definition(norm, x.flatten(), dy[..., :1].flatten(), state, number, filtered)
        for one, other in zip(found, expected, strict=True):
            assert one.flatten().tolist() == pytest.approx(other, rel=1e-9), number
        assert norm.mean_square.item() == pytest.approx(state["phi"], rel=1e-12)
        assert norm.projection.item() == pytest.approx(state["nu"], rel=1e-9)
        assert norm.mean_squares.flatten().tolist() == pytest.approx(state["m"], rel=1e-12)
        assert norm.projections.flatten().tolist() == pytest.approx(state["gz"], rel=1e-9)
    assert (state["skips"] > 0) == filtered
    assert state["clipped"] > 0


def test_windows_of_several_features_are_independent_but_for_the_filter() -> None:
    """Three features at once equal three norms of one feature (without the filter, which couples them)."""
    together = norm_of("unified_norm", statistics_warmup=3, window=2)
    apart = [norm_of("unified_norm", 1, statistics_warmup=3, window=2) for _ in range(D)]
    for c, norm in enumerate(apart):
        norm.load_state_dict(
            {k: v if k == "updates" else v[..., c : c + 1] for k, v in together.state_dict().items()}
        )
    for x, dy in batches(6):
        y, dx = step(together, x, dy)[:2]
        for c, norm in enumerate(apart):
            y_c, dx_c = step(norm, x[..., c : c + 1], dy[..., c : c + 1])[:2]
            torch.testing.assert_close(y[..., c : c + 1], y_c)
            torch.testing.assert_close(dx[..., c : c + 1], dx_c)


@pytest.mark.parametrize("kind", ["powernorm", "unified_norm"])
def test_prefix_statistic_is_the_mean_square_of_the_tokens_up_to_each(kind: str) -> None:
    """Two documents in the first row, the second row's first tokens not counted."""
    norm = norm_of(kind, statistics="prefix")
    ((x, _),) = batches(1)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    begins = torch.tensor([[0, 0, 0, 3, 3], [0] * 5])
    norm.tokens = TokenSet(mask, begins)
    y = norm(x)
    for b in range(2):
        for t in range(5):
            read = [s for s in range(begins[b, t], t + 1) if mask[b, s]]
            m = x[b, read].square().mean(0) if read else torch.ones(D, dtype=torch.float64)
            expected = norm.weight * x[b, t] / (m + EPS).sqrt() + norm.bias
            torch.testing.assert_close(y[b, t], expected)


def test_unified_norm_smooths_each_tokens_prefix_with_earlier_batches() -> None:
    norm = norm_of("unified_norm", statistics="prefix", window=2, statistics_warmup=0)
    history = batches(3)
    for x, _ in history:
        y = norm(x)
    previous, x = history[1][0].square().mean((0, 1)), history[2][0]
    prefix = x.square().cumsum(1) / torch.arange(1, 6, dtype=torch.float64)[:, None]
    psi2 = (previous * prefix).sqrt()
    torch.testing.assert_close(y, norm.weight * x / (psi2 + EPS).sqrt() + norm.bias)


def test_token_rms_comes_first() -> None:
    grouped, plain = norm_of("powernorm", token_rms=True), norm_of("powernorm")
    ((x, _),) = batches(1)
    scaled = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(grouped(x), plain(scaled))
    torch.testing.assert_close(grouped.mean_square, plain.mean_square)
    with pytest.raises(ValueError, match="token_rms=true divides each token"):
        grouped.coefficients()


@pytest.mark.parametrize("norm_class", [PowerNorm, UnifiedNorm])
def test_eval_mode_is_one_scale_and_shift_per_feature(norm_class: type) -> None:
    norm = norm_of("powernorm" if norm_class is PowerNorm else "unified_norm")
    assert type(norm) is norm_class
    for x, dy in batches(3):
        step(norm, x, dy)
    norm.eval()
    ((x, _),) = batches(1)
    a, b = norm.coefficients()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    expected = norm.weight * x / (norm.mean_square + EPS).sqrt() + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x * a + b, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
