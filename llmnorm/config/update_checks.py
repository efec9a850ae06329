"""Rules that tie the keys of an update together: loss, gradients, optimizer and stored weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmnorm.errors import UserError

if TYPE_CHECKING:
    from llmnorm.config.schema import RunConfig


def _clipping_has_a_limit(config: RunConfig) -> None:
    train = config.train
    if train.grad_clip is None and train.grad_clip_mode != "global":
        raise UserError(
            f"train.grad_clip_mode={train.grad_clip_mode} does nothing with train.grad_clip=null; set "
            "train.grad_clip, or remove train.grad_clip_mode"
        )


def _rounding_has_bf16_weights(config: RunConfig) -> None:
    precision = config.train.precision
    if getattr(config.optimizer, "stochastic_rounding", False) and precision != "bf16_pure":
        raise UserError(
            f"optimizer.stochastic_rounding=true does nothing with train.precision={precision}, whose "
            "weights are fp32; set train.precision: bf16_pure, or remove it"
        )


def _seed_has_effect(config: RunConfig) -> None:
    optimizer = config.optimizer
    seed, draws = getattr(optimizer, "seed", None), getattr(optimizer, "draws", True)
    if seed is not None and not draws and not getattr(optimizer, "stochastic_rounding", False):
        raise UserError(
            f"optimizer.seed={seed} does nothing with optimizer.name={optimizer.name}, which draws no random "
            "numbers unless optimizer.stochastic_rounding is true; remove it"
        )


def _reweighting_stands_alone(config: RunConfig) -> None:
    train = config.train
    if train.loss_reweighting is None:
        return
    if train.batch_schedule is not None and train.batch_schedule.name == "norm_test":
        raise UserError(
            "train.loss_reweighting couples the samples of a batch, and train.batch_schedule.name=norm_test "
            "takes their gradients as independent; remove one of them"
        )
    if train.global_batch_size == 1:
        raise UserError(
            "train.loss_reweighting does nothing with train.global_batch_size=1, where one sample has "
            "all the weight; raise train.global_batch_size or remove it"
        )
    if train.loss_reweighting.warmup_steps >= train.max_steps:
        raise UserError(
            f"train.loss_reweighting.warmup_steps={train.loss_reweighting.warmup_steps} leaves no update of "
            f"train.max_steps={train.max_steps} to reweight; lower it"
        )


def _stochastic_rounding_is_not_compiled(config: RunConfig) -> None:
    quantization = config.model.quantization
    if quantization is not None and quantization.rounding == "stochastic" and config.train.compile:
        raise UserError(
            "model.quantization.rounding=stochastic has other constants in each update, and "
            "train.compile=true would compile for each; set train.compile: false, or rounding: nearest"
        )


def _int8_weights_have_no_other_owner(config: RunConfig) -> None:
    if getattr(config.optimizer, "weights", "param") != "int8":
        return
    others = {
        "model.quantization": config.model.quantization,
        "model.weight_constraint": config.model.weight_constraint,
        "model.weight_parametrization": config.model.weight_parametrization,
        "train.compile": config.train.compile or None,
        "parallel.strategy": {"auto": None, "none": None}.get(
            config.parallel.strategy, config.parallel.strategy
        ),
    }
    for key, value in others.items():
        if value is not None:
            shown = value if isinstance(value, str) else str(value).lower()
            given = f"{key}={shown}" if isinstance(value, bool | str) else key
            raise UserError(
                f"optimizer.weights=int8 does not work with {given}: INT8 weights are trained in one "
                f"process, uncompiled, and by their optimizer alone; remove {key}, or set "
                "optimizer.weights: param"
            )


# name -> the options that mean something to it
PENALTY_OPTIONS = {
    "gor": {"groups"},
    "lambda_orthogonality": {"threshold", "sharpness"},
    "spectral": {"power"},
}


def _penalties_have_effect(config: RunConfig) -> None:
    penalties = config.train.weight_penalties
    names = [penalty.name for penalty in penalties]
    if not names:
        return
    for penalty in penalties:
        for option in penalty.options().keys() - PENALTY_OPTIONS.get(penalty.name, set()):
            raise UserError(
                f"train.weight_penalties: {option} does nothing with name={penalty.name}; remove it"
            )
    if len(set(names)) < len(names):
        raise UserError(
            f"train.weight_penalties names {max(names, key=names.count)} twice; give it once, with the "
            "sum of the strengths"
        )
    constraint, batches = config.model.weight_constraint, config.train.batch_schedule
    parametrization = config.model.weight_parametrization
    for holds, reason, remedy in (
        (
            config.model.norm == "ngpt",
            "model.norm=ngpt, which puts every matrix back on unit rows or columns after each update",
            "another norm",
        ),
        (
            constraint is not None and constraint.name == "stiefel",
            "model.weight_constraint.name=stiefel, which sets every singular value after each update",
            "another constraint",
        ),
        (
            bool(parametrization),
            "model.weight_parametrization, as it sees the stored matrices and not those that the model "
            "multiplies with",
            "one of them",
        ),
        (
            getattr(config.optimizer, "weights", "param") == "int8",
            "optimizer.weights=int8, whose codes have no gradient of their own",
            "optimizer.weights: param",
        ),
        (
            config.optimizer.fused_backward,
            "optimizer.fused_backward=true, which moves a matrix before its penalty could be added",
            "optimizer.fused_backward: false",
        ),
        (
            batches is not None and batches.name == "norm_test",
            "train.batch_schedule.name=norm_test, which compares gradients of the loss alone",
            "another batch_schedule",
        ),
    ):
        if holds:
            raise UserError(
                f"train.weight_penalties={names} does not work with {reason}; remove it, or use {remedy}"
            )


def _qk_clip_moves_logits(config: RunConfig) -> None:
    clip, parametrization = getattr(config.optimizer, "qk_clip", None), config.model.weight_parametrization
    if clip is None or not parametrization:
        return
    steps = parametrization if isinstance(parametrization, list) else [parametrization]
    if any(step.modules is None or {"q_proj", "k_proj"} & set(step.modules) for step in steps):
        raise UserError(
            f"optimizer.qk_clip={clip:g} does not work with model.weight_parametrization of q_proj and "
            "k_proj: it scales stored rows, which logits then do not follow; remove one of them, or leave "
            "q_proj and k_proj out of modules"
        )


UPDATE_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _reweighting_stands_alone,
    _clipping_has_a_limit,
    _int8_weights_have_no_other_owner,
    _penalties_have_effect,
    _qk_clip_moves_logits,
    _rounding_has_bf16_weights,
    _seed_has_effect,
    _stochastic_rounding_is_not_compiled,
)
