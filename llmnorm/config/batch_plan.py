"""How an update's sequences are split, and which sizes a batch schedule goes through before the run's end."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llmnorm.config.batch_schedules import NormTestSection, StagedSection, StageSection
from llmnorm.errors import UserError

if TYPE_CHECKING:
    from llmnorm.config.schema import RunConfig

# Strategies that never hold a process's own gradient whole.
SHARDED_GRADIENTS = ("fsdp2", "deepspeed")


class BatchPlan(NamedTuple):
    """How one update's sequences are split: rows per forward pass, and forward passes per process."""

    micro_batch_size: int
    accumulation_steps: int


class Stage(NamedTuple):
    """Updates `first_step`, `first_step + 1`, ..., `num_steps` of them, of one size (0-based)."""

    global_batch_size: int
    first_step: int
    num_steps: int


def check_batch(
    config: RunConfig, world_size: int, total: int | None = None, key: str = "train.global_batch_size"
) -> BatchPlan:
    """The split for which total = micro_batch_size * world_size * accumulation_steps.

    total: `train.global_batch_size` where it is None, else the value of the key `key`.
    Raises `UserError` with values that fit when there is none.
    """
    total = config.train.global_batch_size if total is None else total
    micro = config.train.micro_batch_size
    if micro is None:
        if total % world_size:
            raise UserError(
                f"{key}={total} is not a multiple of the {world_size} processes; "
                f"set it to {nearest_multiples(total, world_size)}, or start a number of processes that "
                "divides it"
            )
        return BatchPlan(total // world_size, 1)
    if total % (micro * world_size):
        processes = f" x {world_size} processes" if world_size > 1 else ""
        other = (
            f"start a number of processes that divides {total if total % micro else total // micro}"
            if total % world_size
            else f"train.micro_batch_size to a divisor of {total // world_size}"
        )
        raise UserError(
            f"{key}={total} is not a multiple of "
            f"train.micro_batch_size={micro}{processes}; set {key} to "
            f"{nearest_multiples(total, micro * world_size)}, or {other}"
        )
    return BatchPlan(micro, total // (micro * world_size))


def nearest_multiples(number: int, of: int) -> str:
    below, above = number // of * of, -(-number // of) * of
    return f"{below} or {above}" if below else f"{above}"


def check_batches(config: RunConfig, world_size: int) -> None:
    """Raise `UserError` for the first size of the run that cannot be split over `world_size` processes."""
    check_batch(config, world_size)
    schedule = config.train.batch_schedule
    if isinstance(schedule, StagedSection):
        for number, stage in enumerate(schedule.stages):
            key = f"{_stage_key(number)}.global_batch_size"
            check_batch(config, world_size, stage.global_batch_size, key)


def planned_stages(config: RunConfig) -> list[Stage]:
    """The stages of a run of `train.max_steps` updates; one where sizes are not known before.

    A stage that ends at N tokens ends with the update that reads token N. Raises `UserError` for stages that
    do not advance, or do not leave an update for `train.global_batch_size`.
    """
    train = config.train
    schedule = train.batch_schedule
    if not isinstance(schedule, StagedSection):
        return [Stage(train.global_batch_size, 0, train.max_steps)]
    stages, step, sequences = [], 0, 0
    for number, given in enumerate(schedule.stages):
        end, value = _end(given, number)
        if end == "until_step":
            num_steps = value - step
        else:
            tokens = given.global_batch_size * config.data.sequence_length
            num_steps = -(-(value - sequences * config.data.sequence_length) // tokens)
        if num_steps <= 0:
            raise UserError(
                f"{_stage_key(number)}.{end}={value} is reached before the stage begins, after {step} "
                f"updates and {sequences * config.data.sequence_length} tokens; the ends of stages must "
                "increase, so raise it or remove the stage"
            )
        stages.append(Stage(given.global_batch_size, step, num_steps))
        step, sequences = step + num_steps, sequences + num_steps * given.global_batch_size
    if step >= train.max_steps:
        raise UserError(
            f"train.batch_schedule.stages take {step} updates ({sequences * config.data.sequence_length} "
            f"tokens) and train.max_steps={train.max_steps} leaves none for "
            f"train.global_batch_size={train.global_batch_size}; raise train.max_steps above {step}, or "
            f"lower {_stage_key(len(stages) - 1)}.{_end(schedule.stages[-1], len(stages) - 1)[0]}"
        )
    return [*stages, Stage(train.global_batch_size, step, train.max_steps - step)]


def planned_sequences(config: RunConfig) -> int:
    """Sequences that the run reads; with a norm test those it would read if the batch never grew."""
    return sum(stage.global_batch_size * stage.num_steps for stage in planned_stages(config))


def _stage_key(number: int) -> str:
    return f"train.batch_schedule.stages[{number}]"


def _end(stage: StageSection, number: int) -> tuple[str, int]:
    """The name and the value of the stage's end."""
    given = [
        (name, value)
        for name in ("until_step", "until_tokens")
        if (value := getattr(stage, name)) is not None
    ]
    if len(given) != 1:
        found = "has both" if given else "has neither"
        raise UserError(
            f"{_stage_key(number)} {found} until_step {'and' if given else 'nor'} until_tokens; give one of "
            "them, counted from the start of the run"
        )
    return given[0]


def check_batch_schedule(config: RunConfig) -> None:
    """Raise `UserError` for a batch schedule that the run cannot hold."""
    train = config.train
    schedule = train.batch_schedule
    if schedule is None:
        return
    if config.data.streaming:
        raise UserError(
            f"train.batch_schedule.name={schedule.name} with data.streaming=true would begin the stream anew "
            "at every change of size; set data.streaming: false, or remove train.batch_schedule"
        )
    if isinstance(schedule, NormTestSection):
        _check_norm_test(config, schedule)
    planned_stages(config)
    if train.micro_batch_size is not None:
        check_batches(config, 1)


def _check_norm_test(config: RunConfig, schedule: NormTestSection) -> None:
    train = config.train
    start, largest = train.global_batch_size, schedule.max_global_batch_size
    if largest <= start or largest % start:
        raise UserError(
            f"train.batch_schedule.max_global_batch_size={largest} is not a larger multiple of "
            f"train.global_batch_size={start}, by whose multiples the batch grows; set it to "
            f"{max(2, round(largest / start)) * start}"
        )
    micro = train.micro_batch_size
    if micro is None or micro * 2 > start:
        raise UserError(
            "train.batch_schedule.name=norm_test compares the gradients of two or more micro-batches, "
            f"but train.micro_batch_size={'null' if micro is None else micro} with "
            f"train.global_batch_size={start}; set train.micro_batch_size to at most half of it"
        )
    if config.parallel.strategy in SHARDED_GRADIENTS:
        raise norm_test_needs_whole_gradients(config.parallel.strategy)


def norm_test_needs_whole_gradients(strategy: str) -> UserError:
    """The error for a norm test under a strategy that never holds a process's own gradient whole."""
    return UserError(
        "train.batch_schedule.name=norm_test needs each micro-batch's own gradient, which "
        f"parallel.strategy={strategy} never holds; use parallel.strategy: ddp, or "
        "train.batch_schedule.name: staged"
    )
