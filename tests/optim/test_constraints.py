"""project_weights: plain tensors, whole matrices of DTensors, rows without communication."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from llmnorm.optim import constrained_modules, create_optimizer, project_weights

WORLD = 2


class UnitColumns(nn.Linear):
    """A rule that needs the whole matrix, and leaves the bias alone."""

    def project_weights_(self) -> None:
        assert not hasattr(self.weight, "device_mesh")
        self.weight.div_(self.weight.norm(dim=0, keepdim=True))


class UnitRows(nn.Linear):
    """A rule for each row by itself."""

    projects_rows = True

    def project_weights_(self) -> None:
        assert not hasattr(self.weight, "device_mesh")
        self.weight.div_(self.weight.norm(dim=1, keepdim=True))


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(UnitRows(6, 9), nn.Linear(9, 9), UnitColumns(9, 5))  # odd rows: uneven shards


def _check(model: nn.Sequential, before: dict[str, torch.Tensor]) -> None:
    first, free, last = model
    torch.testing.assert_close(first.weight.norm(dim=1), torch.ones(9), rtol=0, atol=1e-6)
    torch.testing.assert_close(last.weight.norm(dim=0), torch.ones(9), rtol=0, atol=1e-6)
    expected = before["2.weight"] / before["2.weight"].norm(dim=0)
    torch.testing.assert_close(last.weight.detach(), expected, rtol=1e-6, atol=0)
    for name in ("0.bias", "1.weight", "1.bias", "2.bias"):
        assert torch.equal(model.get_parameter(name), before[name]), name
    assert free.weight.requires_grad and last.weight.requires_grad


def test_every_module_that_has_a_rule_and_no_other() -> None:
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert list(constrained_modules(model)) == [model[0], model[2]]
    project_weights(model)
    _check(model, before)


def test_the_hook_for_a_loop_of_ones_own() -> None:
    model = build()
    optimizer = create_optimizer("muon", model, lr=0.1)
    optimizer.register_step_post_hook(lambda *_: project_weights(model))
    for _ in range(2):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        torch.testing.assert_close(model[0].weight.norm(dim=1), torch.ones(9), rtol=0, atol=1e-6)
        torch.testing.assert_close(model[2].weight.norm(dim=0), torch.ones(9), rtol=0, atol=1e-6)


def _sharded(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    model = build()
    for module in model:
        shard = distribute_tensor(module.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        module.weight = nn.Parameter(shard)
    held = dict(model.named_parameters())
    counts = []
    for part in (model[0], model[2]):
        with CommDebugMode() as messages:
            project_weights(part)
        counts.append(messages.get_total_counts())
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    whole = {
        name: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in held.items()
    }
    torch.save({"weights": whole, "messages": counts}, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_shards_of_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_sharded, args=(str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=WORLD)
    alone = build()
    project_weights(alone)
    for rank in range(WORLD):
        result = torch.load(tmp_path / f"out.{rank}", weights_only=True)
        for name, weight in alone.named_parameters():
            assert torch.equal(result["weights"][name], weight), name
        assert result["messages"] == [0, 1]  # rows: none; columns: one gather
