"""What each process of the DeepSpeed tests runs; a module of its own, so that they can import it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parallel_cases import ROWS, micro_batches
from parity_cases import Backend, Run, results

from llmnorm.checkpoint import CheckpointStore
from llmnorm.config import LossReweightingSection, ParallelSection
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import Penalty, create_optimizer, project_weights
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.processes import Processes, start_processes
from llmnorm.training.update import Update
from llmnorm.training.zero import parallel_model

GRAD_CLIP, STEPS, SAVED = 0.5, 4, 2
MUON = {"ns_dtype": "fp32"}
QK_CLIP, CAP = 1e-3, 0.5


@dataclass(frozen=True)
class Case:
    """One run of STEPS updates: sizes that two processes divide nowhere, and rows of 17."""

    stage: int = 0  # 0: no DeepSpeed
    optimizer: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = ROWS
    precision: str = "fp32"
    norm: str = "mix_ln"
    tied: bool = False
    checkpointing: str = "none"
    capped: bool = False  # the Lipschitz architecture under spectral caps
    growing: bool = False  # the first half of the updates reads two rows only, as a batch schedule may
    reweighted: bool = False
    penalized: bool = False
    parametrized: tuple[str, ...] = ()


VARIANTS = {
    "adamw": Case(options={"weight_decay": 0.1}),
    "muon": Case(optimizer="muon", options=MUON),
    "scale": Case(optimizer="scale"),
    "galore": Case(optimizer="galore", options={"rank": 4, "update_proj_gap": 2}),
    "tied": Case(tied=True),
    "bf16": Case(precision="bf16"),
    "multipliers": Case(options={"lr_multipliers": {"embedding": 4.0, "vector": 0.25}}),
    "growing": Case(optimizer="muon", options=MUON, growing=True),
    "reweighted": Case(reweighted=True),
    "penalized": Case(penalized=True),
    "class_path": Case(optimizer="torch.optim.Adafactor", options={"d": 2.0}),
    "parametrized": Case(parametrized=("weight_standardization", "spectral_norm")),
    "qk_clip": Case(optimizer="muon", options={**MUON, "qk_clip": QK_CLIP}),
    "capped": Case(optimizer="muon", options=MUON, norm="convex", capped=True),
}
# What reads whole weights after the step is refused under stage 3.
NOT_STAGE_3 = ("qk_clip", "capped", "parametrized")
PENALTIES = [Penalty("soft_orthogonality", 1e-2), Penalty("norm_loss", 1e-1)]
# Accumulating: two micro-batches of a row on each of two processes; whole: one of two rows.
CASES = {
    f"zero{stage}-{name}-{split}": replace(case, stage=stage, micro_batch_size=size)
    for stage in (1, 2, 3)
    for name, case in VARIANTS.items()
    for split, size in {"accumulating": 1, "whole": 2}.items()
    if (split == "accumulating" or name in ("adamw", "muon")) and (stage < 3 or name not in NOT_STAGE_3)
}
CASES["zero2-ngpt-whole"] = Case(stage=2, norm="ngpt", micro_batch_size=2)
CASES["zero3-checkpointed-whole"] = Case(stage=3, checkpointing="full", micro_batch_size=2)


def build(case: Case, processes: Processes) -> tuple[ParallelModel, Update]:
    capped = {"architecture": "lipschitz", "weight_constraint": {"name": "spectral_cap", "max_norm": CAP}}
    config = LlmNormConfig(
        vocab_size=97,
        hidden_size=12,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        norm=case.norm,
        tie_word_embeddings=case.tied,
        **(capped if case.capped else {}),
        **({"weight_parametrization": list(case.parametrized)} if case.parametrized else {}),
    )
    with torch.device("meta"):
        module = LlmNormForCausalLM(config)
    module.set_activation_checkpointing(case.checkpointing)
    strategy = "deepspeed" if case.stage else "none"
    options = ParallelSection(zero_stage=case.stage or None)
    model = parallel_model(module.train(), strategy, processes, case.precision, options)
    model.materialize()
    initialize_weights(module, seed=1)
    project_weights(module)
    optimizer = create_optimizer(case.optimizer, module, lr=1e-2, **case.options)
    model.connect(optimizer)
    return model, Update(model, optimizer, GRAD_CLIP, penalties=PENALTIES if case.penalized else ())


def run(case: Case, update: Update, steps: range) -> list[tuple[float, float, int]]:
    """Loss, norm and tokens of each update."""
    processes, found = update.model.processes, []
    reweighting = LossReweightingSection(strategy="extremes", warmup_steps=0) if case.reweighted else None
    for step in steps:
        batches = micro_batches(step, case.micro_batch_size, processes.rank, processes.world_size)
        if case.growing and step < STEPS // 2:
            batches = batches[: 2 // (case.micro_batch_size * processes.world_size)]
        found.append(tuple(update.measure(batches, reweighting=reweighting)[:3]))
        update.apply(1.0 - 0.1 * step)
    return found


def whole_weights(model: ParallelModel) -> dict[str, torch.Tensor]:
    """Every weight on every process, as the fp32 partitions have it, and as a forward pass sees it."""
    named = dict(model.module.named_parameters())
    if not hasattr(model, "partitions"):
        return {name: p.detach().clone() for name, p in named.items()}
    masters = {n: model.partitions.gather(p, model.partitions.parts[p].flat) for n, p in named.items()}
    if model.stage < 3:
        assert all(torch.equal(masters[name], p.detach()) for name, p in named.items())
    return masters


def compute(case: Case, processes: Processes) -> dict[str, Any]:
    model, update = build(case, processes)
    measured = run(case, update, range(STEPS))
    result = {"measured": measured, "weights": whole_weights(model)}
    destroy(model)
    return result


def destroy(model: ParallelModel) -> None:
    if hasattr(model, "_engine"):
        model._engine.destroy()


def save(update: Update, folder: Path) -> Path:
    model = update.model
    tensors, state = model.tensors(update.optimizer)
    store = CheckpointStore(folder, asynchronous=False)
    return store.save(SAVED, tensors, {"optimizer": state})


def resume(case: Case, checkpoint: Path, processes: Processes) -> dict[str, Any]:
    """The rest of a run from a checkpoint, in a model and an optimizer of its own."""
    model, update = build(case, processes)
    run(case, update, range(1))  # what the checkpoint replaces
    model.restore(update.optimizer, checkpoint)
    measured = run(case, update, range(SAVED, STEPS))
    result = {"measured": measured, "weights": whole_weights(model)}
    destroy(model)
    return result


def save_and_resume(case: Case, processes: Processes, folder: Path) -> dict[str, Any]:
    """A run with a checkpoint in its middle, and the rest of it again from there."""
    model, update = build(case, processes)
    run(case, update, range(SAVED))
    checkpoint = save(update, folder)
    straight = {"measured": run(case, update, range(SAVED, STEPS)), "weights": whole_weights(model)}
    destroy(model)
    return {"straight": straight, "resumed": resume(case, checkpoint, processes)}


def drop_one(case: Case, processes: Processes) -> dict[str, Any]:
    """Updates 0 and 1, with the gradient of update 2 measured in between and thrown away, as guards do with
    a loss spike, and once more after it has ceased to be finite."""
    model, update = build(case, processes)
    measured = run(case, update, range(1))
    batches = micro_batches(2, case.micro_batch_size, processes.rank, processes.world_size)
    update.measure(batches)
    update.drop()
    with poisoned(model):
        norm = update.measure(batches).grad_norm
    assert norm is not None and not math.isfinite(norm)
    update.drop()
    measured += run(case, update, range(1, 2))
    result = {"measured": measured, "weights": whole_weights(model)}
    destroy(model)
    return result


@contextmanager
def poisoned(model: ParallelModel) -> Iterator[None]:
    """One gradient becomes infinite in the backward pass, on the last process."""
    head = model.module.lm_head.weight
    last = model.processes.rank == model.processes.world_size - 1
    handle = head.register_hook(lambda grad: grad * math.inf if last else grad)
    yield
    handle.remove()


SAVING = [f"zero{stage}-{name}-whole" for stage in (1, 2, 3) for name in ("adamw", "muon")]
DROPPING = [f"zero{stage}-adamw-accumulating" for stage in (1, 2, 3)]


# A slice of the parity table: methods that have owners under ZeRO, one for each kind of state. The grid is in
# test_parity.py; here it shares a group of processes, as each takes seconds to import DeepSpeed.
PARITY_SLICE = {
    strategy: [Run(method, 3) for method in methods]
    for strategy, methods in {
        "zero1": ("adamw8bit", "conda"),
        "zero2": ("lamb", "psgd_kron"),
        "zero3": ("apollo", "lanton"),
    }.items()
}


def work(
    rank: int, world_size: int, port: int, folder: str, cases: list[str], saving: list[str], parity: list[str]
) -> None:
    """Entry of a spawned process: compute the cases and write the results."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    processes, root = start_processes(), Path(folder)
    for name in cases:
        torch.save(compute(CASES[name], processes), root / f"{name}-{rank}.pt")
    for name in saving:
        result = save_and_resume(CASES[name], processes, root / f"checkpoints-{name}")
        if (root / "alone" / name.split("-")[1]).exists():
            alone = root / "alone" / name.split("-")[1] / f"step_{SAVED}"
            result["from_one"] = resume(CASES[name], alone, processes)
        torch.save(result, root / f"{name}-saved-{rank}.pt")
    for name in [name for name in DROPPING if name in cases]:
        torch.save(drop_one(CASES[name], processes), root / f"{name}-dropped-{rank}.pt")
    for strategy in parity:
        found = results(Backend(strategy, world_size), PARITY_SLICE[strategy], processes)
        torch.save(found, root / f"parity-{strategy}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
