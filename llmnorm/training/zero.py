"""One model under DeepSpeed's ZeRO: stage 1 shards optimizer state, 2 gradients as well, 3 weights too.

DeepSpeed partitions, reduces and gathers; everything that changes numbers stays ours. The engine knows
neither schedule nor clipping nor accumulation: the loss of a micro-batch is already divided by the global
number of valid tokens, DeepSpeed's mean over processes is made the sum that it must be, and the engine is
told with which micro-batch an update ends. Parameters are fp32, and `train.precision: bf16` is the same
autocast as everywhere (ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv
1910.02054).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmnorm.checkpoint.ranks import Ranks
from llmnorm.config import ParallelSection
from llmnorm.optim import Penalty, Role, constrained_modules, project_weights, route_parameters
from llmnorm.optim.custom import require_separable
from llmnorm.optim.owners import assign_owners
from llmnorm.optim.weight_penalties import penalty_gradient
from llmnorm.training.parallel import ParallelModel, clip_factor, tensor_norms
from llmnorm.training.processes import Processes
from llmnorm.training.zero_checks import check_module, resolve_zero_stage
from llmnorm.training.zero_partitions import Partitions
from llmnorm.training.zero_state import restore_zero, zero_tensors
from llmnorm.training.zero_step import PartitionStep, WholeMatrixStep


def parallel_model(
    module: nn.Module, strategy: str, processes: Processes, precision: str, options: ParallelSection
) -> ParallelModel:
    """The model under the run's strategy, as `resolve_strategy` found it."""
    if strategy != "deepspeed":
        return ParallelModel(module, strategy, processes, precision, options)
    return ZeroModel(module, resolve_zero_stage(options), processes, precision, options)


# Elements of a reduction bucket, which DeepSpeed allocates for every backward pass; its own default is 5e8.
BUCKET = 100_000_000


class ZeroModel(ParallelModel):
    """A `ParallelModel` whose gradients, and under stage 3 weights, are DeepSpeed's partitions.

    Under stages 1 and 2 the module's parameters are whole; under stage 3 they are empty outside a forward or
    backward pass. The optimizer keeps the module's parameters in its groups, whatever DeepSpeed steps on.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: int,
        processes: Processes,
        precision: str,
        options: ParallelSection,
    ) -> None:
        super().__init__(module, "deepspeed", processes, precision, options)
        assert precision != "bf16_pure", "refused before"
        check_module(module, stage)
        self.stage = stage
        self._pending = False
        self._factor: Tensor | None = None

    @property
    def label(self) -> str:
        return f"deepspeed ZeRO-{self.stage}"

    @property
    def forward_is_collective(self) -> bool:
        return self.stage == 3

    def connect(self, optimizer: Optimizer | None = None) -> None:
        """Build the engine around the module, which has memory, and the optimizer over its parameters."""
        assert optimizer is not None
        require_separable(optimizer)
        deepspeed = _import_deepspeed(self.processes)
        routed = route_parameters(self.module)
        # Roles go by shapes, which stage 3 takes away.
        self._hidden_matrices = [one.parameter for one in routed if one.role is Role.HIDDEN_MATRIX]
        self._asked = optimizer
        self._client = PartitionStep(optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=_Forward(self.module, super().autocast),
            optimizer=self._client,
            config=self._settings([one.parameter for one in routed]),
        )
        assert self._engine.basic_optimizer is self._client, "DeepSpeed runs another optimizer"
        assert self._engine.optimizer.optimizer is self._client, "DeepSpeed steps another optimizer"
        if self.stage == 3:
            # The fused loss reads it without the head's forward pass, which would gather it.
            head = self.module.get_output_embeddings()  # type: ignore[operator]
            deepspeed.zero.register_external_parameter(self.module, head.weight)
        self.partitions = Partitions(self._engine, self.stage)
        sizes = [self.partitions.shape(one.parameter).numel() for one in routed]
        owners = assign_owners(sizes, self.processes.world_size)
        self.owners = {one.parameter: owner for one, owner in zip(routed, owners, strict=True)}
        self._whole = WholeMatrixStep(optimizer, self.partitions, self.owners)
        self._constrained = any(True for _ in constrained_modules(self.module)) or (
            getattr(self.module.config, "weight_constraint", None) is not None
        )
        self.ranks = Ranks()

    def _settings(self, parameters: list[nn.Parameter]) -> dict[str, Any]:
        total = sum(parameter.numel() for parameter in parameters)
        vectors = [parameter.numel() for parameter in parameters if parameter.ndim < 2]
        zero: dict[str, Any] = {"stage": self.stage, "reduce_bucket_size": min(BUCKET, total)}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = max(vectors, default=0) + 1
        return {
            "train_micro_batch_size_per_gpu": 1,  # counts nothing: the boundary of an update is set by hand
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": self.options.gradient_dtype,
            "steps_per_print": None,
            "zero_optimization": zero,
        }

    def __call__(self, **batch: Any) -> Any:
        if not torch.is_grad_enabled():
            with super().autocast():
                return self.module(**batch)
        # DeepSpeed turns autocast off that it finds on; `_Forward` turns it on again inside.
        with torch.autocast(self.processes.device.type, enabled=False):
            return self._engine(**batch)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradient, summed over processes (after the last one only, under stage 1)."""
        self._pending = True
        self._engine.backward(loss * self.processes.world_size, scale_wrt_gas=False)

    def sum_whole_gradients(self) -> None:
        """Nothing: DeepSpeed has summed every gradient."""

    @torch.no_grad()
    def add_penalties(self, penalties: Sequence[Penalty]) -> None:
        """Every process adds its part of each matrix's penalty gradient, which all compute."""
        if not penalties:
            return
        for parameter in self._hidden_matrices:
            whole = self.partitions.whole_weight(parameter)
            self.partitions.add_to_gradient(parameter, penalty_gradient(whole, penalties))

    @torch.no_grad()
    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """The global norm; the factor min(1, max_norm / ||g||) goes to the gradients with the step."""
        parts = [part for p in self.owners if (part := self.partitions.gradient(p)).numel()]
        squares = torch.zeros((), dtype=torch.float64, device=self.processes.device)
        for norm in _norms(parts):
            squares += norm.double().square()
        norm = self.processes.sum(squares).sqrt().float()
        self._factor = None if max_norm is None else clip_factor(norm, max_norm)
        return norm

    def gradient_part(self, parameter: nn.Parameter) -> tuple[Tensor, bool]:
        return self.partitions.gradient(parameter), True

    def step(self, optimizer: Optimizer) -> None:
        """Move the weights by the optimizer's rule, once, and gather them where they are whole."""
        assert optimizer is self._asked
        if not self._client.on_partitions:
            self._whole.run(self._factor)
        self._client.factor, self._client.armed = self._factor, True
        try:
            self._engine.step()
        finally:
            self._client.armed = False
        self._pending = False
        if not self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed left out an update: a gradient or a moved weight is not finite")

    def project(self, optimizer: Optimizer) -> None:
        """Make the weights obey their modules: whole ones first, then their fp32 partitions."""
        if not self._constrained:
            return
        assert self.stage < 3, "refused before"
        project_weights(self.module, optimizer)
        for parameter in self.owners:
            self.partitions.set_weight(parameter, parameter.detach())

    def drop_gradients(self, optimizer: Optimizer) -> None:
        """Forget the gradients of an update that is not made: the engine steps while its optimizer rests."""
        if self._pending:
            self._engine.step()
            self._pending = False

    def tensors(
        self, optimizer: Optimizer, ranks: Ranks | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return zero_tensors(self, optimizer)

    def restore(self, optimizer: Optimizer, checkpoint: Path) -> None:
        restore_zero(self, optimizer, checkpoint)


class _Forward(nn.Module):
    """What DeepSpeed calls: the module's forward pass in the run's own autocast."""

    def __init__(self, module: nn.Module, autocast: Any) -> None:
        super().__init__()
        self.module = module
        self.autocast = autocast

    def forward(self, **batch: Any) -> Any:
        with self.autocast():
            return self.module(**batch)


def _norms(parts: list[Tensor]) -> Iterable[Tensor]:
    """The 2-norm of each part. On a CPU torch adds a long vector's squares into one fp32 sum, hence fp64."""
    if not parts or parts[0].device.type != "cpu":
        return tensor_norms(parts) if parts else []
    return [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]


def _import_deepspeed(processes: Processes) -> Any:
    if processes.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Otherwise the processes of a machine are counted by its NUMA nodes.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed
    import deepspeed.ops

    # It warns of every optimizer that is not its own, and calls torch by names that torch has renamed.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # A shared-memory reduction that DeepSpeed would compile at every first start on a CPU, behind a lock
    # that a killed process leaves for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
