"""Processes that hold uneven, short or empty rows of every parameter move like one process that holds all."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matrix_cases import SHAPES, gradients, groups, make_parameters, run
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llmnorm.optim.moves import Path as Where
from llmnorm.optim.registry import MATRIX_METHODS

pytestmark = pytest.mark.distributed
STEPS = 2
# A learning rate of 1 puts updates of order 1 into weights of order 0.1, so that their digits are compared.
DEFAULTS = {"lr": 1.0, "weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """A method with options; on every mesh it must equal one process."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)


# Every method as it comes, and the options that reach into the adapter.
CASES: dict[str, Case] = {
    **{name: Case(name) for name in MATRIX_METHODS},
    "cautious": Case("swan", {"cautious_weight_decay": True, "state_dtype": "fp32"}),
    "blocks": Case("muon", {"cautious_weight_decay": True, "row_blocks": {"q_proj": 4, "up_proj": [20, 4]}}),
    "paper": Case("normuon", {"variant": "paper"}),
    "free": Case("lawn", {"free_steps": 1}),
    "right": Case("apollo", {"side": "right", "rank": 3}),
    "mini_right": Case("apollo_mini", {"side": "right"}),
    "rounded": Case("muon", {"stochastic_rounding": True}),
    "rounded_elementwise": Case("spam", {"stochastic_rounding": True}),
    "rounded_rows": Case("lawn", {"stochastic_rounding": True}),
    "rounded_projected": Case("gradnorm_lorp", {"stochastic_rounding": True}),
    "sparse": Case("spam", {"density": 0.5}),
}
# name -> mesh shape; the last dimension cuts rows, the first repeats them. 12 rows on 8 processes would leave
# two empty; 21 rows are 11 and 10 on two processes, and the two experts leave two of four empty.
MESHES = {"two": (2,), "four": (4,), "replicas": (2, 2)}


def parameters_of(case: Case) -> dict[str, torch.Tensor]:
    rounded = "stochastic_rounding" in case.options
    return make_parameters(dtype=torch.bfloat16 if rounded else torch.float32)


def make_mesh(shape: tuple[int, ...]) -> DeviceMesh:
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def cut(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _check_state(name: str, optimizer: Any, parameter: DTensor) -> None:
    """State is where the path says: rows with their rows, whole matrices at one owner only."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    held = optimizer.state.get(parameter, {})
    if optimizer.path(group, parameter) is Where.OWNER:
        owner = optimizer.owners()[parameter] == optimizer.owner_layout(parameter).rank
        assert owner or not held, f"{name}: state of a matrix that is not this process's"
        assert not any(isinstance(value, DTensor) for value in held.values())
        return
    for key, value in held.items():
        if value.shape == parameter.shape:
            assert isinstance(value, DTensor), f"{name}: {key} is not laid out like its parameter"


def _sharded(rank: int, world: int, mesh_shape: tuple[int, ...], file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = make_mesh(mesh_shape)
    results = {}
    for name, case in CASES.items():
        parameters = {
            key: cut(value.detach(), mesh).requires_grad_() for key, value in parameters_of(case).items()
        }
        optimizer = MATRIX_METHODS[case.method](groups(parameters), **DEFAULTS, **case.options)
        for grads in gradients(STEPS):
            for key, parameter in parameters.items():
                parameter.grad = cut(grads[key].to(parameter.dtype), mesh)
            optimizer.step()
        for key, parameter in parameters.items():
            results[f"{name}/{key}"] = parameter.full_tensor().detach()
            _check_state(name, optimizer, parameter)
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


def _shared(rank: int, world: int, mesh_shape: tuple[int, ...], file: str, out: str) -> None:
    """DDP: whole parameters and gradients, owners for whole-matrix rules."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    results = {}
    for name, case in CASES.items():
        parameters = parameters_of(case)
        optimizer = MATRIX_METHODS[case.method](groups(parameters), **DEFAULTS, **case.options)
        optimizer.share_whole_matrices(dist.group.WORLD)
        run(optimizer, parameters, STEPS)
        for key, parameter in parameters.items():
            results[f"{name}/{key}"] = parameter.detach()
        owned = set(optimizer.owners())
        if case.method in ("muon", "psgd_kron"):
            assert owned, f"{name} shares nothing"
        for parameter in owned:
            assert optimizer.owners()[parameter] == rank or parameter not in optimizer.state
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


def _compare(tmp_path: Path, work: Any, mesh_shape: tuple[int, ...]) -> None:
    world = int(torch.tensor(mesh_shape).prod())
    mp.spawn(
        work,
        args=(world, mesh_shape, str(tmp_path / "rendezvous"), str(tmp_path / "out")),
        nprocs=world,
    )
    by_rank = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(world)]
    for name, case in CASES.items():
        parameters = parameters_of(case)
        run(MATRIX_METHODS[case.method](groups(parameters), **DEFAULTS, **case.options), parameters, STEPS)
        for key, parameter in parameters.items():
            first, *others = (results[f"{name}/{key}"] for results in by_rank)
            assert all(torch.equal(first, other) for other in others), f"{name} {key}"
            # fp32 sums over rows in another order, and vectorized loops over other lengths, differ by a few
            # 1e-7; owners compute on whole matrices.
            torch.testing.assert_close(
                first, parameter.detach(), rtol=1e-6, atol=1e-6, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )


def test_two_processes_equal_one(tmp_path: Path) -> None:
    _compare(tmp_path, _sharded, MESHES["two"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["four", "replicas"])
def test_four_processes_and_replicas_equal_one(tmp_path: Path, mesh: str) -> None:
    _compare(tmp_path, _sharded, MESHES[mesh])


def test_two_replicas_that_share_whole_matrices_equal_one(tmp_path: Path) -> None:
    _compare(tmp_path, _shared, (2,))


def test_every_role_is_tried() -> None:
    assert {role for role, _ in SHAPES.values()} == {"hidden_matrix", "embedding", "lm_head", "vector"}
