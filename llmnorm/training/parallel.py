"""One model, several processes: DDP and FSDP2, with gradients that are sums and never means.

The loss of a micro-batch is already divided by the global number of valid tokens, so the gradient of the
step is the plain sum over micro-batches and processes. Both backends are told to sum; neither divides by the
process count.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`) each block is one unit and matrices are sharded by rows.
Parameters of role `vector` (norm gains, biases, scalar gates) stay whole on every process: their sizes are
negligible, a scalar cannot be sharded, and they keep computing in fp32 under the bf16 policy exactly as they
do under autocast. Their gradients are summed once per step in one message. With `parallel.replicas` the mesh
has two dimensions (HSDP): rows are cut within a replica, and gradients summed over replicas as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from llmnorm.checkpoint import model_tensors, optimizer_tensors, read_tensors, restore_optimizer
from llmnorm.checkpoint.ranks import Ranks
from llmnorm.config import ParallelSection
from llmnorm.errors import UserError
from llmnorm.optim import Penalty, Role, add_penalties, project_weights, route_parameters
from llmnorm.optim.matrix import RowLayout
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.training.processes import Processes

# Rotary tables are computed, never trained. torch 2.13 renamed the key that keeps DDP from broadcasting them.
_SYNC_BUFFERS = next(
    key
    for key in ("forward_sync_buffers", "broadcast_buffers")
    if key in inspect.signature(DistributedDataParallel).parameters
)
GRADIENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ParallelModel:
    """The model, and how its processes share forward, backward and gradients.

    `module` is the bare model whose parameters the optimizer and the checkpoints see (DTensors under FSDP2);
    calling this object runs the forward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        strategy: str,
        processes: Processes,
        precision: str,
        options: ParallelSection,
    ) -> None:
        self.module = module
        self.strategy = strategy
        self.processes = processes
        self.precision = precision
        self.options = options
        self.gradient_dtype = GRADIENT_DTYPES[options.gradient_dtype]
        self._forward: nn.Module = module
        if strategy == "fsdp2":
            self._shard()

    def _shard(self) -> None:
        """Apply FSDP2 in place; on a meta-device model, `materialize` then allocates the shards."""
        check_shards(self.options, self.processes)
        mesh = self._mesh()
        whole = {routed.parameter for routed in route_parameters(self.module) if routed.role is Role.VECTOR}
        # Blocks gather bf16 weights. The root (embedding, head) gathers fp32, so that the residual stream has
        # the dtype it has under plain autocast; inputs are never cast, for the same reason.
        block_dtype = torch.bfloat16 if self.precision == "bf16" else None
        offload = CPUOffloadPolicy() if self.options.cpu_offload else OffloadPolicy()
        for unit, dtype in (*((block, block_dtype) for block in self._blocks()), (self.module, None)):
            policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=self.gradient_dtype, cast_forward_inputs=False
            )
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=self.options.reshard_after_forward
                if unit is not self.module
                else False,
                mp_policy=policy,
                offload_policy=offload,
                ignored_params=whole,
            )
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    def _mesh(self) -> DeviceMesh:
        """Processes that cut the model among them are neighbors: one node can hold a replica (HSDP)."""
        replicas, world = self.options.replicas, self.processes.world_size
        shape = (world,) if replicas == 1 else (replicas, world // replicas)
        names = ("replicate", "shard")[-len(shape) :]
        return init_device_mesh(self.processes.device.type, shape, mesh_dim_names=names)

    def _blocks(self) -> Iterable[nn.Module]:
        return self.module.model.layers  # type: ignore[union-attr, return-value]

    @property
    def label(self) -> str:
        """The strategy, as a person reads it."""
        return self.strategy

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass gathers weights, so that all processes must make it together."""
        return self.strategy == "fsdp2"

    def materialize(self) -> None:
        """Give a meta-device model memory; the values are undefined until they are drawn or loaded."""
        device = self.processes.device
        if not (self.strategy == "fsdp2" and self.options.cpu_offload):
            self.module.to_empty(device=device)
            return
        self.module.to_empty(device=torch.device("cpu"))
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(device)

    def connect(self, optimizer: Optimizer | None = None) -> None:
        """Join the processes' gradients; call once the weights have memory and the optimizer is built, which
        has no state yet: under DDP it learns here to share whole-matrix updates."""
        if self.strategy != "ddp":
            return
        if self.options.share_updates and isinstance(optimizer, MatrixOptimizer):
            optimizer.share_whole_matrices(dist.group.WORLD)
        device = self.processes.device
        options: dict[str, Any] = {_SYNC_BUFFERS: False, "gradient_as_bucket_view": True}
        if device.type == "cuda":
            options["device_ids"] = [device]
        wrapped = DistributedDataParallel(self.module, **options)
        wrapped.register_comm_hook(self.gradient_dtype, sum_gradients)
        self._forward = wrapped

    def __call__(self, **batch: Any) -> Any:
        return self._forward(**batch)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients cross processes with the `last` only."""
        skip_sync: AbstractContextManager[Any] = nullcontext()
        if isinstance(self._forward, DistributedDataParallel) and not last:
            skip_sync = self._forward.no_sync()
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        with skip_sync:
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's loss."""
        loss.backward()

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast for `train.precision: bf16`; nothing for the others."""
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def sum_whole_gradients(self) -> None:
        """Under FSDP2, sum the gradients of the parameters that are not sharded, in one message."""
        if self.strategy != "fsdp2":
            return
        gradients = [gradient for gradient in self._gradients() if not isinstance(gradient, DTensor)]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten().to(self.gradient_dtype) for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def add_penalties(self, penalties: Sequence[Penalty]) -> None:
        """Add the gradients of `penalties` to those of the loss, once these are summed."""
        add_penalties(self.module, penalties)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float | None) -> torch.Tensor:
        """Scale all gradients by min(1, max_norm / ||g||) and return the global norm ||g|| before scaling.

        ||g|| is the 2-norm over every gradient of every process's shards: an fp32 scalar on this device.
        """
        norm = gradient_norm(self._gradients(), self.processes)
        if max_norm is not None:
            factor = clip_factor(norm, max_norm)
            for group in _by_device_and_dtype(self._gradients()):
                torch._foreach_mul_(group, factor.to(group[0].device))
        return norm

    def gradient_part(self, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, bool] | None:
        """What this process holds of a summed gradient, and whether others hold the rest."""
        if parameter.grad is None:
            return None
        return _local(parameter.grad), isinstance(parameter, DTensor)

    def step(self, optimizer: Optimizer) -> None:
        """Move the weights once, by the gradients that `clip_gradients` left."""
        optimizer.step()

    def project(self, optimizer: Optimizer) -> None:
        """Make the weights obey what their modules ask for (`optim/constraints.py`)."""
        project_weights(self.module, optimizer)

    def drop_gradients(self, optimizer: Optimizer) -> None:
        """Forget the gradients, whether or not they were used."""
        optimizer.zero_grad(set_to_none=True)

    def tensors(
        self, optimizer: Optimizer, ranks: Ranks | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint holds of weights and optimizer: tensors by name, and the optimizer's JSON, for
        which processes that keep other state than others exchange it over `ranks`."""
        tensors, state = optimizer_tensors(self.module, optimizer, ranks)
        return {**tensors, **model_tensors(self.module)}, state

    def restore(self, optimizer: Optimizer, checkpoint: Path) -> None:
        """Take weights and optimizer state over from a checkpoint, which any processes may have saved."""
        read_tensors(checkpoint, model_tensors(self.module))
        restore_optimizer(self.module, optimizer, checkpoint)

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]


def check_shards(options: ParallelSection, processes: Processes) -> None:
    """Raise `UserError` for replicas and offloading that FSDP2 on these processes cannot have."""
    replicas, world = options.replicas, processes.world_size
    if options.cpu_offload and processes.device.type == "cpu":
        raise UserError(
            "parallel.cpu_offload=true has no GPU to offload from on this machine; remove it, or train "
            "where there is one"
        )
    if world % replicas:
        raise UserError(
            f"parallel.replicas={replicas} does not divide the {world} processes; set it to a divisor of "
            f"{world}, such as the number of nodes, or start another number of processes"
        )


def sum_gradients(dtype, bucket):  # unannotated: DDP refuses annotations that are strings
    """DDP communication hook: sum a bucket over processes in `dtype`, without DDP's division."""
    buffer = bucket.buffer()
    message = buffer.to(dtype)
    future = dist.all_reduce(message, async_op=True).get_future()

    def finish(reduced: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        total = reduced.value()[0]
        return total if total.dtype == buffer.dtype else buffer.copy_(total)

    return future.then(finish)


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / ||g||): fp32."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def gradient_norm(gradients: list[torch.Tensor], processes: Processes) -> torch.Tensor:
    """||g||_2 over all gradients: shards (DTensors) count over all processes, whole tensors once."""
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    shards: list[torch.Tensor] = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norm = _local_norm(whole, processes.device)
    if not shards:
        return norm
    squares = _local_norm(shards, processes.device).square()
    layout = RowLayout.of(shards[0])
    assert layout is not None
    dist.all_reduce(squares, group=layout.group)  # not over replicas, which hold the same shards
    return (squares + norm.square()).sqrt()


def _local_norm(gradients: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    norms = [norm.to(device) for group in _by_device_and_dtype(gradients) for norm in tensor_norms(group)]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)


def tensor_norms(tensors: list[torch.Tensor]) -> Iterable[torch.Tensor]:
    """The 2-norm of each of some local tensors of one device, accumulated in fp32."""
    if tensors[0].device.type != "cpu":
        return torch._foreach_norm(tensors, 2.0, dtype=torch.float32)
    # On a CPU torch adds all squares into one fp32 sum, which is 8e-5 off for 4 million elements, enough to
    # tell one shard from two. Norms of rows, and the norm of those, are right to 1e-7 and as fast.
    rows = (torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32) for tensor in tensors)
    return [torch.linalg.vector_norm(row) for row in rows]


def _by_device_and_dtype(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Local tensors, grouped so that one for-each kernel can take each group."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for gradient in gradients:
        local = _local(gradient)
        groups.setdefault((local.device, local.dtype), []).append(local)
    return list(groups.values())


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
