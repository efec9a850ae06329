"""The processes of a run: who they are, where they compute, and which strategy their launcher asked for.

Accelerate starts the process group and knows the ranks; everything that changes numbers (precision, clipping,
accumulation, data order) is ours, so a launcher setting that says otherwise is an error and not a preference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from llmnorm.config import ParallelSection, TrainSection
from llmnorm.config.checks import check_sharding_keys
from llmnorm.errors import LostProcess, UserError
from llmnorm.launcher import launcher_store
from llmnorm.training.zero_checks import USE_DEEPSPEED, check_launcher_settings, is_true

# Node 0 may tokenize a large corpus, and rank 0 export a large model, while the others wait at a barrier.
PATIENCE = timedelta(hours=4)
# Collectives give up this long after the watchdog would have said more.
_GRACE = timedelta(minutes=1)


@dataclass(frozen=True)
class Processes:
    """This process among the processes of the run; `patient` is a group whose collectives wait for hours."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes, for hours if need be."""
        if dist.is_initialized():
            dist.barrier(group=self.patient)

    def same(self, text: str) -> str:
        """The main process's text, on every process."""
        texts = [text]
        if self.world_size > 1:
            dist.broadcast_object_list(texts, group=self.patient)
        return texts[0]

    def agree(self, problem: str | None) -> None:
        """Raise the main process's `problem` on every process; those of others do not count."""
        problems = [problem]
        if self.world_size > 1:
            dist.broadcast_object_list(problems, group=self.patient)
        if problems[0] is not None:
            raise UserError(problems[0])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def start_processes(hang_timeout: float | None = None) -> Processes:
    """Join the process group that `torchrun` or `accelerate launch` describes in the environment, if any.

    Under DeepSpeed too the group is torch's own: DeepSpeed takes over one that it finds.
    hang_timeout: seconds after which a collective gives up, and a minute more; None for hours.
    """
    from accelerate import PartialState

    timeout = PATIENCE if hang_timeout is None else timedelta(seconds=hang_timeout) + _GRACE
    options = {"timeout": timeout} if is_launched(os.environ) else {}
    on_cpu = not torch.cuda.is_available() or is_true(os.environ, "ACCELERATE_USE_CPU")
    if options and not on_cpu:
        # Offloaded shards and object broadcasts live on the host, so the group needs a host backend too.
        options["backend"] = "cuda:nccl,cpu:gloo"  # type: ignore[assignment]
    _join_on_one_node(timeout, "gloo" if on_cpu else "cuda:nccl,cpu:gloo")
    with _without(os.environ, USE_DEEPSPEED):
        state = PartialState(cpu=on_cpu, **options)
    patient = None
    if state.num_processes > 1:
        patient = dist.new_group(backend="gloo", timeout=max(PATIENCE, timeout))
    return Processes(
        state.process_index, state.local_process_index, state.num_processes, state.device, patient
    )


def _join_on_one_node(timeout: timedelta, backend: str) -> None:
    """Start the group under keys of this attempt, where the launcher may restart processes on one node.

    torchrun lends its rendezvous store to the processes and keeps it over restarts, keys included, so that a
    restarted process can read the address of one that was killed: it is refused, or waits for ever. On
    several nodes the attempts are counted apart, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is what helps.
    """
    world_size, on_node = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world_size == 1 or on_node != world_size or dist.is_initialized():
        return
    store = launcher_store("group", timeout.total_seconds())
    if store is not None:
        rank = int(os.environ["RANK"])
        if "nccl" in backend:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def lost_process(error: RuntimeError, where: str) -> LostProcess | None:
    """The error for a collective that failed because another process is gone or silent; None for others.

    NCCL and the store raise `DistError`; gloo raises a plain RuntimeError that names its source file.
    """
    if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
        return None
    reason = str(error).strip().splitlines()[0]
    return LostProcess(
        f"rank {os.environ.get('RANK', '0')}, {where}: another process of this run has died or does not "
        f"answer ({reason}), so this one ends too; the launcher's report names the one that failed first. "
        "Start the same command again to go on from the newest checkpoint; torchrun --max-restarts N does "
        "so by itself"
    )


@contextmanager
def _without(environment: MutableMapping[str, str], variable: str) -> Iterator[None]:
    value = environment.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            environment[variable] = value


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher described a process group (of one process or more)."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def resolve_strategy(
    parallel: ParallelSection, train: TrainSection, environment: Mapping[str, str] = os.environ
) -> str:
    """`none`, `ddp`, `fsdp2` or `deepspeed`: what the config asks for, or with `auto` the launcher.

    Raises `UserError` when an explicit strategy, or a setting in Accelerate's own configuration file,
    contradicts the launcher or this run's config.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    asked = _launcher_strategy(environment)
    _refuse_contradictions(parallel, train, environment)
    if parallel.strategy == "auto":
        found = asked or ("ddp" if world_size > 1 else "none")
        if found != "none" or parallel.zero_stage is not None:  # one process may go on for several
            check_sharding_keys(parallel, found)
        return found
    if asked is not None and parallel.strategy != asked:
        raise UserError(
            f"parallel.strategy={parallel.strategy} contradicts the launcher, whose configuration asks for "
            f"{asked}; set parallel.strategy to auto or {asked}, or launch with another --config_file"
        )
    if parallel.strategy == "none" and world_size > 1:
        raise UserError(
            f"parallel.strategy=none contradicts the launcher, which started {world_size} processes; set it "
            "to auto, ddp, fsdp2 or deepspeed, or start one process"
        )
    if parallel.strategy != "none" and not is_launched(environment):
        raise UserError(
            f"parallel.strategy={parallel.strategy} needs a process group, and this process was started "
            "without a launcher; start it with `torchrun --nproc_per_node N train.py ...`, or set "
            "parallel.strategy to auto"
        )
    return parallel.strategy


def _launcher_strategy(environment: Mapping[str, str]) -> str | None:
    if is_true(environment, USE_DEEPSPEED):
        return "deepspeed"
    if not is_true(environment, "ACCELERATE_USE_FSDP"):
        return None
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"the launcher asks for FSDP version {version}, which hides whole matrices from the optimizer; "
            "set fsdp_version: 2 in Accelerate's configuration file"
        )
    return "fsdp2"


def _refuse_contradictions(
    parallel: ParallelSection, train: TrainSection, environment: Mapping[str, str]
) -> None:
    """Accelerate's file only sets environment variables; one that we would silently ignore is refused."""
    precision = "bf16" if train.precision.startswith("bf16") else train.precision
    ours: list[tuple[str, str, str, str]] = [
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision", "train.precision", precision)
    ]
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        ours += [
            (
                "FSDP_OFFLOAD_PARAMS",
                "fsdp_offload_params",
                "parallel.cpu_offload",
                str(parallel.cpu_offload).lower(),
            ),
            (
                "FSDP_RESHARD_AFTER_FORWARD",
                "fsdp_reshard_after_forward",
                "parallel.reshard_after_forward",
                str(parallel.reshard_after_forward).lower(),
            ),
        ]
    if is_true(environment, USE_DEEPSPEED):
        check_launcher_settings(train, environment)
    for variable, their_key, our_key, value in ours:
        theirs = environment.get(variable, "no")
        if theirs != "no" and theirs.lower() != value.lower():
            raise UserError(
                f"{their_key}: {theirs} in the launcher's configuration contradicts {our_key}={value}; "
                f"remove it there or change {our_key}"
            )
