"""What cannot run under DeepSpeed is said before the run, with the keys to change.

Nothing is swapped: an optimizer, a precision or a constraint that ZeRO's partitions cannot carry is refused.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from llmnorm.config import ParallelSection, RunConfig, TrainSection
from llmnorm.errors import UserError
from llmnorm.optim import constrained_modules

USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
_OLDEST = (0, 19)


def is_true(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "false").lower() in ("true", "1")


def resolve_zero_stage(parallel: ParallelSection, environment: Mapping[str, str] = os.environ) -> int:
    """The ZeRO stage of a run under DeepSpeed: the config's, the launcher's, or 2 where neither says."""
    asked = environment.get(_STAGE) if is_true(environment, USE_DEEPSPEED) else None
    if asked is not None and asked not in ("1", "2", "3"):
        raise UserError(
            f"zero_stage: {asked} in the launcher's configuration shards nothing; set it to 1, 2 or 3, or "
            "launch with configs/accelerate/ddp.yaml"
        )
    if asked is not None and parallel.zero_stage not in (None, int(asked)):
        raise UserError(
            f"zero_stage: {asked} in the launcher's configuration contradicts "
            f"parallel.zero_stage={parallel.zero_stage}; remove one of them"
        )
    return parallel.zero_stage or int(asked or 2)


def check_launcher_settings(train: TrainSection, environment: Mapping[str, str]) -> None:
    """Refuse what Accelerate's configuration file asks of DeepSpeed and this run would ignore."""

    def ignored(key: str, value: str, remedy: str) -> UserError:
        return UserError(f"{key}: {value} in the launcher's configuration would be ignored; {remedy}")

    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is not None:
        raise ignored("deepspeed_config_file", file, "remove it, and give zero_stage in its place")
    for part in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            raise UserError(
                f"offload_{part}_device: {device} in the launcher's configuration would run DeepSpeedCPUAdam "
                "and not the optimizer of optimizer.name; set it to none, and for offloading take "
                "parallel.strategy: fsdp2 with parallel.cpu_offload: true"
            )
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    ours = "none" if train.grad_clip is None else f"{train.grad_clip:g}"
    if clipping not in ("none", "auto") and (ours == "none" or float(clipping) != float(ours)):
        raise ignored("gradient_clipping", clipping, f"remove it there; train.grad_clip={ours} decides")
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        remedy = "remove it there; it follows from train.global_batch_size and train.micro_batch_size"
        raise ignored("gradient_accumulation_steps", steps, remedy)


def check_deepspeed(config: RunConfig, stage: int) -> None:
    """Refuse a run that ZeRO of this stage cannot make as asked; before anything is built or written."""
    _check_installed()
    for key, value, reason, remedy in _obstacles(config, stage):
        raise UserError(
            f"{key}={value} cannot run with parallel.strategy=deepspeed (ZeRO-{stage}): {reason}; {remedy}"
        )


def _obstacles(config: RunConfig, stage: int) -> list[tuple[str, Any, str, str]]:
    train = config.train
    clip = getattr(config.optimizer, "qk_clip", None)
    elsewhere = "use parallel.strategy: fsdp2"
    lower = f"{elsewhere}, or parallel.zero_stage: 2"
    found: list[tuple[str, Any, str, str]] = []
    if train.precision == "bf16_pure":
        reason = "DeepSpeed would keep an fp32 copy of the bf16 weights and train that"
        found.append(
            ("train.precision", train.precision, reason, f"set train.precision: bf16, or {elsewhere}")
        )
    if getattr(config.optimizer, "weights", "param") == "int8":
        reason = "DeepSpeed partitions floating-point weights"
        found.append(("optimizer.weights", "int8", reason, "train it in one process"))
    if train.grad_clip is not None and train.grad_clip_mode != "global":
        reason = "it clips whole gradients, of which each process holds a part"
        found.append(("train.grad_clip_mode", train.grad_clip_mode, reason, elsewhere))
    if stage == 3 and clip is not None:
        reason = "the heads' rows are scaled on whole weights, which stage 3 never holds"
        found.append(("optimizer.qk_clip", clip, reason, lower))
    if stage == 3 and config.diagnostics.every is not None:
        reason = "they read whole weights, which stage 3 never holds"
        found.append(("diagnostics.every", config.diagnostics.every, reason, lower))
    if stage == 3 and train.compile:
        found.append(("train.compile", "true", "stage 3 gathers weights between compiled operations", lower))
    return found


def check_module(module: nn.Module, stage: int) -> None:
    """Refuse a model whose own rules about weights or gradients ZeRO's partitions cannot follow."""
    if any(getattr(part, "zero_mean_outputs", False) for part in module.modules()):
        raise UserError(
            f"model.norm_options.recentered=true cannot run with parallel.strategy=deepspeed (ZeRO-{stage}): "
            "the mean goes from whole gradients, of which each process holds a part; use "
            "parallel.strategy: fsdp2, or remove recentered"
        )
    constraint = getattr(module.config, "weight_constraint", None)
    constrained = next(constrained_modules(module), None)
    steps = getattr(module.config, "weight_parametrization", None)
    if stage == 3 and steps is not None:
        raise UserError(
            f"model.weight_parametrization.name={steps[0]['name']} cannot run with "
            "parallel.strategy=deepspeed (ZeRO-3): gains and vectors follow from whole matrices at the start "
            "and after each step, which stage 3 never holds; use parallel.zero_stage: 2, or "
            "parallel.strategy: fsdp2"
        )
    if stage == 3 and (constraint is not None or constrained is not None):
        key = f"model.weight_constraint.name={constraint['name']}" if constraint else "model.norm"
        raise UserError(
            f"{key} cannot run with parallel.strategy=deepspeed (ZeRO-3): its weights are made to obey after "
            "each step, as whole matrices, which stage 3 never holds; use parallel.zero_stage: 2, or "
            "parallel.strategy: fsdp2"
        )


def _check_installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "parallel.strategy=deepspeed needs the package deepspeed, which is not installed; run "
            "DS_BUILD_OPS=0 pip install 'llmnorm[deepspeed]', or use parallel.strategy: fsdp2"
        )
    version = importlib.metadata.version("deepspeed")
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise UserError(
            f"parallel.strategy=deepspeed needs deepspeed 0.19 or newer, and {version} is installed; run "
            "DS_BUILD_OPS=0 pip install --upgrade deepspeed"
        )
