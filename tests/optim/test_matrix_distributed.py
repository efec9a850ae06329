"""Two gloo processes that hold halves of every parameter move like one process that holds all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matrix_cases import gradients, groups, make_parameters, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmnorm.optim.registry import MATRIX_METHODS

WORLD = 2
STEPS = 2


DEFAULTS = {"lr": 1e-2, "weight_decay": 0.1}
# name -> method and options: every method as it comes, and the options that reach into the adapter.
CASES: dict[str, tuple[str, dict]] = {
    **{name: (name, {}) for name in MATRIX_METHODS},
    "cautious": ("swan", {"cautious_weight_decay": True, "state_dtype": "fp32"}),
    "blocks": ("muon", {"cautious_weight_decay": True, "row_blocks": {"q_proj": 4, "up_proj": [20, 4]}}),
    "paper": ("normuon", {"variant": "paper"}),
    "free": ("lawn", {"free_steps": 1}),
    "rounded": ("muon", {"stochastic_rounding": True}),
    "rounded_elementwise": ("spam", {"stochastic_rounding": True}),
    "rounded_projected": ("lawn", {"stochastic_rounding": True}),
}


def parameters_of(options: dict) -> dict[str, torch.Tensor]:
    return make_parameters(dtype=torch.bfloat16 if "stochastic_rounding" in options else torch.float32)


def _sharded(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))

    def cut(whole: torch.Tensor) -> DTensor:
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    results = {}
    for name, (method, options) in CASES.items():
        # 21 rows on two processes: 11 and 10.
        whole = parameters_of(options)
        parameters = {key: cut(value.detach()).requires_grad_() for key, value in whole.items()}
        optimizer = MATRIX_METHODS[method](groups(parameters), **DEFAULTS, **options)
        for grads in gradients(STEPS):
            for key, parameter in parameters.items():
                parameter.grad = cut(grads[key].to(parameter.dtype))
            optimizer.step()
        for key, parameter in parameters.items():
            results[f"{name}/{key}"] = parameter.full_tensor()
            for value in optimizer.state.get(parameter, {}).values():
                sharded = isinstance(value, DTensor)
                assert sharded is (value.shape == parameter.shape), (
                    f"{name}: state is not laid out like {key}"
                )
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_equal_one(tmp_path: Path):
    mp.spawn(_sharded, args=(str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=WORLD)
    by_rank = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(WORLD)]
    for name, (method, options) in CASES.items():
        parameters = parameters_of(options)
        run(MATRIX_METHODS[method](groups(parameters), **DEFAULTS, **options), parameters, STEPS)
        for key, parameter in parameters.items():
            first, second = (results[f"{name}/{key}"] for results in by_rank)
            assert torch.equal(first, second)
            # Every process computes on the whole matrix, so only vectorized loops over other lengths differ.
            torch.testing.assert_close(first, parameter.detach(), rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
