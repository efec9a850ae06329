"""What each process of the parity tests runs: every optimizer of one backend, in one process group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmnorm.checkpoint import CheckpointStore
from llmnorm.config import ParallelSection
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import create_optimizer
from llmnorm.optim.matrix import local
from llmnorm.training.combinations import combinations
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.processes import Processes, start_processes
from llmnorm.training.update import IGNORED, Update
from llmnorm.training.zero import ZeroModel, parallel_model

VOCABULARY, LENGTH, ROWS, GRAD_CLIP = 17, 6, 16, 0.5
# Options of a method in these runs: Newton-Schulz in fp32, so that a last digit stays one.
FP32_ENGINE: dict[str, dict[str, Any]] = {
    name: {"ns_dtype": "fp32"} for name in ("muon", "normuon", "lanton")
}


@dataclass(frozen=True)
class Run:
    """One run of one optimizer: `accumulation` micro-batches per process and update."""

    method: str
    steps: int
    accumulation: int = 1
    bf16_engine: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}-{self.accumulation}{'-bf16' if self.bf16_engine else ''}"

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.bf16_engine else FP32_ENGINE.get(self.method, {})


@dataclass(frozen=True)
class Backend:
    """A column of the table of combinations on some processes; `replicas` of the sharded model."""

    strategy: str = "none"
    processes: int = 1
    replicas: int = 1

    @property
    def section(self) -> ParallelSection:
        if self.strategy.startswith("zero"):
            return ParallelSection(strategy="deepspeed", zero_stage=int(self.strategy[-1]))
        return ParallelSection(strategy=self.strategy, replicas=self.replicas)


def runs(steps: int) -> list[Run]:
    """Every method with accumulation 1 and 4, and bf16 engines once."""
    every = [Run(method, steps, count) for method in combinations() for count in (1, 4)]
    return every + [Run(method, steps, 1, bf16_engine=True) for method in FP32_ENGINE]


def once(chosen: list[Run]) -> list[Run]:
    """One run of each method, with the fp32 engine."""
    return list({run.method: run for run in chosen if not run.bf16_engine}.values())


def build(backend: Backend, processes: Processes) -> ParallelModel:
    """Rows of 17, 37, 10 and 2: on four processes the last shard is short, or two are empty."""
    config = LlmNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=10,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        norm="mix_ln",
    )
    with torch.device("meta"):
        module = LlmNormForCausalLM(config)
    section = backend.section
    model = parallel_model(module.train(), section.strategy, processes, "fp32", section)
    model.materialize()
    initialize_weights(module, seed=1)
    return model


def micro_batches(step: int, accumulation: int, processes: Processes) -> list[dict[str, torch.Tensor]]:
    """This process's share of ROWS sequences that differ in their number of valid targets."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(ROWS):
        labels[row, 1 + row % LENGTH :] = IGNORED
    size = ROWS // (accumulation * processes.world_size)
    starts = [(index * processes.world_size + processes.rank) * size for index in range(accumulation)]
    return [
        {"input_ids": tokens[start : start + size, :-1], "labels": labels[start : start + size]}
        for start in starts
    ]


def losses(run: Run, backend: Backend, processes: Processes) -> tuple[list[float], int]:
    """The loss of every step, each before its update, so that the last shows what the update before it did;
    and the bytes of optimizer state that this process then holds."""
    model, update = resumable(run, backend, processes)
    found = trained(update, run, processes, 0, run.steps)
    tensors = [local(v) for state in update.optimizer.state.values() for v in state.values()]
    release(model)
    return found, sum(tensor.nbytes for tensor in tensors)


def release(model: ParallelModel) -> None:
    """Let DeepSpeed forget its hooks and buffers, before the next model of this process."""
    if isinstance(model, ZeroModel):
        model._engine.destroy()


def updated(run: Run, backend: Backend, processes: Processes) -> dict[str, torch.Tensor]:
    """The weights after one update by gradients that are drawn, and so the same to the bit everywhere."""
    model, update = resumable(run, backend, processes)
    update.measure(micro_batches(0, run.accumulation, processes))  # ZeRO takes gradients only after it
    generator = torch.Generator().manual_seed(3)
    for parameter in dict(model.module.named_parameters()).values():
        drawn = torch.randn(whole_shape(model, parameter), generator=generator)
        if isinstance(model, ZeroModel):
            model.partitions.set_gradient(parameter, model.partitions.parts[parameter].cut(drawn))
        else:
            parameter.grad = drawn
    model.clip_gradients(None)
    update.apply(1.0)
    weights = dict(model.module.named_parameters())
    if isinstance(model, ZeroModel):
        weights = {name: model.partitions.whole_weight(p) for name, p in weights.items()}
    found = {name: weight.detach().clone() for name, weight in weights.items()}
    release(model)
    return found


def whole_shape(model: ParallelModel, parameter: torch.nn.Parameter) -> torch.Size:
    return model.partitions.shape(parameter) if isinstance(model, ZeroModel) else parameter.shape


def results(backend: Backend, chosen: list[Run], processes: Processes) -> dict[str, Any]:
    """Losses and bytes of state of every run, and under ZeRO one update of each method."""
    found: dict[str, Any] = {run.name: losses(run, backend, processes) for run in chosen}
    if backend.section.zero_stage:
        found["updated"] = {run.name: updated(run, backend, processes) for run in once(chosen)}
    return found


def work(rank: int, backend: Backend, chosen: list[Run], port: int, folder: str) -> None:
    """Entry of a spawned process; every rank writes its results."""
    processes = _join(rank, backend, port)
    torch.save(results(backend, chosen, processes), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _join(rank: int, backend: Backend, port: int) -> Processes:
    world = backend.processes
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    return start_processes()


def resumable(run: Run, backend: Backend, processes: Processes) -> tuple[ParallelModel, Update]:
    """A model and its optimizer before the first step, or before a checkpoint is read."""
    model = build(backend, processes)
    optimizer = create_optimizer(run.method, model.module, lr=1e-3, **run.options)
    model.connect(optimizer)
    return model, Update(model, optimizer, GRAD_CLIP)


def trained(update: Update, run: Run, processes: Processes, first: int, last: int) -> list[float]:
    """Losses of the steps [first, last)."""
    found = []
    for step in range(first, last):
        found.append(update.measure(micro_batches(step, run.accumulation, processes)).loss)
        update.apply(1.0)
    return found


def save_and_go_on(
    rank: int, saver: Backend, readers: list[Backend], chosen: list[Run], port: int, folder: str
) -> None:
    """Train half of each run under `saver`, save, and let every reader of this many processes go on."""
    processes = _join(rank, saver, port)
    found = {}
    for run in chosen:
        half = run.steps // 2
        model, update = resumable(run, saver, processes)
        trained(update, run, processes, 0, half)
        store = CheckpointStore(Path(folder) / run.name, asynchronous=False)
        tensors, state = model.tensors(update.optimizer, store.ranks)
        checkpoint = store.save(half, tensors, {"optimizer": state})
        for reader in readers:
            model, update = resumable(run, reader, processes)
            model.restore(update.optimizer, checkpoint)
            found[f"{run.name}/{reader.strategy}"] = trained(update, run, processes, half, run.steps)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
