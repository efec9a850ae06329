"""Resuming, state sizes and silence towards the device: what all nine low-rank and low-bit methods owe."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.optim import lowrank
from llmnorm.optim.apollo import APOLLO, APOLLOMini
from llmnorm.optim.dct_adamw import DCTAdamW
from llmnorm.optim.fira import Fira
from llmnorm.optim.galore import GaLore
from llmnorm.optim.gradnorm_lorp import GradNormLoRP
from llmnorm.optim.lowrank import back, find_basis, project, subspace
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.registry import MATRIX_METHODS
from llmnorm.optim.spam import SPAM
from llmnorm.optim.stable_spam import StableSPAM

GAP = 3
REFRESHED: dict[str, Any] = {"rank": 32, "update_proj_gap": GAP}
# Each of the nine, with a refresh or a reset every third update, and the options that add state of their own.
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "galore": ("galore", REFRESHED),
    "galore 8-bit, transported": ("galore", {**REFRESHED, "state_bits": 8, "moments": "transport"}),
    "q-galore": ("galore", {**REFRESHED, "state_bits": 8, "projection_bits": 4, "lazy_refresh": True}),
    "galore randomized": ("galore", {**REFRESHED, "projection": "randomized", "stagger": True}),
    "galore power, reset": ("galore", {**REFRESHED, "projection": "power", "moments": "reset"}),
    "fira": ("fira", REFRESHED),
    "fira gram, paper": ("fira", {**REFRESHED, "projection": "gram", "variant": "paper"}),
    "apollo": ("apollo", REFRESHED),
    "apollo svd": ("apollo", {**REFRESHED, "projection": "svd"}),
    "apollo_mini": ("apollo_mini", {"update_proj_gap": GAP}),
    "dct_adamw": ("dct_adamw", {**REFRESHED, "error_feedback": 8}),
    "gradnorm_lorp": ("gradnorm_lorp", REFRESHED),
    "adamw8bit": ("adamw8bit", {}),
    "adamw8bit in 4": ("adamw8bit", {"state_bits": 4}),
    "spam": ("spam", {"reset_interval": GAP, "warmup_steps": 2, "grace_steps": 1}),
    "spam sparse": ("spam", {"reset_interval": GAP, "warmup_steps": 2, "grace_steps": 1, "density": 0.25}),
    "stable_spam": ("stable_spam", {"reset_interval": GAP}),
    "stable_spam released": (
        "stable_spam",
        {"reset_interval": GAP, "variant": "released", "cosine_steps": 5},
    ),
}


def parameters() -> dict[str, Tensor]:
    """bf16, and 128 wide, so that moments of rank 32 are large enough for 8 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"up_proj.weight": (160, 128), "down_proj.weight": (128, 160), "norm.weight": (128,)}
    return {
        name: torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        for name, shape in shapes.items()
    }


def build(case: str, weights: dict[str, Tensor]) -> MatrixOptimizer:
    name, options = RESUMED[case]
    matrices = [(key, weight) for key, weight in weights.items() if weight.ndim == 2]
    vectors = [(key, weight) for key, weight in weights.items() if weight.ndim == 1]
    groups = [{"params": matrices, "role": "hidden_matrix"}, {"params": vectors, "role": "vector"}]
    return MATRIX_METHODS[name](groups, lr=1e-2, state_dtype="fp32", **options)


def run(optimizer: MatrixOptimizer, weights: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("case", RESUMED)
def test_o22_resumed_across_refreshes_and_resets_equals_never_stopped(case):
    """From the middle of a window and from its last update on, over a refresh or reset each; loaded without
    pickle, and o23: every dtype as it was saved."""
    weights = parameters()
    optimizer = build(case, weights)
    files = {}
    done = 0
    for stop in (2, 3):
        run(optimizer, weights, range(done, stop))
        done, files[stop] = stop, io.BytesIO()
        torch.save((optimizer.state_dict(), {k: w.detach().clone() for k, w in weights.items()}), files[stop])
    run(optimizer, weights, range(done, 5))
    for stop, file in files.items():
        file.seek(0)
        saved, values = torch.load(file, weights_only=True)
        resumed = {key: value.requires_grad_() for key, value in values.items()}
        again = build(case, resumed)
        again.load_state_dict(saved)
        for index, weight in enumerate(resumed.values()):
            loaded = {key: value.dtype for key, value in again.state[weight].items()}
            assert loaded == {key: value.dtype for key, value in saved["state"][index].items()}
        torch.manual_seed(stop)  # the process's own generator is nobody's
        run(again, resumed, range(stop, 5))
        for key, weight in weights.items():
            assert torch.equal(weight, resumed[key]), f"{key} from step {stop} on"
            mine, its = optimizer.state[weight], again.state[resumed[key]]
            assert mine.keys() == its.keys()
            for name, value in mine.items():
                assert torch.equal(value, its[name]), f"{name} of {key} from step {stop} on"


def test_o22_all_nine_methods_are_resumed():
    names = {name for name, _ in RESUMED.values()}
    low_rank = {"galore", "fira", "apollo", "apollo_mini", "dct_adamw", "gradnorm_lorp"}
    assert names == low_rank | {"adamw8bit", "spam", "stable_spam"}


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
@pytest.mark.parametrize("projection", ["svd", "gram", "randomized", "power"])
def test_o2_a_projection_of_full_rank_and_back_is_the_gradient(projection, shape):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = shape[0] > shape[1]
    basis = find_basis(grad, right, 5, {"projection": projection, "name": "w"}, 3, None)
    torch.testing.assert_close(back(project(grad, basis, right), basis, right), grad, rtol=0, atol=1e-12)


def gradients(rank: int | None = None) -> Iterator[Tensor]:
    """Three 9 x 6 gradients, of this rank in the same row space."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(rank or 6, 6, generator=generator, dtype=torch.float64)
    for _ in range(3):
        yield torch.randn(9, rank or 6, generator=generator, dtype=torch.float64) @ rows


def test_o5_without_a_residual_fira_is_galore():
    """A gradient of rank r leaves none. eps, on either side of the bias correction, is tiny."""
    found = []
    for method in (GaLore, Fira):
        weight = torch.zeros(9, 6, dtype=torch.float64, requires_grad=True)
        optimizer = method([("w", weight)], lr=0.01, rank=2, variant="paper", eps=1e-14)
        for grad in gradients(2):
            weight.grad = grad
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    assert found[0].abs().max() > 1e-3


def test_o9_apollo_by_tensor_has_the_norm_of_adam(monkeypatch):
    monkeypatch.setattr(
        lowrank, "random_basis", lambda grad, right, r, seed: torch.eye(6, dtype=torch.float64)
    )
    weight = torch.zeros(9, 6, dtype=torch.float64, requires_grad=True)
    (weight.grad, *_) = gradients()
    APOLLO([("w", weight)], lr=1.0, rank=6, granularity="tensor", eps=1e-12).step()
    # Adam's first step is sign(g), of norm sqrt(54).
    assert weight.detach().norm().item() == pytest.approx(54**0.5, rel=1e-6)


M, N, R = 96, 64, 16
ADAM = 2 * M * N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "options", "numbers", "more"),
    [
        (GaLore, {"rank": R}, 2 * M * R, 4 * N * R),
        (Fira, {"rank": R}, 2 * M * R, 4 * N * R + 4),
        (APOLLO, {"rank": R}, 2 * M * R, 4),
        (APOLLO, {"rank": R, "projection": "svd"}, 2 * M * R, 4 * N * R + 4),
        (APOLLOMini, {}, 2 * M, 4),  # o11
        (DCTAdamW, {"rank": R}, 2 * M * R, 4 * R),
        (GradNormLoRP, {"rank": R}, 2 * M * R, 4 * N * R + 12 * M),
        (SPAM, {}, ADAM, 0),
        (SPAM, {"density": 0.25}, ADAM // 4, 4 * M * N // 4),
        (StableSPAM, {}, ADAM, 3 * 4),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_o21_state_bytes_are_those_of_the_table(method, options, numbers, more, dtype):
    """`numbers` in the dtype of the weight, `more` bytes of bases, places and counts, and the step count."""
    weight = torch.zeros(M, N, dtype=dtype, requires_grad=True)
    weight.grad = torch.randn(M, N, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer = method([("w", weight)], **options)
    optimizer.step()
    kept = sum(value.nbytes for value in optimizer.state[weight].values())
    assert kept == numbers * dtype.itemsize + more + 4
    assert optimizer.state_bytes(optimizer.param_groups[0], weight) == kept


@pytest.mark.parametrize("case", RESUMED)
def test_o28_nothing_is_read_from_the_device(case):
    """On meta tensors, whose values cannot be read, refreshes and resets included. Counters and what a lazy
    refresh decides by live on the host."""
    lazy = RESUMED[case][1].get("lazy_refresh", False)
    weights = {
        key: torch.empty(weight.shape, dtype=weight.dtype, device="meta", requires_grad=True)
        for key, weight in parameters().items()
    }
    optimizer = build(case, weights)
    # A lazy refresh compares two bases, which it must read: the steps up to the second one.
    for _ in range(GAP if lazy else GAP + 2):
        for weight in weights.values():
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    assert all(value.device.type == "meta" for value in weights.values())


def test_o24_bases_do_not_depend_on_the_generator_of_the_process():
    """What replicas share is seed, name and step; they may have drawn other numbers in between."""
    grad = next(gradients())
    for projection in ("randomized", "random"):
        hyper = {
            "rank": 2,
            "side": "std",
            "projection": projection,
            "update_proj_gap": 2,
            "stagger": False,
            "lazy_refresh": False,
            "projection_bits": 32,
            "moments": "keep",
            "seed": 0,
            "name": "w",
        }
        bases = []
        for rank in range(3):
            torch.manual_seed(rank)
            torch.rand(rank)
            bases.append(subspace(grad, {}, hyper, 1).basis)
        assert all(torch.equal(bases[0], other) for other in bases)
