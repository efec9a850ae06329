"""What a run would cost, without running it: parameters by role, memory by kind, FLOPs, tokens, steps.

The model is built on the meta device, so a 7B model takes seconds on a laptop. Nothing is read or written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from llmnorm.config import (
    BatchPlan,
    RunConfig,
    TrainSection,
    TrainTokenizer,
    check_batch,
    check_batches,
    planned_sequences,
    planned_stages,
)
from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.modeling.mlp import MLP_MATRICES
from llmnorm.modeling.mup import width_multiplier
from llmnorm.optim import (
    Penalty,
    Role,
    check_feasible,
    check_penalties,
    create_optimizer,
    route_parameters,
)
from llmnorm.optim.custom import require_cuttable, require_separable
from llmnorm.optim.mup import lr_multipliers
from llmnorm.plugins import load_run_plugins
from llmnorm.training.activation_memory import (
    ActivationBytes,
    activation_bytes,
    arithmetic,
    matrix_bytes,
)
from llmnorm.training.attention_cost import attention_cost
from llmnorm.training.batch_size import create_batch_size, format_stages
from llmnorm.training.build import build_on_meta
from llmnorm.training.fused_update import check_fused_backward
from llmnorm.training.processes import is_launched, resolve_strategy
from llmnorm.training.role_memory import RoleMemory, memory_by_role
from llmnorm.training.state_by_rank import Layout
from llmnorm.training.statistics_checks import check_statistics
from llmnorm.training.zero_checks import check_module, resolve_zero_stage

_ANY_VOCABULARY = 32_000  # no rule of the model section depends on it
MODES = ("none", "selective", "full")
MEMORY_NOTE = (
    "  Activations are at their peak, logits included, with SDPA or flash attention. What the allocator, the",
    "  device's context and communication keep comes on top.",
)


class Flops(NamedTuple):
    """Floating-point operations of training on one token, forward and backward, nothing recomputed.

        total = 6 N_matmul + 6 sum over layers of A,   A = H D T for softmax

    N_matmul: weights that take part in matrix products, the head included and the embedding's look-up not.
    A is attention beside its matrices, in multiply-adds: with causal softmax a token attends to T / 2 others
    on average, and q k^T and weights v cost 2 H D each; linear attention's does not grow with T, see
    `attention_cost.py`.
    """

    total: int
    matmul: int
    attention: int
    matmul_parameters: int


def flops_per_token(config: LlmNormConfig, sequence_length: int) -> Flops:
    """FLOPs per trained token of a model at that sequence length; see `Flops` for the formula."""
    d = config.stream_width
    costs = [attention_cost(config, name, sequence_length, 2) for name in config.layer_attentions]
    mlp = MLP_MATRICES[config.mlp] * d * config.intermediate_size
    layers = sum(cost.weights for cost in costs) + config.num_hidden_layers * mlp
    parameters = layers + d * config.vocab_size
    attention = 6 * sum(cost.multiply_adds for cost in costs)
    return Flops(6 * parameters + attention, 6 * parameters, attention, parameters)


def parameters_by_role(model: LlmNormForCausalLM) -> dict[str, int]:
    """Parameters of the embedding, attention, MLP, norms and head; tied weights count once, as the "
    "embedding."""
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norm", "lm_head"), 0)
    owners: list[tuple[str, nn.Module]] = [("embedding", model.model.embed_tokens)]
    for block in model.model.layers:
        owners += [("attention", block.self_attn), ("mlp", block.mlp), ("norm", block)]
    owners += [("lm_head", model.lm_head), ("norm", model)]
    seen: set[nn.Parameter] = set()
    for role, module in owners:
        for parameter in module.parameters():
            if parameter not in seen:
                seen.add(parameter)
                counts[role] += parameter.numel()
    return counts


class Memory(NamedTuple):
    """Bytes per process, by kind; activations by checkpointing mode, at their peak."""

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: dict[str, int]
    roles: dict[str, RoleMemory]

    def total(self, mode: str) -> int:
        return self.weights + self.copies + self.gradients + self.optimizer + self.activations[mode]


@dataclass(frozen=True)
class Plan:
    """Everything `print_plan` prints."""

    config: RunConfig
    model_config: LlmNormConfig
    parameters: dict[str, int]
    optimizer_roles: dict[str, int]
    lr_multipliers: dict[str, float]
    memory: Memory
    per_token: ActivationBytes
    flops: Flops
    processes: int
    strategy: str
    batch: BatchPlan

    @property
    def sequences_per_step(self) -> int:
        """Of the largest stage, whose micro-batches are what memory must hold."""
        return self.batch.micro_batch_size * self.batch.accumulation_steps * self.processes

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.config.data.sequence_length


def planned_model_config(config: RunConfig) -> LlmNormConfig:
    """The model's config with neither data nor, where `model.vocab_size` is given, a tokenizer.

    With `model.init_from` it is the config of those weights.

    Raises `UserError` when the model section contradicts itself, or its vocabulary size cannot be known.
    """
    if config.model.init_from is not None:
        from llmnorm.export import initial_weights

        given = config.model.model_dump(include=config.model.model_fields_set)
        return initial_weights(config.model.init_from, given).config
    return _model_config(config, _tokenizer_size(config))


def check_model(config: RunConfig, strategy: str = "none") -> None:
    """Raise `UserError` for a model or optimizer that contradicts itself or this strategy, before any data is
    prepared for it.

    With `model.init_from` the architecture is that of the weights, which the loop checks when it reads them.
    """
    if config.model.init_from is None:
        model_config = _model_config(config, config.model.vocab_size or _ANY_VOCABULARY)
        optimizer_multipliers(config, model_config)
        # Options that depend on shapes and dtypes: a rank, a block, a role that the method cannot treat.
        model = build_on_meta(model_config, config)
        optimizer = _create_optimizer(config, model)
        check_penalties(model, penalties_of(config.train))
        if strategy == "fsdp2":
            require_cuttable(optimizer)
        if strategy == "deepspeed":
            check_module(model, resolve_zero_stage(config.parallel))
            require_separable(optimizer)


def penalties_of(train: TrainSection) -> list[Penalty]:
    return [Penalty(p.name, p.strength, p.options()) for p in train.weight_penalties]


def _create_optimizer(config: RunConfig, model: LlmNormForCausalLM) -> torch.optim.Optimizer:
    optimizer = create_optimizer(
        config.optimizer.method, model, config.optimizer.lr, **config.optimizer.options(config.seed)
    )
    check_feasible(model, optimizer)
    return optimizer


def optimizer_multipliers(config: RunConfig, model_config: LlmNormConfig) -> dict[str, float]:
    """role -> what multiplies its learning rate under muP; raises `UserError` for a method without a rule."""
    if not model_config.mup:
        return {}
    options = config.optimizer.options(config.seed)
    return lr_multipliers(config.optimizer.method, options, width_multiplier(model_config))


def _model_config(config: RunConfig, tokenizer_size: int | None) -> LlmNormConfig:
    arguments = config.model.arguments(tokenizer_size, config.data.sequence_length)
    try:
        model = LlmNormConfig(**arguments)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    check_statistics(config, model)
    return model


def _tokenizer_size(config: RunConfig) -> int | None:
    tokenizer = config.data.tokenizer
    if isinstance(tokenizer, TrainTokenizer):
        return tokenizer.vocab_size
    if config.model.vocab_size is not None:
        return None
    from llmnorm.data import load_or_train_tokenizer

    try:
        return len(load_or_train_tokenizer(tokenizer, [], cache_dir="", text_field=config.data.text_field))
    except UserError as error:
        raise UserError(
            f"model.vocab_size is null, and the tokenizer that would set it is not at hand: {error}. To plan "
            "without it, give model.vocab_size, for example --model.vocab_size 32000"
        ) from error


def make_plan(
    config: RunConfig, processes: int | None = None, environment: Mapping[str, str] = os.environ
) -> Plan:
    """The plan of a run on `processes` processes; None takes the launcher's number, or one."""
    if processes is None:
        processes = int(environment.get("WORLD_SIZE", "1"))
    load_run_plugins(config)
    strategy = _strategy(config, processes, environment)
    check_batches(config, processes)
    check_fused_backward(config, strategy, processes)
    create_batch_size(config, strategy)
    largest = max(stage.global_batch_size for stage in planned_stages(config))
    batch = check_batch(config, processes, largest)
    model_config = planned_model_config(config)
    model = build_on_meta(model_config, config)
    routed = route_parameters(model)
    roles = {role.value: sum(r.parameter.numel() for r in routed if r.role is role) for role in Role}
    per_token = activation_bytes(model_config, config.train.precision)
    flops = flops_per_token(model_config, config.data.sequence_length)
    tokens = batch.micro_batch_size * config.data.sequence_length
    accumulates = any(
        check_batch(config, processes, stage.global_batch_size).accumulation_steps > 1
        for stage in planned_stages(config)
    )
    matrices = matrix_bytes(model, config.train.precision, gathered=strategy == "fsdp2")
    memory = _state_memory(config, model, strategy, processes, accumulates)._replace(
        activations={mode: tokens * per_token.peak(mode) + matrices[mode] for mode in MODES}
    )
    return Plan(
        config,
        model_config,
        parameters_by_role(model),
        {role: count for role, count in roles.items() if count},
        optimizer_multipliers(config, model_config),
        memory,
        per_token,
        flops,
        processes,
        strategy,
        batch,
    )


def _strategy(config: RunConfig, processes: int, environment: Mapping[str, str]) -> str:
    if is_launched(environment):
        return resolve_strategy(config.parallel, config.train, environment)
    if config.parallel.strategy == "auto":
        return "ddp" if processes > 1 else "none"
    return config.parallel.strategy


def _state_memory(
    config: RunConfig, model: LlmNormForCausalLM, strategy: str, processes: int, accumulates: bool
) -> Memory:
    """Bytes per process of weights, of copies of weights, of gradients and of optimizer state.

    FSDP2 shards matrices over the processes and leaves vectors whole. On top it gathers the embedding and the
    head for the whole step, and two blocks at a time (all blocks without `reshard_after_forward`), whose
    gradients are whole until they are summed. Autocast keeps a bf16 copy of every weight that it multiplies
    by, and a compressed stream one of aligned width. `role_memory.py` says what ZeRO shards; the process
    that holds most state counts.
    """
    parallel = config.parallel
    layout = Layout(strategy, processes, parallel.replicas, parallel.share_updates)
    optimizer = _create_optimizer(config, model)  # first, as it may put INT8 weights into the model
    roles = memory_by_role(model, optimizer, layout, config.train.compile, accumulates)
    if strategy == "deepspeed":
        stage = resolve_zero_stage(parallel)
        roles = {role: sizes.under_zero(stage, processes) for role, sizes in roles.items()}
    elif strategy == "fsdp2" and config.parallel.cpu_offload:
        vectors = roles.get(Role.VECTOR, RoleMemory(0, 0, 0, 0))
        roles = {Role.VECTOR.value: vectors._replace(states=0, projectors=0)}
    sums = RoleMemory(*(sum(kind) for kind in zip(*roles.values(), strict=True)))
    held, gradients, state = sums.weights + sums.masters, sums.gradients, sums.states + sums.projectors
    products = arithmetic(model.config, config.train.precision)
    heads = model.lm_head.weight.numel()
    matmul = flops_per_token(model.config, 1).matmul_parameters
    copies = products.autocast or model.config.is_compressed
    multiplied = matmul * products.product_bytes if copies else 0
    if strategy != "fsdp2":
        return Memory(held, multiplied, gradients, state, {}, roles)
    root = {model.model.embed_tokens.weight, model.lm_head.weight}  # one parameter when tied
    gathered = sum(parameter.numel() * parameter.element_size() for parameter in root)
    gathered += heads * products.product_bytes if copies else 0
    block = (matmul - heads) // model.config.num_hidden_layers * products.product_bytes
    resident = 2 if config.parallel.reshard_after_forward else model.config.num_hidden_layers
    return Memory(held, gathered + (resident + 1) * block, gradients, state, {}, roles)


def format_plan(plan: Plan) -> str:
    """The plan as text: the resolved config, then one table for each kind of cost."""
    return "\n".join(
        (
            "# resolved config",
            plan.config.to_yaml(),
            *_parameter_lines(plan),
            "",
            *_memory_lines(plan),
            "",
            *_compute_lines(plan),
        )
    )


def _parameter_lines(plan: Plan) -> list[str]:
    total = sum(plan.parameters.values())
    lines = [f"parameters: {total:,} ({total / 1e6:,.1f}M; vocabulary {plan.model_config.vocab_size:,})"]
    lines += [f"  {role:<24} {count:>18,}  {count / total:>6.1%}" for role, count in plan.parameters.items()]
    lines.append(f"as {plan.config.optimizer.method} sees them:")
    for role, count in plan.optimizer_roles.items():
        multiplier = plan.lr_multipliers.get(role, 1.0)
        shown = f"  lr x {multiplier:.4g} (mup)" if plan.model_config.mup else ""
        lines.append(f"  {role:<24} {count:>18,}{shown}")
    return lines


def _size(bytes_: int) -> str:
    unit, divisor = ("GiB", 2**30) if bytes_ >= 2**30 else ("MiB", 2**20)
    return f"{bytes_ / divisor:>9,.2f} {unit}"


def _memory_lines(plan: Plan) -> list[str]:
    memory, config = plan.memory, plan.config
    offloaded = plan.strategy == "fsdp2" and config.parallel.cpu_offload
    rows = {
        "weights": memory.weights,
        "copies of weights": memory.copies,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
    }
    lines = [
        f"memory per process ({plan.strategy}, {plan.processes} process{'es' if plan.processes > 1 else ''}, "
        f"{config.train.precision}, {plan.batch.micro_batch_size} x {config.data.sequence_length} tokens "
        "at a time)"
    ]
    lines += [f"  {name:<24} {_size(bytes_)}" for name, bytes_ in rows.items()]
    lines += _role_lines(plan)
    if plan.processes > 1:
        lines.append("  (state of the process that holds most)")
    if offloaded:
        lines.append("  (sharded weights, gradients and optimizer state are in the CPU's memory)")
    lines.append("  activation_checkpointing  activations         total")
    for mode in MODES:
        chosen = "  <- this run" if mode == config.train.activation_checkpointing else ""
        lines.append(f"    {mode:<22} {_size(memory.activations[mode])} {_size(memory.total(mode))}{chosen}")
    return [*lines, *MEMORY_NOTE]


def _role_lines(plan: Plan) -> list[str]:
    """What each role takes; only ZeRO has a second copy of a weight that is updated."""
    kinds = RoleMemory._fields
    lines = ["  " + f"{'by role, MiB':<16}" + "".join(f"{kind:>13}" for kind in kinds)]
    for role, sizes in plan.memory.roles.items():
        lines.append(f"    {role:<14}" + "".join(f"{size / 2**20:>13,.2f}" for size in sizes))
    return lines


def _compute_lines(plan: Plan) -> list[str]:
    train, flops = plan.config.train, plan.flops
    tokens = planned_sequences(plan.config) * plan.config.data.sequence_length
    at_least = getattr(train.batch_schedule, "name", None) == "norm_test"
    parameters = sum(plan.parameters.values())
    accumulation = f"{plan.batch.micro_batch_size} x {plan.batch.accumulation_steps} x {plan.processes}"
    return [
        f"FLOPs per token: {flops.total:,} = 6 N_matmul + attention = {flops.matmul:,} + {flops.attention:,}",
        f"  N_matmul = {flops.matmul_parameters:,}: head included, embedding look-up not; nothing recomputed",
        f"sequences per step: {plan.sequences_per_step} = {accumulation} "
        f"(micro-batch x accumulation x processes)",
        f"tokens per step: {plan.tokens_per_step:,} positions",
        f"steps: {train.max_steps:,}, of which {plan.config.schedule.warmup_steps:,} warm-up",
        *format_stages(plan.config),
        f"tokens: {'at least ' if at_least else ''}{tokens:,} ({tokens / parameters:,.1f} per parameter)",
        f"FLOPs: {tokens * flops.total:.3e}",
    ]


def print_plan(config: RunConfig, processes: int | None = None) -> None:
    """Print the plan of a run, once however many processes were launched."""
    text = format_plan(make_plan(config, processes))
    if os.environ.get("RANK", "0") == "0":
        print(text)
