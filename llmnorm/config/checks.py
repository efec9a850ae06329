"""Rules that tie several keys together. A setting that would do nothing is refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from llmnorm.config.batch_plan import check_batch, check_batch_schedule, nearest_multiples
from llmnorm.config.update_checks import UPDATE_RULES
from llmnorm.errors import UserError

if TYPE_CHECKING:
    from llmnorm.config.schema import ParallelSection, RunConfig


def _batch(config: RunConfig) -> None:
    if config.train.micro_batch_size is not None:
        check_batch(config, 1)


def _sizes_are_given(config: RunConfig) -> None:
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [f"model.{name}" for name in needed if getattr(config.model, name) is None]
    if missing and config.model.init_from is None:
        raise UserError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required when model.preset is "
            f"null; give {'it' if len(missing) == 1 else 'them'}, or choose a size such as model.preset: 130m"
        )


def _heads_divide(config: RunConfig) -> None:
    model = config.model
    hidden, heads, groups = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    if hidden is None or heads is None:
        return
    if hidden % heads:
        raise UserError(
            f"model.num_attention_heads={heads} does not divide model.hidden_size={hidden}; use one of "
            f"{_divisors(hidden)} heads"
        )
    if groups is not None and heads % groups:
        raise UserError(
            f"model.num_key_value_heads={groups} does not divide model.num_attention_heads={heads}; "
            f"use one of {_divisors(heads)}"
        )
    head_dim = model.head_dim or hidden // heads
    if head_dim % 2:
        raise UserError(
            f"a head of width {head_dim} is odd, and rotary embedding turns pairs; change "
            f"model.num_attention_heads={heads} or set an even model.head_dim"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _norm_per_layer(config: RunConfig) -> None:
    norm, layers = config.model.norm, config.model.num_hidden_layers
    if isinstance(norm, list) and layers is not None and len(norm) != layers:
        raise UserError(
            f"model.norm lists {len(norm)} norms for model.num_hidden_layers={layers}; give one per layer, "
            "or one name"
        )


def _rope_once(config: RunConfig) -> None:
    if config.model.rope_parameters is not None and "rope_theta" in config.model.model_fields_set:
        theta = config.model.rope_parameters.get("rope_theta", config.model.rope_theta)
        if theta != config.model.rope_theta:
            raise UserError(
                f"model.rope_theta={config.model.rope_theta:g} and "
                f"model.rope_parameters.rope_theta={theta:g} disagree; keep the one in model.rope_parameters"
            )


def _context_fits(config: RunConfig) -> None:
    limit = config.model.max_position_embeddings
    for key, length in (
        ("data.sequence_length", config.data.sequence_length),
        ("evaluation.context_length", config.evaluation.context_length),
    ):
        if limit is not None and length is not None and length > limit:
            raise UserError(
                f"{key}={length} exceeds model.max_position_embeddings={limit}; raise the latter or set it "
                "to null"
            )


def _validation_once(config: RunConfig) -> None:
    data = config.data
    if data.validation_files is not None and data.validation_fraction:
        raise UserError(
            f"data.validation_fraction={data.validation_fraction:g} does nothing beside "
            f"data.validation_files; remove one of them"
        )
    if data.validation_files is None and not data.validation_fraction and config.evaluation.every is not None:
        raise UserError(
            f"evaluation.every={config.evaluation.every} has nothing to evaluate; give "
            f"data.validation_files or a data.validation_fraction such as 0.01"
        )


def _galore_has_one_document_per_row(config: RunConfig) -> None:
    if config.data.recipe == "galore" and config.data.document_masking:
        raise UserError(
            "data.document_masking=true does nothing with data.recipe=galore, where a row holds one "
            "document; remove it, or set data.recipe: packed"
        )


def _streaming_is_for_the_hub(config: RunConfig) -> None:
    data = config.data
    if not data.streaming:
        return
    sources = [data.train_files] if isinstance(data.train_files, str) else data.train_files
    local = [source for source in sources if not source.startswith("hf:")]
    if local:
        raise UserError(
            f"data.streaming=true reads Hub datasets only, and data.train_files names {local[0]}; set "
            f"data.streaming: false, or use an hf: dataset"
        )
    if not isinstance(data.tokenizer, str):
        raise UserError(
            "data.streaming=true cannot train a tokenizer on text it has not read; name an existing one in "
            "data.tokenizer, or set data.streaming: false"
        )
    if data.resampling is not None:
        raise UserError(
            "data.resampling weighs every document before the first update, which data.streaming=true does "
            "not read; remove it, or set data.streaming: false"
        )
    if data.validation_fraction:
        raise UserError(
            f"data.validation_fraction={data.validation_fraction:g} needs a prepared dataset; give "
            f"data.validation_files, or set data.streaming: false"
        )


def _decay_fits(config: RunConfig) -> None:
    schedule = config.schedule
    if schedule.name != "wsd":
        return
    default = type(schedule).model_fields["decay_fraction"].default
    if schedule.decay_steps is not None and schedule.decay_fraction != default:
        raise UserError(
            f"schedule.decay_steps={schedule.decay_steps} and schedule.decay_fraction="
            f"{schedule.decay_fraction:g} both give the length of the decay; remove one of them"
        )
    if schedule.decay_steps is not None and schedule.decay_steps > config.train.max_steps:
        raise UserError(
            f"schedule.decay_steps={schedule.decay_steps} exceeds "
            f"train.max_steps={config.train.max_steps}; lower it"
        )


def _kept_checkpoints_exist(config: RunConfig) -> None:
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every is not None and keep_every % every:
        raise UserError(
            f"checkpoint.keep_every={keep_every} is not a multiple of checkpoint.every={every}, so there "
            f"would be no checkpoint to keep; set it to {nearest_multiples(keep_every, every)}"
        )


def _stride_fits(config: RunConfig) -> None:
    context = config.evaluation.context_length or config.data.sequence_length
    stride = config.evaluation.stride
    if stride is not None and stride > context:
        raise UserError(
            f"evaluation.stride={stride} exceeds the evaluation context of {context} tokens, so tokens "
            f"would be skipped; lower it or set it to null"
        )


def _diagnostics_have_text(config: RunConfig) -> None:
    if config.diagnostics.every is not None and config.data.streaming and not config.data.validation_files:
        raise UserError(
            f"diagnostics.every={config.diagnostics.every} has no text to measure on with "
            "data.streaming=true; give data.validation_files"
        )


def _diagnostics_are_on(config: RunConfig) -> None:
    diagnostics = config.diagnostics
    if diagnostics.every is not None:
        return
    for key in ("sequences", "layer_removal"):
        value = getattr(diagnostics, key)
        if value != type(diagnostics).model_fields[key].default:
            raise UserError(
                f"diagnostics.{key}={str(value).lower()} does nothing with diagnostics.every=null; set "
                "diagnostics.every, such as 50, or remove it"
            )


def _sharding_keys_have_effect(config: RunConfig) -> None:
    if config.parallel.strategy != "auto":
        check_sharding_keys(config.parallel, config.parallel.strategy)


def check_sharding_keys(parallel: ParallelSection, strategy: str) -> None:
    """Raise `UserError` for a key of `parallel` that this strategy, asked for or found, does not read."""
    for reader, key, set_by_user in (
        ("deepspeed", "zero_stage", parallel.zero_stage is not None),
        ("fsdp2", "cpu_offload", parallel.cpu_offload),
        ("fsdp2", "reshard_after_forward", not parallel.reshard_after_forward),
        ("fsdp2", "replicas", parallel.replicas != 1),
        ("ddp", "share_updates", not parallel.share_updates),
    ):
        if set_by_user and strategy != reader:
            value = str(getattr(parallel, key)).lower()
            found = f"auto, which is {strategy} here" if parallel.strategy == "auto" else strategy
            raise UserError(
                f"parallel.{key}={value} does nothing with parallel.strategy={found}; remove it, or set "
                f"parallel.strategy: {reader}"
            )


def _export_before_upload(config: RunConfig) -> None:
    if config.export.push_to_hub is not None and not config.export.at_end:
        raise UserError(
            f"export.push_to_hub={config.export.push_to_hub} uploads nothing with export.at_end=false; set "
            f"export.at_end: true or remove export.push_to_hub"
        )


RULES: tuple[Callable[[RunConfig], None], ...] = (
    _sizes_are_given,
    _heads_divide,
    _norm_per_layer,
    _rope_once,
    _context_fits,
    _batch,
    check_batch_schedule,
    _validation_once,
    _galore_has_one_document_per_row,
    _streaming_is_for_the_hub,
    _decay_fits,
    *UPDATE_RULES,
    _kept_checkpoints_exist,
    _stride_fits,
    _diagnostics_have_text,
    _diagnostics_are_on,
    _sharding_keys_have_effect,
    _export_before_upload,
)


def check(config: RunConfig) -> None:
    """Raise `UserError` for the first rule that the configuration breaks."""
    for rule in RULES:
        rule(config)


# Methods that set the singular values of an update themselves.
ORTHOGONALIZING = ("muon", "normuon", "lanton", "swan")


def warnings_for(config: RunConfig) -> Iterator[str]:
    """Settings that are allowed and probably not meant."""
    warmup, steps = config.schedule.warmup_steps, config.train.max_steps
    if warmup > steps:
        yield (
            f"schedule.warmup_steps={warmup} is longer than train.max_steps={steps}: the learning rate "
            f"never reaches optimizer.lr={config.optimizer.lr:g}"
        )
    if config.model.weight_parametrization and config.optimizer.method in ORTHOGONALIZING:
        yield (
            f"optimizer.name={config.optimizer.method} orthogonalizes the gradients of stored matrices that "
            "model.weight_parametrization normalizes as well: the relative size of an update is then set "
            "twice, by optimizer.lr and by the length of the stored matrix"
        )
