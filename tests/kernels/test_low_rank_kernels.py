"""The low-rank moments and AdamW on many tensors: the kernels against their references."""

from __future__ import annotations

import pytest
import torch
from comparing import relative_error

import llmnorm_kernels as kernels
from llmnorm_kernels import use_backend

OPS = torch.ops.llmnorm_kernels


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((7, 300), 1), ((40, 70), 0), ((1, 3), 1)])
def test_low_rank_moments(device, shape, dim, state):
    """A zero channel has zero squares of both; eps = 0 makes no NaN beside the matrix."""
    low = torch.randn(shape, device=device)
    low.select(1 - dim, 0).zero_()
    m, v = torch.randn(shape, device=device).to(state), torch.rand(shape, device=device).to(state)
    m.select(1 - dim, 0).zero_()
    options = {"betas": (0.9, 0.99), "eps": 0.0, "bias_corrections": (0.19, 0.0199), "dim": dim}
    results = []
    for backend in ("triton", "torch"):
        first, second = m.clone(), v.clone()
        with use_backend(backend):
            results.append((*kernels.low_rank_moments_(low, first, second, **options), first, second))
    fused, plain = results
    assert fused[1].shape == (shape[1 - dim],)
    # Moments of 16 bits may fall on either side of a tie.
    for index, (a, b) in enumerate(zip(fused, plain, strict=True)):
        assert relative_error(a, b) < (1e-3 if state is torch.bfloat16 and index > 2 else 1e-6)
    with use_backend("triton"):
        bare = kernels.low_rank_moments_(low, m.clone(), v.clone(), direction=False, **options)
    assert bare[0].numel() == 0 and torch.equal(bare[1], fused[1])


def test_adamw_of_many_tensors_is_adamw_of_each(device, monkeypatch):
    """Whole chunks, a tail, an empty tensor, an unaligned one; a second call at the same addresses."""
    sizes = (5000, 17, 2048, 0, 1, 96)
    storage = torch.randn(97, device=device)
    params = [torch.randn(n, device=device) for n in sizes[:-1]] + [storage[1:]]
    params[1] = params[1].bfloat16()
    grads = [torch.randn_like(p) for p in params]
    moments = [[torch.rand(n, device=device) for n in sizes] for _ in range(2)]
    expected = [[x.clone() for x in column] for column in (params, *moments)]
    scale = torch.tensor(0.5, device=device)
    launches = []
    op = OPS.adamw_many_
    monkeypatch.setattr(OPS, "adamw_many_", lambda *given: (launches.append(given), op(*given)))
    for step in (1, 2):
        options = {"step": step, "lr": 0.1, "weight_decay": 0.1, "grad_scale": scale}
        kernels.adamw_many_(params, grads, *moments, **options)
        for p, g, m, v in zip(expected[0], grads, *expected[1:], strict=True):
            kernels.adamw_(p, g, m, v, **options)
    assert len(launches) == 4, "one for each dtype of params in each call"
    for one, other in zip((params, *moments), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_opcheck(device):
    low, m, v = (torch.rand(6, 20, device=device) for _ in range(3))
    torch.library.opcheck(OPS.low_rank_moments_.default, (low, m, v, 0.9, 0.99, 1e-8, 1.0, 1.0, False, True))
    columns = [[torch.rand(n, device=device) for n in (40, 3)] for _ in range(4)]
    numbers = (0.1, 0.9, 0.99, 1e-8, 1.0, 0.1, 0.1)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.adamw_many_.default, (*columns, None, *numbers), test_utils=checks)
