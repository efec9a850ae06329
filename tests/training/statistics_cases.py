"""What each process of the running-statistics tests runs; a module of its own, so that they can import it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import IGNORED, ROWS, VOCABULARY, micro_batches, whole

from llmnorm.config import ParallelSection
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import create_optimizer
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.processes import Processes, start_processes
from llmnorm.training.update import Update

STEPS = 4


@dataclass(frozen=True)
class Case:
    """One way to compute the same four updates: Unified Norm with its window full from the third, PRepBN with
    lambda 1, 3/4, 1/2, 1/4.
    """

    norm: str
    options: dict[str, Any] = field(default_factory=dict)
    strategy: str = "none"
    micro_batch_size: int = ROWS
    checkpointing: str = "none"
    precision: str = "fp32"


OPTIONS: dict[str, dict[str, Any]] = {
    "powernorm": {"statistics_warmup": 2},
    "unified_norm": {"statistics_warmup": 0, "window": 2},
    "prepbn": {"interpolation_steps": 4, "branch_init": 1.0},
}
WHOLE = {norm: Case(norm, options) for norm, options in OPTIONS.items()}
# Each process normalizes its own micro-batches, so these equal one process that accumulates them.
APART = {norm: Case(norm, {**options, "synchronize": False}) for norm, options in OPTIONS.items()}
CASES = {
    **{f"ddp-{norm}": replace(case, strategy="ddp", micro_batch_size=2) for norm, case in WHOLE.items()},
    **{
        f"fsdp2-{norm}": replace(case, strategy="fsdp2", micro_batch_size=2, checkpointing="full")
        for norm, case in WHOLE.items()
    },
    **{f"apart-{norm}": replace(case, strategy="ddp", micro_batch_size=2) for norm, case in APART.items()},
    "bf16": replace(
        WHOLE["prepbn"], strategy="fsdp2", micro_batch_size=2, precision="bf16", checkpointing="selective"
    ),
}


def build(case: Case, processes: Processes) -> tuple[ParallelModel, Update]:
    config = LlmNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        norm=case.norm,
        norm_options=case.options,
    )
    with torch.device("meta"):
        module = LlmNormForCausalLM(config)
    module.set_activation_checkpointing(case.checkpointing)
    model = ParallelModel(module.train(), case.strategy, processes, case.precision, ParallelSection())
    model.materialize()
    initialize_weights(module, seed=1)
    model.connect()
    optimizer = create_optimizer("adamw", module, lr=1e-2)
    return model, Update(model, optimizer, grad_clip=0.5)


def batches(case: Case, step: int, processes: Processes) -> list[dict[str, torch.Tensor]]:
    """`parallel_cases.micro_batches`, whose rows count 12, 1, 7 and 3 tokens; each process has some."""
    found = micro_batches(step, case.micro_batch_size, processes.rank, processes.world_size)
    assert all((batch["labels"] != IGNORED).any() for batch in found)
    return found


def compute(case: Case, processes: Processes) -> dict[str, Any]:
    """STEPS updates: loss, norm and tokens of each, weights and statistics after the last."""
    model, update = build(case, processes)
    measured = []
    for step in range(STEPS):
        measured.append(update.measure(batches(case, step, processes))[:3])
        update.apply(1.0)
    state = model.module.state_dict()
    return {"measured": measured, "state": {name: whole(value).clone() for name, value in state.items()}}


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    """Entry of a spawned process: compute every case, and write the results."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    processes = start_processes()
    for name, case in CASES.items():
        torch.save(compute(case, processes), Path(folder) / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
