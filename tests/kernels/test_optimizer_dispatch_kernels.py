"""The optimizers through their kernels move as they do in torch, which specifies them; see `Rule.fused`."""

from __future__ import annotations

import pytest
import torch

from llmnorm.optim.registry import MATRIX_METHODS
from llmnorm_kernels import use_backend

CASES = {
    "scale": ("scale", {"weight_decay": 0.1}),
    "scale paper": ("scale", {"variant": "paper", "state_dtype": "fp32"}),
    "sinkgd": ("sinkgd", {"weight_decay": 0.1, "adamw_betas": (0.8, 0.9), "adamw_eps": 1e-6}),
    "sinkgd keller": ("sinkgd", {"lr_mode": "keller", "iterations": 2}),
    "galore": ("galore", {"rank": 6, "weight_decay": 0.1, "scale": 1.0}),
    "galore paper": ("galore", {"rank": 6, "variant": "paper", "weight_decay": 0.1, "side": "auto"}),
    "apollo": ("apollo", {"rank": 6, "weight_decay": 0.1, "scale": 4.0}),
    "apollo left": ("apollo", {"rank": 5, "side": "auto", "projection": "svd"}),
    "apollo_mini": ("apollo_mini", {"weight_decay": 0.1}),
    "apollo, eps that counts": ("apollo", {"rank": 6, "adamw_eps": 0.1}),
    "conda": ("conda", {"weight_decay": 0.1, "adamw_eps": 0.1}),
    "adamw8bit": ("adamw8bit", {"weight_decay": 0.1, "eps": 0.1}),
    "muon": ("muon", {"ns_dtype": "fp32", "weight_decay": 0.1}),
}
SHAPES = {"hidden_matrix": (24, 40), "embedding": (33, 20), "lm_head": (33, 20), "vector": (20,)}


def moved(method, options, device, dtype, steps=2):
    """Weights and states after some steps; the last gradient has a dead row, a noisy one, a dead column."""
    generator = torch.Generator().manual_seed(0)
    weights = {role: torch.randn(shape, generator=generator) for role, shape in SHAPES.items()}
    parameters = {role: w.to(device, dtype).requires_grad_() for role, w in weights.items()}
    groups = [{"params": [(role, parameter)], "role": role} for role, parameter in parameters.items()]
    optimizer = MATRIX_METHODS[method](groups, lr=0.05, **options)
    for step in range(steps):
        for parameter in parameters.values():
            grad = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2 and step == steps - 1:
                grad[3] = 0
                grad[5] *= 1e-9
                grad[:, 7] = 0
            parameter.grad = grad.to(device, dtype)
        optimizer.step()
    states = [value for parameter in parameters.values() for value in optimizer.state[parameter].values()]
    return [*parameters.values(), *states]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_move_like_torch(device, case, dtype):
    method, options = CASES[case]
    fused = moved(method, options, device, dtype)
    with use_backend("torch"):
        plain = moved(method, options, device, dtype)
    # fp32: sums in another order. bf16: torch rounds momenta, the decayed weight and the result, the kernels
    # the momenta and the result, so a few units of 2^-8 of a weight of up to 3.
    rtol, atol = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2e-2, 2e-2)}[dtype]
    for one, other in zip(fused, plain, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def test_what_the_kernels_take(device, monkeypatch):
    """The kernels make the steps they are for, and a cautious decay stays with torch."""
    from llmnorm_kernels import optimizer_steps

    calls = []
    apply = optimizer_steps._apply
    monkeypatch.setattr(optimizer_steps, "_apply", lambda *args: (calls.append("scaled"), apply(*args)))
    moved("scale", {}, device, torch.float32, steps=1)
    assert calls == ["scaled"] * 3
    moved("scale", {"cautious_weight_decay": True, "weight_decay": 0.1}, device, torch.float32, steps=1)
    assert calls == ["scaled"] * 3
    with use_backend("torch"):
        moved("scale", {}, device, torch.float32, steps=1)
    assert calls == ["scaled"] * 3


@pytest.mark.parametrize(
    ("method", "options", "dtype", "moments", "launches"),
    [
        ("galore", {"rank": 6, "variant": "paper"}, torch.float32, 1, 3),
        ("galore", {"rank": 6, "moments": "transport"}, torch.float32, 0, 3),
        ("galore", {"rank": 6, "state_bits": 8}, torch.float32, 0, 3),
        ("galore", {"rank": 6, "stochastic_rounding": True}, torch.bfloat16, 0, 0),
        ("apollo", {"rank": 6, "stochastic_rounding": True}, torch.bfloat16, 1, 0),
    ],
)
def test_what_the_low_rank_kernels_take(device, method, options, dtype, moments, launches, monkeypatch):
    """Plain moments in a fixed basis; what GaLore's product would round to nearest stays with torch. AdamW
    moves each group of the other roles in one launch."""
    from llmnorm.optim import lowrank

    calls = []
    for name in ("low_rank_moments_", "adamw_many_"):
        kernel = getattr(lowrank.kernels, name)

        def record(*given, name=name, kernel=kernel, **more):
            calls.append(name)
            return kernel(*given, **more)

        monkeypatch.setattr(lowrank.kernels, name, record)
    moved(method, options, device, dtype, steps=1)
    assert (calls.count("low_rank_moments_"), calls.count("adamw_many_")) == (moments, launches)


@pytest.mark.parametrize("shape", [(2, 20, 33), (33, 20)], ids=str)
def test_newton_schulz_of_half_the_tiles(device, shape, monkeypatch):
    """Both round each product once to bf16 from an fp32 sum, so that singular values agree to a few 2^-8."""
    from llmnorm.optim import newton_schulz

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    plain = newton_schulz.orthogonalize(matrix, "jordan", dtype=torch.bfloat16)
    products = []
    kernel = newton_schulz.kernels.symmetric_product
    monkeypatch.setattr(
        newton_schulz.kernels, "symmetric_product", lambda *a, **k: (products.append(a), kernel(*a, **k))[1]
    )
    monkeypatch.setattr(newton_schulz, "SYMMETRIC_SIDE", 1)
    halved = newton_schulz.orthogonalize(matrix, "jordan", dtype=torch.bfloat16)
    assert len(products) == 10, "two products in each of five iterations"
    torch.testing.assert_close(halved, plain, rtol=0, atol=3e-2)
