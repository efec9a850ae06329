"""What each process of the two-process tests runs; a module of its own, so that they can import it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmnorm.config import GuardSection, LossReweightingSection, ParallelSection
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import Penalty, create_optimizer, project_weights, qk_clip_of
from llmnorm.training.guards import Guards, Verdict
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.processes import Processes, start_processes
from llmnorm.training.update import IGNORED, Update

VOCABULARY, LENGTH, ROWS, STEPS, GRAD_CLIP = 96, 12, 4, 3, 0.5
CAP = 0.5
SPECTRAL = ("weight_standardization", "sigma_reparam")
ROW_WISE = ("weight_norm",)
PENALTIES = [Penalty("soft_orthogonality", 0.01), Penalty("gor", 0.01, {"groups": 2})]


@dataclass(frozen=True)
class Case:
    """One way to compute the same updates."""

    strategy: str = "none"
    micro_batch_size: int = ROWS
    precision: str = "fp32"
    tied: bool = False
    norm: str = "mix_ln"
    recentered: bool = False
    checkpointing: str = "none"
    gradient_dtype: str = "fp32"
    qk_clip: float | None = None  # with Muon instead of AdamW
    capped: str | None = None  # the Lipschitz architecture under this weight constraint; soft with Muon
    strategy_of_weights: str | None = None
    penalized: bool = False
    parametrized: tuple[str, ...] = ()
    kept: bool = False  # Frobenius norms
    variance: bool = False


CASES = {
    f"{strategy}-{name}": replace(case, strategy=strategy)
    for strategy in ("ddp", "fsdp2")
    for name, case in {
        "accumulating": Case(micro_batch_size=1),
        "whole": Case(micro_batch_size=2),
        "bf16": Case(micro_batch_size=1, precision="bf16"),
        "bf16_pure": Case(micro_batch_size=1, precision="bf16_pure"),
        "tied": Case(micro_batch_size=1, tied=True),
        "compressed": Case(micro_batch_size=1, norm="pre_crmsnorm"),
        "constrained": Case(micro_batch_size=2, norm="ngpt"),
        "capped": Case(micro_batch_size=2, norm="convex", capped="spectral_cap"),
        "soft_capped": Case(micro_batch_size=1, norm="convex", capped="spectral_soft_cap"),
        "penalized": Case(micro_batch_size=2, penalized=True),
        "spectral": Case(micro_batch_size=1, norm="pre_rmsnorm", parametrized=SPECTRAL),
        "kept": Case(micro_batch_size=1, kept=True),
        "rows": Case(micro_batch_size=2, norm="pre_rmsnorm", parametrized=ROW_WISE),
        "recentered": Case(micro_batch_size=1, norm="pre_rmsnorm", recentered=True),
        "full": Case(micro_batch_size=1, checkpointing="full"),
        "selective": Case(micro_batch_size=1, checkpointing="selective", precision="bf16"),
        "bf16_sums": Case(micro_batch_size=2, gradient_dtype="bf16"),
        "qk_clip": Case(micro_batch_size=1, qk_clip=0.01),
        "reweighted": Case(micro_batch_size=1, strategy_of_weights="extremes"),
    }.items()
}
CASES["ddp-reweighted_whole"] = Case("ddp", micro_batch_size=2, strategy_of_weights="extremes")
POISONED = ("ddp-poisoned", "fsdp2-poisoned")
CASES["ddp-variance"] = Case("ddp", micro_batch_size=1, variance=True)


def rows_of_step(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels [ROWS, LENGTH] of one update; rows differ in their number of valid targets."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row, valid in enumerate((LENGTH, 1, 7, 3)):
        labels[row, valid:] = IGNORED
    return tokens[:, :-1], labels


def micro_batches(step: int, size: int, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batch m of rank r holds rows (m * world + r) * size + [0, size), as the loader deals them."""
    inputs, labels = rows_of_step(step)
    batches = []
    for index in range(ROWS // (size * world_size)):
        first = (index * world_size + rank) * size
        rows = slice(first, first + size)
        batches.append({"input_ids": inputs[rows], "labels": labels[rows]})
    return batches


def build(case: Case, processes: Processes) -> ParallelModel:
    constraint = {"name": case.capped, "max_norm": CAP}
    kept = {"weight_constraint": {"name": "normalize_and_project"}} if case.kept else {}
    config = LlmNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        norm=case.norm,
        norm_options={"recentered": True} if case.recentered else {},
        tie_word_embeddings=case.tied,
        weight_parametrization=[*case.parametrized] or None,
        **kept,
        **({"architecture": "lipschitz", "weight_constraint": constraint} if case.capped else {}),
    )
    with torch.device("meta"):
        module = LlmNormForCausalLM(config)
    if case.precision == "bf16_pure":
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    module.set_activation_checkpointing(case.checkpointing)
    section = ParallelSection(gradient_dtype=case.gradient_dtype)
    model = ParallelModel(module.train(), case.strategy, processes, case.precision, section)
    model.materialize()
    initialize_weights(module, seed=1)
    if case.capped or case.parametrized or case.kept:
        project_weights(module)  # caps: initial norms are 1
    model.connect()
    return model


def compute(case: Case, processes: Processes) -> dict[str, Any]:
    """STEPS updates: loss, norm and tokens of each; of the last the clipped gradients, weights, messages."""
    model = build(case, processes)
    if case.qk_clip is None and case.capped != "spectral_soft_cap":
        optimizer = create_optimizer("adamw", model.module, lr=1e-2)
    else:
        options: dict[str, Any] = {"ns_dtype": "fp32"}
        if case.qk_clip is not None:
            options["qk_clip"] = case.qk_clip
        optimizer = create_optimizer("muon", model.module, lr=1e-2, **options)
    update = Update(model, optimizer, GRAD_CLIP, penalties=PENALTIES if case.penalized else ())
    measured, gradients = [], {}
    asked: dict[str, Any] = {"variance": case.variance}
    if case.strategy_of_weights:
        asked["reweighting"] = LossReweightingSection(strategy=case.strategy_of_weights, warmup_steps=0)
    noise: list[float | None] = []
    for step in range(STEPS):
        batches = micro_batches(step, case.micro_batch_size, processes.rank, processes.world_size)
        with SumsStarted() as sums:
            found = update.measure(batches, **asked)
        measured.append(found[:3])
        noise += [found.gradient_variance, found.weight_entropy]
        gradients = {name: whole(p.grad).clone() for name, p in model.module.named_parameters()}
        update.apply(1.0)
    weights = {name: whole(p.detach()).clone() for name, p in model.module.named_parameters()}
    clip = qk_clip_of(optimizer)
    return {
        "measured": measured,
        "noise": noise,
        "gradients": gradients,
        "weights": weights,
        "sums": sums.counts,
        "max_logits": clip.largest if clip else None,
    }


def poison(strategy: str, processes: Processes) -> dict[str, Any]:
    """One update of Fira, then one whose gradient, not its loss, is infinite on process 1 alone."""
    model = build(Case(strategy, micro_batch_size=2), processes)
    optimizer = create_optimizer("fira", model.module, lr=1e-2, rank=4)
    update = Update(model, optimizer, GRAD_CLIP)
    update.measure(micro_batches(0, 2, processes.rank, processes.world_size))
    update.apply(1.0)
    before = _held(model, optimizer)
    plain = update._loss
    if processes.rank == 1:

        def steep(*given: Any) -> torch.Tensor:
            loss = plain(*given)
            return loss + (loss - loss.detach()).sqrt()  # adds 0, with an infinite slope

        update._loss = steep  # type: ignore[method-assign]
    found = update.measure(micro_batches(1, 2, processes.rank, processes.world_size))
    verdict = Guards(GuardSection()).judge(2, found.loss, found.grad_norm, range(ROWS))
    update.drop()
    after = _held(model, optimizer)
    return {
        "loss": found.loss,
        "norm": found.grad_norm,
        "skipped": verdict is Verdict.SKIP,
        "states": len(before),
        "changed": [key for key in after if key not in before or not torch.equal(before[key], after[key])],
    }


def _held(model: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of this process's weights and optimizer state."""
    tensors = {}
    for name, parameter in model.module.named_parameters():
        tensors[name] = parameter
        tensors |= {f"{name} {key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    local = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in tensors.items()}
    return {key: value.detach().clone() for key, value in local.items()}


class SumsStarted(TorchDispatchMode):
    """Counts the sums over processes that are started in its context, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.name()
        if name.startswith("c10d::") and "reduce" in name:
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def work(rank: int, world_size: int, port: int, folder: str) -> None:
    """Entry of a spawned process: compute every case, and let rank 0 write the results."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    processes = start_processes()
    for name, case in CASES.items():
        result = compute(case, processes)
        torch.save(result, Path(folder) / f"{name}-{rank}.pt")
    for name in POISONED:
        torch.save(poison(name.partition("-")[0], processes), Path(folder) / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
