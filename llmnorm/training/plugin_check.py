"""`llmnorm check my_norm.py[:MyNorm]`: what a norm or an optimizer must do before a run relies on it.

Each check runs on a model of two layers and width 32, on the CPU, and says pass, or FAIL with the reason, or
refused where training itself would refuse:

    dtype          a bf16 stream goes through the norm, and gradients come back, in bf16 and finite
    causality      no logit changes when a later token does, exactly, in training mode and in evaluation mode
    export         the exported folder computes the same by its own code, and loads again as a model of ours
    resume         two updates, a checkpoint and two more are, to the last bit, four updates
    ddp, fsdp2     two processes with half of the batch each make the updates of one process with all of it
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from llmnorm.checkpoint import (
    CheckpointStore,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    restore_optimizer,
)
from llmnorm.config import ParallelSection
from llmnorm.errors import UserError
from llmnorm.export import export_checkpoint, load_model
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import create_optimizer
from llmnorm.plugins import load_plugin, plugin_module
from llmnorm.training.parallel import ParallelModel
from llmnorm.training.processes import Processes, start_processes
from llmnorm.training.update import Update

VOCABULARY, LENGTH, ROWS, UPDATES = 96, 12, 4, 3
# Of an update's length. Sums in another order leave 1e-6 of it; half of a batch seen alone, a tenth or more.
PARITY = 1e-3
ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@dataclass(frozen=True)
class Part:
    """A class of a plugin file, and the options to construct it with."""

    file: str
    name: str
    is_norm: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> LlmNormForCausalLM:
        """The tiny model on the meta device, with this norm or the default one."""
        keys: dict[str, Any] = {
            "norm": f"{Path(self.file).name}:{self.name}",
            "norm_options": dict(self.options),
        }
        with torch.device("meta"):
            return LlmNormForCausalLM(
                LlmNormConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=32,
                    intermediate_size=48,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=64,
                    **(keys if self.is_norm else {}),
                )
            )

    def drawn(self, seed: int = 1) -> LlmNormForCausalLM:
        """The model on the CPU with weights from a seed, its gains and shifts off their initial values."""
        model = self.model().to_empty(device="cpu")
        initialize_weights(model, seed)
        perturb(model)
        return model.train()

    def optimizer(self, model: nn.Module) -> Optimizer:
        if self.is_norm:
            return create_optimizer("adamw", model, lr=1e-2)
        return create_optimizer(f"{Path(self.file).stem}.{self.name}", model, lr=1e-2, **self.options)


class Outcome(NamedTuple):
    """One line of the table: `result` is pass, FAIL or refused."""

    part: str
    check: str
    result: str
    reason: str = ""


class Failed(Exception):
    """A check did not hold; its text is the reason."""


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move gains and shifts, which all start alike, so that a lost or swapped one shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1 and not isinstance(parameter, DTensor):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def check_plugin(target: str, options: Mapping[str, Any] | None = None) -> list[Outcome]:
    """Run every check on `FILE.py[:Class]`; without a class, on each norm and optimizer of the file.

    Raises UserError for a file that cannot be a plugin, a class it has not, or options that do not fit.
    """
    outcomes = []
    for part in parts_of(target, options or {}):
        for name, check in (NORM_CHECKS if part.is_norm else OPTIMIZER_CHECKS).items():
            outcomes.append(_run(part, name, check))
        outcomes += check_pairs(part)
    return outcomes


def parts_of(target: str, options: Mapping[str, Any]) -> list[Part]:
    """The classes to check, constructed once so that a mistake in the options is a UserError."""
    file, _, wanted = target.partition(":")
    module = plugin_module(load_plugin(Path(file).expanduser(), "check"))
    own = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and issubclass(value, (nn.Module, Optimizer))
    }
    if wanted and wanted not in own:
        raise UserError(f"check: {file} has no norm or optimizer {wanted}; it has {', '.join(own) or 'none'}")
    if not own:
        raise UserError(f"check: {file} has neither an nn.Module nor a torch.optim.Optimizer class to check")
    names = [wanted] if wanted else list(own)
    parts = [Part(file, name, issubclass(own[name], nn.Module), options) for name in names]
    for part in parts:
        try:
            part.optimizer(part.drawn())
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"check: {part.name} cannot be constructed: {error}") from error
    return parts


def _run(part: Part, name: str, check: Callable[[Part], None]) -> Outcome:
    try:
        check(part)
    except UserError as error:
        return Outcome(part.name, name, "refused", str(error))
    except Failed as error:
        return Outcome(part.name, name, "FAIL", str(error))
    except Exception as error:  # a class of the user's may raise anything
        return Outcome(part.name, name, "FAIL", f"{type(error).__name__}: {error}".splitlines()[0])
    return Outcome(part.name, name, "pass")


def format_outcomes(outcomes: list[Outcome]) -> str:
    """The table that the command prints."""
    width = max(len(outcome.part) for outcome in outcomes)
    return "\n".join(
        f"{outcome.part:<{width}}  {outcome.check:<10} {outcome.result:<8} {outcome.reason}".rstrip()
        for outcome in outcomes
    )


def tokens(seed: int) -> Tensor:
    """[ROWS, LENGTH] token ids of one update."""
    return torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def check_dtype(part: Part) -> None:
    model = part.drawn().bfloat16()
    norm: Any = next(m for m in model.modules() if type(m).__name__ == part.name)
    x = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = norm(x)
    if y.dtype != x.dtype or y.shape != x.shape:
        raise Failed(f"x {tuple(x.shape)} {x.dtype} becomes {tuple(y.shape)} {y.dtype}; return y.to(x.dtype)")
    y.float().square().sum().backward()
    for name, tensor in (("the output", y), ("the gradient of x", x.grad)):
        if tensor is None or not bool(tensor.isfinite().all()):
            raise Failed(f"{name} is not finite for a bf16 input")


@torch.no_grad()
def check_causality(part: Part) -> None:
    """Exactly: with equal shapes a CPU does the same operations on the tokens that did not change."""
    model = part.drawn()
    for training in (True, False):
        model.train(training)
        expected = model(tokens(0), use_cache=False).logits
        for position in range(1, LENGTH):
            changed = tokens(0)
            changed[:, position:] = (changed[:, position:] + 1) % VOCABULARY
            logits = model(changed, use_cache=False).logits
            difference = float((logits[:, :position] - expected[:, :position]).abs().max())
            if difference:
                mode = "training" if training else "evaluation"
                raise Failed(
                    f"in {mode} mode the logits before position {position} change by {difference:.1e} when "
                    "the tokens from there on do: the norm looks at later tokens"
                )


def check_export(part: Part) -> None:
    model = part.drawn().eval()
    with tempfile.TemporaryDirectory() as folder:
        exported = export_checkpoint(model, Path(folder) / "export")
        again = load_model(exported)
    with torch.no_grad():
        if not torch.equal(again(tokens(0)).logits, model(tokens(0)).logits):
            raise Failed("the exported model computes other logits when it is loaded again")


def check_resume(part: Part) -> None:
    whole, optimizer = part.drawn(), None
    optimizer = part.optimizer(whole)
    with tempfile.TemporaryDirectory() as folder:
        _updates(whole, optimizer, range(2))
        tensors, state = optimizer_tensors(whole, optimizer)
        store = CheckpointStore(Path(folder), asynchronous=False)
        checkpoint = store.save(2, tensors | model_tensors(whole), {"optimizer": state}, {})
        _updates(whole, optimizer, range(2, 4))
        resumed = part.drawn(seed=2)
        optimizer = part.optimizer(resumed)
        read_tensors(checkpoint, model_tensors(resumed))
        restore_optimizer(resumed, optimizer, checkpoint)
    _updates(resumed, optimizer, range(2, 4))
    for (name, tensor), its in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        if not torch.equal(tensor, its):
            raise Failed(f"{name} differs after two resumed updates: something that moves it was not saved")


def _updates(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
    for seed in seeds:
        model(tokens(seed), labels=tokens(seed), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def check_pairs(part: Part) -> list[Outcome]:
    """Whether two processes make the updates of one, under each strategy."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_process, args=(2, _free_port(), folder, part), nprocs=2)
            results = {name: torch.load(Path(folder) / f"{name}.pt", weights_only=True) for name in PAIRS}
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        return [Outcome(part.name, name, "FAIL", reason) for name in PAIRS]
    return [_run(part, name, partial(_compare, result)) for name, result in results.items()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _compare(pair: dict[str, Tensor] | str, part: Part) -> None:
    """Whether the weights of two processes, or their refusal, are those of one."""
    if isinstance(pair, str):
        raise UserError(pair)
    before = {name: tensor.detach().clone() for name, tensor in part.drawn().named_parameters()}
    for name, tensor in updated(part, "none", ALONE).items():
        update = float((tensor - before[name]).norm())
        difference = float((pair[name] - tensor).norm())
        if not difference <= PARITY * update + 1e-7:
            raise Failed(
                f"{name}: the updates differ by {difference / max(update, 1e-12):.1e} of their length "
                f"(allowed: {PARITY:.0e}), so they depend on which rows of a batch, or of a matrix, are at "
                "hand"
            )


def _process(rank: int, world_size: int, port: int, folder: str, part: Part) -> None:
    """Entry of a spawned process; rank 0 leaves the weights, or the text of a refusal, in the folder."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    processes = start_processes()
    load_plugin(Path(part.file).expanduser(), "check")
    for strategy in PAIRS:
        result: dict[str, Tensor] | str
        try:
            result = updated(part, strategy, processes)
        except UserError as error:
            result = str(error)
        if rank == 0:
            torch.save(result, Path(folder) / f"{strategy}.pt")
    dist.barrier()
    dist.destroy_process_group()


def updated(part: Part, strategy: str, processes: Processes) -> dict[str, Tensor]:
    """The whole weights after UPDATES, each process with its rows of the batch."""
    model = ParallelModel(part.model().train(), strategy, processes, "fp32", ParallelSection.defaults())
    model.materialize()
    initialize_weights(model.module, 1)  # type: ignore[arg-type]
    perturb(model.module)
    model.connect()
    optimizer = part.optimizer(model.module)
    update = Update(model, optimizer, grad_clip=None)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    size = ROWS // processes.world_size
    rows = slice(processes.rank * size, (processes.rank + 1) * size)
    for seed in range(UPDATES):
        inputs = tokens(seed)[rows]
        update.measure([{"input_ids": inputs[:, :-1], "labels": inputs[:, 1:]}])
        update.apply(1.0)
    return {name: _whole(tensor.detach()).clone() for name, tensor in model.module.named_parameters()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


PAIRS = ("ddp", "fsdp2")
NORM_CHECKS: dict[str, Callable[[Part], None]] = {
    "dtype": check_dtype,
    "causality": check_causality,
    "export": check_export,
    "resume": check_resume,
}
OPTIMIZER_CHECKS: dict[str, Callable[[Part], None]] = {"resume": check_resume}
