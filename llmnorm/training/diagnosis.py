"""Diagnostics of a run, every so many updates: docs/diagnostics.md says what each number means.

Gradients and updates are those of the diagnosed update itself. Streams and attention are measured right after
it, on the same few sequences each time, so that a curve over steps shows the model and not the data. The run
is not touched: no random number is drawn, no buffer changes, and the next update is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llmnorm.config import RunConfig, check_batch
from llmnorm.data.pipeline import PreparedData
from llmnorm.evaluation.attention_statistics import AttentionStatistics
from llmnorm.evaluation.diagnostics import attention_names
from llmnorm.evaluation.gain_drift import drift_per_layer, find_gains
from llmnorm.evaluation.layer_effects import find_blocks, group_parameters, layer_removal
from llmnorm.evaluation.precision import inference
from llmnorm.evaluation.stream_statistics import StreamStatistics
from llmnorm.optim import Role, route_parameters
from llmnorm.training.parallel import ParallelModel, tensor_norms
from llmnorm.training.processes import Processes

Part = tuple[Tensor, bool]  # a local tensor, and whether it is a shard of a larger one

PREFIX = "diagnostics/"
STREAM_KEYS = (
    "stream_rms",
    "stream_variance",
    "angular_distance",
    "block_influence",
    "relative_update",
    "max_activation",
    "massive_ratio",
    "massive_count",
)
ATTENTION_KEYS = ("attention_entropy", "attention_relative_entropy", "max_attention_logit")
REMOVAL_KEYS = ("loss", "removal_loss", "removal_delta_loss", "removal_delta_perplexity")


class TrainingDiagnostics:
    """Writes one metrics row for each diagnosed update; every process calls it alike."""

    def __init__(self, config: RunConfig, model: ParallelModel, data: PreparedData) -> None:
        self.options = config.diagnostics
        self.model = model
        self.micro_batch_size = check_batch(config, model.processes.world_size).micro_batch_size
        self.context_length = config.data.sequence_length
        self.blocks = find_blocks(model.module)
        layers, outside = group_parameters(model.module, self.blocks)
        self.groups, self.outside = [*layers, *outside.values()], list(outside)
        vectors = {id(one.parameter) for one in route_parameters(model.module) if one.role is Role.VECTOR}
        self.matrices = [[p for p in group if id(p) not in vectors] for group in self.groups]
        self.tokens = (
            _probe(data, self.context_length, self.options.sequences) if self.options.every else None
        )

    def due(self, step: int) -> bool:
        """Whether update number `step` is to be diagnosed."""
        return self.options.every is not None and step % self.options.every == 0

    def watch(self) -> Watch:
        """What observes one update from its gradients on."""
        return Watch(self)

    def probe(self) -> dict[str, Any]:
        """Streams, attention, gains and, if asked for, the loss without each layer, of the model as it is."""
        module, device, processes = self.model.module, self.model.processes.device, self.model.processes
        config: Any = module.config
        streams = StreamStatistics(len(self.blocks), device, positions=False, config=config)
        attention = AttentionStatistics(len(self.blocks), config.num_attention_heads, device)
        with self._measuring():
            for rows in self._shares():
                if rows is not None:
                    with streams.watching(self.blocks), attention.watching(module):
                        module(input_ids=rows.to(device), use_cache=False, logits_to_keep=1)
                elif self.model.forward_is_collective:
                    module(input_ids=self._rows()[:1].to(device), use_cache=False, logits_to_keep=1)
            removal = self._without_each_layer() if self.options.layer_removal else {}
        gather = _gatherer(processes)
        found = streams.result(gather)
        found |= attention.result(attention_names(self.blocks), gather)
        row: dict[str, Any] = {key: found[key] for key in (*STREAM_KEYS, *ATTENTION_KEYS)}
        row["gain_drift"] = drift_per_layer(find_gains(module, self.blocks), len(self.blocks))
        if found["attention_unavailable"]:
            row["attention_unavailable"] = found["attention_unavailable"]
        return {PREFIX + key: value for key, value in {**row, **removal}.items()}

    def _without_each_layer(self) -> dict[str, Any]:
        processes = self.model.processes
        found = layer_removal(
            self.model.module,
            self.blocks,
            self.tokens,
            context_length=self.context_length,
            batch_size=self.micro_batch_size,
            float32=False,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        return {key: found[key] for key in REMOVAL_KEYS}

    def _rows(self) -> Tensor:
        """[sequences, context_length] inputs."""
        assert self.tokens is not None
        return self.tokens[:-1].view(-1, self.context_length)

    def _shares(self) -> Iterator[Tensor | None]:
        """This process's rows, a micro-batch at a time; None where others still have some and it has not."""
        processes = self.model.processes
        mine = self._rows()[processes.rank :: processes.world_size].split(self.micro_batch_size)
        most = self._rows()[:: processes.world_size].split(self.micro_batch_size)
        for number in range(len(most)):
            yield mine[number] if number < len(mine) and len(mine[number]) else None

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """The training's own precision, in eval mode, without compiled code, which hooks cannot enter."""
        with (
            inference(self.model.module, float32=False),
            self.model.autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
        for unit in self.model.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # a forward pass without a backward leaves the root's weights gathered


class Watch:
    """One update: its gradients before clipping, its weights before and after."""

    def __init__(self, of: TrainingDiagnostics) -> None:
        self.of = of
        self.gradients: Tensor | None = None
        self.before: list[list[Tensor]] | None = None

    def see_gradients(self, norms: Mapping[Tensor, Tensor] | None = None) -> None:
        """Called when the gradients are summed over micro-batches and processes and not yet clipped.

        Where they are not held together, `norms` gives the norm of each parameter's; one process, then.
        """
        if norms is not None:
            seen = [[norms[p].double() for p in group if p in norms] for group in self.of.groups]
            zero = torch.zeros((), dtype=torch.float64, device=self.of.model.processes.device)
            self.gradients = torch.stack([torch.stack([zero, *part]).norm() for part in seen])
            return
        part = self.of.model.gradient_part
        groups = [[held for p in group if (held := part(p)) is not None] for group in self.of.groups]
        self.gradients = _norms(groups, self.of.model.processes)

    def see_weights(self) -> None:
        """Called right before the update; holds a copy of the matrices until `row`."""
        self.before = [[_local(p).clone() for p in group] for group in self.of.matrices]

    def row(self) -> dict[str, Any]:
        """The numbers of the update, called after it or after it was skipped, and of the new weights."""
        row = self._named("gradient_norm", self.gradients)
        return {**row, **self._named("update_ratio", self._update_ratios()), **self.of.probe()}

    @torch.no_grad()
    def _update_ratios(self) -> Tensor | None:
        if self.before is None:
            return None
        moved, held = [], []
        for group, before in zip(self.of.matrices, self.before, strict=True):
            pairs = list(zip(group, before, strict=True))
            moved.append([_part(p, _local(p).float() - old.float()) for p, old in pairs])
            held.append([_part(p, old) for p, old in pairs])
        processes = self.of.model.processes
        ratios = _norms(moved, processes) / _norms(held, processes)
        self.before = None
        return ratios

    def _named(self, name: str, values: Tensor | None) -> dict[str, Any]:
        """The layers as a list, what is outside under its own name."""
        if values is None:
            return {f"{PREFIX}{name}": None}
        numbers, layers = values.tolist(), len(self.of.blocks)
        outside = zip(self.of.outside, self.of.matrices[layers:], numbers[layers:], strict=True)
        named = {
            f"{PREFIX}{name}/{module}": number
            for module, matrices, number in outside
            if matrices or name == "gradient_norm"
        }
        return {f"{PREFIX}{name}": numbers[:layers], **named}


def for_trackers(row: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The row with each list as one number per layer, `key/layer_07`; x_0, the embedding, is layer 0."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list):
            first = 0 if len(value) == num_layers + 1 else 1
            flat |= {f"{key}/layer_{first + place:02d}": number for place, number in enumerate(value)}
        else:
            flat[key] = value
    return flat


def _probe(data: PreparedData, context_length: int, sequences: int) -> Tensor:
    """[windows * context_length + 1] tokens: the first windows of the validation text that holds one, or of
    the training text."""
    datasets = [*data.validation.values(), *([data.train] if data.train is not None else [])]
    dataset = next(one for one in datasets if one.num_tokens > context_length)
    windows = min(sequences, (dataset.num_tokens - 1) // context_length)
    return torch.from_numpy(dataset.read(0, windows * context_length + 1)).long()


def _gatherer(processes: Processes) -> Any:
    def gather(numbers: Tensor) -> Tensor:
        table = torch.zeros(processes.world_size, numbers.numel(), dtype=numbers.dtype, device=numbers.device)
        table[processes.rank] = numbers
        return processes.sum(table)

    return gather


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _part(parameter: nn.Parameter, local: Tensor) -> Part:
    return local, isinstance(parameter, DTensor)


def _norms(groups: Sequence[Sequence[Part]], processes: Processes) -> Tensor:
    """||.||_2 of each group's tensors, fp64: shards count over all processes, whole tensors once."""
    squares = torch.zeros(2, len(groups), dtype=torch.float64, device=processes.device)
    sharded = any(is_shard for group in groups for _, is_shard in group)
    for number, group in enumerate(groups):
        for kind in (False, True):
            members = [local for local, is_shard in group if is_shard is kind]
            if members:
                norms = torch.stack([norm.to(processes.device) for norm in tensor_norms(members)])
                squares[int(kind), number] = norms.double().square().sum()
    if sharded:
        squares[1] = processes.sum(squares[1].clone())
    return squares.sum(0).sqrt()
