"""Saved by one number of processes, read by another; and all ranks agree on success, failure and damage."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros

from llmnorm.checkpoint import (
    CheckpointStore,
    load_full,
    model_tensors,
    newest_checkpoint,
    optimizer_tensors,
    read_state,
    read_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)
from llmnorm.checkpoint import store as store_module
from llmnorm.errors import UserError

pytestmark = pytest.mark.distributed


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def build(seed: int) -> nn.Module:
    """5 rows split unevenly over 2 and 3 processes; of 3 processes, one has an empty shard of 2 rows."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2))


def sharded(seed: int) -> nn.Module:
    model = build(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def all_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    tensors, described = optimizer_tensors(model, optimizer)
    return {**model_tensors(model), **tensors}, {"optimizer": described}


def save_sharded(directory: Path, truth: Path) -> None:
    """Train two steps under FSDP2 and save; rank 0 leaves the gathered tensors beside it as the truth."""
    rank = dist.get_rank()
    model = sharded(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for number in range(2):
        step(model, optimizer, number)
    # An evaluation leaves FSDP2's root gathered; saving must still see the shards that the optimizer holds.
    with torch.no_grad():
        model(torch.zeros(1, 6))
    tensors, state = all_tensors(model, optimizer)
    assert all(isinstance(tensors[name], DTensor) for name in tensors if not name.endswith("/step"))
    torch.manual_seed(100 + rank)
    store = CheckpointStore(directory, asynchronous=True)
    store.save(2, {**tensors, **rng_tensors(rank)}, {"step": 2, **state})
    full = {name: whole(tensor) for name, tensor in tensors.items()}
    full[f"draw/{rank}"] = torch.randn(3)
    for number in range(2, 4):
        step(model, optimizer, number)
    later = {f"later/{name}": whole(tensor) for name, tensor in all_tensors(model, optimizer)[0].items()}
    save_file({**full, **later}, truth / f"rank{rank}.safetensors")
    store.wait()
    assert store.newest() == directory / "step_2"


def read_sharded(directory: Path, truth: Path) -> None:
    """Restore under FSDP2 over other initial values, and go on as the saving run did."""
    model = sharded(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    path = CheckpointStore(directory).newest()
    assert path is not None
    read_tensors(path, model_tensors(model))
    restore_optimizer(model, optimizer, path)
    expected = load_file(truth / "rank0.safetensors")
    tensors, _ = all_tensors(model, optimizer)
    for name, tensor in tensors.items():
        assert isinstance(tensor, DTensor) == (not name.endswith("/step")), name
        assert torch.equal(whole(tensor), expected[name]), name
    for number in range(2, 4):
        step(model, optimizer, number)
    for name, tensor in all_tensors(model, optimizer)[0].items():
        # Gradients are averaged over another number of processes: equal up to fp32 rounding of that mean.
        torch.testing.assert_close(whole(tensor), expected[f"later/{name}"], rtol=1e-5, atol=1e-7, msg=name)
    store = CheckpointStore(directory, keep=9)
    tensors, state = all_tensors(model, optimizer)
    store.save(4, tensors, {"step": 4, **state})
    store.wait()


@pytest.mark.parametrize(("writers", "readers"), [(2, 3), (3, 2)])
def test_fsdp2_to_one_process_and_to_another_count(tmp_path: Path, writers: int, readers: int) -> None:
    directory = tmp_path / "checkpoints"
    run_ranks(save_sharded, writers, tmp_path, directory, tmp_path)
    path = directory / "step_2"
    shards = [f"shard-{rank:05d}-of-{writers:05d}.safetensors" for rank in range(writers)]
    assert sorted(file.name for file in path.iterdir()) == ["index.json", *shards, "state.json"]

    # One process: whole tensors, plain parameters, and the next steps of a model that was never sharded.
    expected = load_file(tmp_path / "rank0.safetensors")
    model = build(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    read_tensors(path, model_tensors(model))
    restore_optimizer(model, optimizer, path)
    for name, tensor in all_tensors(model, optimizer)[0].items():
        assert type(tensor) in (Tensor, nn.Parameter)
        assert torch.equal(tensor, expected[name]), name
    assert all(torch.equal(tensor, expected[f"model/{name}"]) for name, tensor in load_full(path).items())
    for number in range(2, 4):
        step(model, optimizer, number)
    for name, tensor in all_tensors(model, optimizer)[0].items():
        torch.testing.assert_close(tensor.detach(), expected[f"later/{name}"], rtol=1e-5, atol=1e-7, msg=name)
    for rank in range(writers):
        restore_rng(path, rank)
        drawn = load_file(tmp_path / f"rank{rank}.safetensors")[f"draw/{rank}"]
        assert torch.equal(torch.randn(3), drawn), rank

    # Another process count, from the shards and from what one process saved.
    run_ranks(read_sharded, readers, tmp_path, directory, tmp_path)
    assert newest_checkpoint(directory) == directory / "step_4"
    one = CheckpointStore(tmp_path / "one", asynchronous=False)
    read_tensors(path, model_tensors(model))
    restore_optimizer(model, optimizer, path)
    tensors, state = all_tensors(model, optimizer)
    one.save(2, tensors, state)
    run_ranks(read_sharded, writers, tmp_path, tmp_path / "one", tmp_path)


PLACEMENTS_2D = [
    (Replicate(), Shard(0)),
    (Shard(0), Replicate()),
    (Shard(0), Shard(0)),
    (Shard(1), Shard(0)),
    (Shard(0), Shard(1)),
    (Replicate(), Replicate()),
]


def meshes(directory: Path) -> None:
    """Every placement on a 2 x 2 mesh, read into every other placement, in uneven shapes."""
    mesh = init_device_mesh("cpu", (2, 2))
    rank = dist.get_rank()
    full = {
        "a": torch.arange(15.0).reshape(5, 3),
        "b": torch.arange(7.0).reshape(1, 7),
        "c": torch.zeros(0, 2),
    }
    tensors = {
        f"t/{name}/{i}": distribute_tensor(value, mesh, placements)
        for name, value in full.items()
        for i, placements in enumerate(PLACEMENTS_2D)
    }
    tensors["t/plain"] = torch.full((3,), 7.0)
    if rank == 2:
        tensors["own/2"] = torch.full((2,), 2.0)
    store = CheckpointStore(directory, asynchronous=True)
    path = store.save(1, tensors, {})
    store.wait()
    index = json.loads((path / "index.json").read_text())
    for name, record in index["tensors"].items():
        written = sum(torch.Size(block["shape"]).numel() for block in record["blocks"])
        assert written == torch.Size(record["shape"]).numel(), f"{name}: {record['blocks']}"
    assert [b["file"] for b in index["tensors"]["t/plain"]["blocks"]] == ["shard-00000-of-00004.safetensors"]
    assert [b["file"] for b in index["tensors"]["own/2"]["blocks"]] == ["shard-00002-of-00004.safetensors"]
    for shift in range(len(PLACEMENTS_2D)):
        into = {}
        for name, value in full.items():
            for i in range(len(PLACEMENTS_2D)):
                placements = PLACEMENTS_2D[(i + shift) % len(PLACEMENTS_2D)]
                into[f"t/{name}/{i}"] = zeros(*value.shape, device_mesh=mesh, placements=placements)
        into["t/plain"] = torch.zeros(3)
        read_tensors(path, into)
        for name, tensor in into.items():
            expected = full[name.split("/")[1]] if name != "t/plain" else torch.full((3,), 7.0)
            assert torch.equal(whole(tensor), expected), (name, shift)


def agreement(directory: Path) -> None:
    """A failure of one rank is the same UserError on both; damage that one rank finds counts for both."""
    rank = dist.get_rank()
    tensors = {"model/w": distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (2,)), [Shard(0)])}
    store = CheckpointStore(directory, asynchronous=True)
    store.save(1, tensors, {"step": 1})
    store.save(2, tensors, {"step": 2})
    store.wait()
    write_shard, publish = store_module.write_shard, CheckpointStore._publish

    def full_disk(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    for failing_rank in (0, 1):
        if rank == failing_rank:
            store_module.write_shard = full_disk
        store.save(3, tensors, {"step": 3})
        with pytest.raises(
            UserError, match=rf"No space left on device .*shard-0000{failing_rank}-of-00002.*step_2"
        ):
            store.wait()
        store_module.write_shard = write_shard
    if rank == 0:
        CheckpointStore._publish = lambda self, temporary, *rest: full_disk(temporary)
    store.save(3, tensors, {"step": 3})
    with pytest.raises(UserError, match="No space left on device"):
        store.wait()
    CheckpointStore._publish = publish
    if rank == 1:
        store_module.write_shard = lambda *args: 1 // 0
    store.save(3, tensors, {"step": 3})
    with pytest.raises((ZeroDivisionError, RuntimeError), match="by zero"):
        store.wait()
    store_module.write_shard = write_shard
    dist.barrier()
    assert sorted(path.name for path in directory.iterdir()) == ["step_1", "step_2"]
    assert store.newest() == directory / "step_2"

    # Tensors that cannot be saved on one rank stop both before anything is written.
    bad = {"model/w": torch.zeros(2, dtype=torch.complex64)} if rank == 1 else tensors
    with pytest.raises((TypeError, RuntimeError), match="complex64"):
        store.save(4, bad, {})
    dist.barrier()
    assert sorted(path.name for path in directory.iterdir()) == ["step_1", "step_2"]

    # Each rank verifies its share of the files: whichever holds the damaged one, both take step_1.
    for victim in ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors", "state.json"):
        content = (directory / "step_2" / victim).read_bytes()
        dist.barrier()
        if rank == 0:
            (directory / "step_2" / victim).write_bytes(content[:-1])
        dist.barrier()
        assert store.newest() == directory / "step_1"
        dist.barrier()
        if rank == 0:
            (directory / "step_2" / victim).write_bytes(content)
        dist.barrier()
    assert store.newest() == directory / "step_2"
    store.discard_newer(1)
    assert store.newest() == directory / "step_1" and read_state(directory / "step_1") == {"step": 1}
    with pytest.raises(UserError, match="/proc/llmnorm"):
        CheckpointStore("/proc/llmnorm")


def background_beside_training(directory: Path) -> None:
    """Saves run in the writer thread while the training group's collectives go on in the main thread."""
    rank = dist.get_rank()
    store = CheckpointStore(directory, keep=99, asynchronous=True)
    total = torch.zeros(1000)
    for number in range(1, 301):
        value = torch.full((1000,), float(number * (rank + 1)))
        dist.all_reduce(value)
        total += value
        if number % 20 == 0:
            store.save(number, {"model/total": total, f"rng/{rank}/x": value}, {"step": number})
    store.wait()
    assert torch.equal(total, torch.full((1000,), 3.0 * 300 * 301 / 2))
    for number in range(20, 301, 20):
        full = load_full(directory / f"step_{number}")["total"]
        assert torch.equal(full, torch.full((1000,), 3.0 * number * (number + 1) / 2)), number


class Mixed(torch.optim.Optimizer):
    """A sharded vector of another shape, and a whole copy of the gradient, beside a sharded parameter."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["row"] = zeros(p.shape[0], device_mesh=p.device_mesh, placements=p.placements)
                state["whole"] = torch.zeros(p.shape)
            state["row"] += p.grad.reshape(p.shape[0], -1).sum(1)
            state["whole"] += p.grad.full_tensor()
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def mixed_state(directory: Path) -> None:
    model = sharded(seed=0)
    optimizer = Mixed(model.parameters())
    for number in range(2):
        step(model, optimizer, number)
    tensors, state = all_tensors(model, optimizer)
    path = CheckpointStore(directory, asynchronous=False).save(2, tensors, state)
    fresh = sharded(seed=1)
    fresh_optimizer = Mixed(fresh.parameters())
    read_tensors(path, model_tensors(fresh))
    restore_optimizer(fresh, fresh_optimizer, path)
    restored, _ = all_tensors(fresh, fresh_optimizer)
    assert restored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert isinstance(restored[name], DTensor) == (not name.endswith("/whole")), name
        if isinstance(tensor, DTensor):
            assert restored[name].placements == tensor.placements, name
        assert torch.equal(whole(restored[name]), whole(tensor)), name
    step(fresh, fresh_optimizer, 3)


def two_ranks(directory: Path) -> None:
    mixed_state(directory / "mixed")
    agreement(directory / "agreement")
    background_beside_training(directory / "background")


def test_ranks_agree_and_do_not_disturb_training(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path, tmp_path)


def test_two_dimensional_meshes(tmp_path: Path) -> None:
    run_ranks(meshes, 4, tmp_path, tmp_path / "checkpoints")
    saved = load_full(tmp_path / "checkpoints" / "step_1", prefix="t/")
    for i in range(len(PLACEMENTS_2D)):
        assert torch.equal(saved[f"a/{i}"], torch.arange(15.0).reshape(5, 3))
        assert torch.equal(saved[f"b/{i}"], torch.arange(7.0).reshape(1, 7))
        assert saved[f"c/{i}"].shape == (0, 2)
