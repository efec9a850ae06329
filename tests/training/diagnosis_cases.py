"""What each process of the two-process diagnostics test runs; a module of its own, for them to import."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from parallel_cases import GRAD_CLIP, LENGTH, ROWS, STEPS, VOCABULARY, Case, build, micro_batches, whole

from llmnorm.config import load_run_config
from llmnorm.evaluation.held_out import HeldOutText
from llmnorm.optim import create_optimizer
from llmnorm.training.diagnosis import TrainingDiagnostics
from llmnorm.training.processes import Processes, start_processes
from llmnorm.training.update import Update

CASES = {
    "ddp": Case("ddp", micro_batch_size=1),
    "fsdp2": Case("fsdp2", micro_batch_size=1),
    "fsdp2-full-tied": Case("fsdp2", micro_batch_size=2, checkpointing="full", tied=True),
}
ALONE = {name: Case(tied=case.tied) for name, case in CASES.items()}
# Of three sequences one process has two and the other one.
SEQUENCES = 3


def diagnostics_of(case: Case, model: Any) -> TrainingDiagnostics:
    values = {
        "output_dir": "unused",
        "model.preset": "2m",
        "data.train_files": "unused",
        "data.tokenizer": "unused",
        "data.sequence_length": LENGTH,
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-2,
        "train.max_steps": STEPS,
        "train.global_batch_size": ROWS,
        "train.micro_batch_size": case.micro_batch_size,
        "diagnostics": {"every": 1, "sequences": SEQUENCES, "layer_removal": True},
    }
    tokens = np.random.default_rng(5).integers(0, VOCABULARY, SEQUENCES * LENGTH + 1).astype(np.uint32)
    text = HeldOutText(tokens, 0, 0, 1, "", "")
    data: Any = SimpleNamespace(validation={"validation": text}, train=None)
    return TrainingDiagnostics(load_run_config(None, values), model, data)


def diagnosed(case: Case, processes: Processes, watched: bool = True) -> dict[str, Any]:
    """The row of each of STEPS updates, and the weights after them."""
    model = build(case, processes)
    update = Update(model, create_optimizer("adamw", model.module, lr=1e-2), GRAD_CLIP)
    diagnostics, rows = diagnostics_of(case, model), []
    for step in range(STEPS):
        batches = micro_batches(step, case.micro_batch_size, processes.rank, processes.world_size)
        if watched:
            watch = diagnostics.watch()
            update.measure(batches, see_gradients=watch.see_gradients)
            watch.see_weights()
            update.apply(1.0)
            rows.append(watch.row())
        else:
            update.measure(batches)
            update.apply(1.0)
    weights = {name: whole(p.detach()).clone() for name, p in model.module.named_parameters()}
    return {"rows": rows, "weights": weights}


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    """Entry of a spawned process: every case with and without diagnostics."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    processes = start_processes()
    for name, case in CASES.items():
        result = diagnosed(case, processes)
        result["unwatched"] = diagnosed(case, processes, watched=False)["weights"]
        torch.save(result, Path(folder) / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
