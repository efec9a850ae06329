"""What DeepSpeed cannot run as asked is refused with both keys before anything is built, never swapped."""

import importlib.util

import pytest
import torch

from llmnorm.config import ParallelSection, TrainSection
from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.training import zero_checks
from llmnorm.training.processes import resolve_strategy
from llmnorm.training.zero_checks import check_deepspeed, check_module, resolve_zero_stage

TWO = {"RANK": "0", "WORLD_SIZE": "2"}
ZERO2 = {**TWO, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
PREFIX = "ACCELERATE_"


def resolve(environment, strategy="auto", stage=None, grad_clip=1.0):
    parallel = ParallelSection(strategy=strategy, zero_stage=stage)
    train = TrainSection(max_steps=1, global_batch_size=2, precision="fp32", grad_clip=grad_clip)
    return resolve_strategy(parallel, train, environment)


@pytest.mark.parametrize(
    ("strategy", "stage", "environment", "expected"),
    [
        ("auto", None, ZERO2, 2),
        ("deepspeed", None, ZERO2, 2),
        ("deepspeed", 2, ZERO2, 2),
        ("deepspeed", 3, TWO, 3),
        ("deepspeed", None, TWO, 2),
        ("auto", None, {**ZERO2, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, 3),
    ],
)
def test_strategy_and_stage(strategy, stage, environment, expected):
    assert resolve(environment, strategy, stage) == "deepspeed"
    assert resolve_zero_stage(ParallelSection(strategy=strategy, zero_stage=stage), environment) == expected


@pytest.mark.parametrize(
    ("strategy", "stage", "settings", "words"),
    [
        ("ddp", None, ZERO2, ["parallel.strategy=ddp", "asks for deepspeed"]),
        ("fsdp2", None, ZERO2, ["parallel.strategy=fsdp2", "asks for deepspeed"]),
        ("deepspeed", None, {}, ["parallel.strategy=deepspeed", "torchrun"]),
        ("auto", 2, TWO, ["parallel.zero_stage=2", "ddp"]),
        ("deepspeed", 3, ZERO2, ["zero_stage: 2", "parallel.zero_stage=3"]),
        ("deepspeed", None, {**ZERO2, f"{PREFIX}DEEPSPEED_ZERO_STAGE": "0"}, ["zero_stage: 0", "1, 2 or 3"]),
        (
            "auto",
            None,
            {**ZERO2, f"{PREFIX}DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            ["offload_optimizer_device: cpu", "DeepSpeedCPUAdam", "optimizer.name"],
        ),
        ("auto", None, {**ZERO2, f"{PREFIX}DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, ["offload_param_device"]),
        ("auto", None, {**ZERO2, f"{PREFIX}DEEPSPEED_CONFIG_FILE": "ds.json"}, ["deepspeed_config_file"]),
        ("auto", None, {**ZERO2, f"{PREFIX}GRADIENT_CLIPPING": "0.5"}, ["gradient_clipping", "grad_clip=1"]),
        (
            "auto",
            None,
            {**ZERO2, f"{PREFIX}GRADIENT_ACCUMULATION_STEPS": "4"},
            ["gradient_accumulation_steps: 4", "train.micro_batch_size"],
        ),
    ],
)
def test_a_contradicting_launcher_is_an_error_with_both_sides(strategy, stage, settings, words):
    with pytest.raises(UserError) as error:
        resolve(settings, strategy, stage)
        resolve_zero_stage(ParallelSection(strategy=strategy, zero_stage=stage), settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_launcher_settings_that_agree_are_fine():
    agreed = {f"{PREFIX}GRADIENT_CLIPPING": "1.0", f"{PREFIX}GRADIENT_ACCUMULATION_STEPS": "1"}
    assert resolve({**ZERO2, **agreed, f"{PREFIX}DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}) == "deepspeed"


@pytest.fixture
def installed(monkeypatch):
    """As if deepspeed were there, also where it is not."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(zero_checks.importlib.metadata, "version", lambda name: "0.19.8")


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        (1, {"train.precision": "bf16_pure"}, ["train.precision=bf16_pure", "fp32 copy"]),
        (1, {"optimizer.name": "galore", "optimizer.weights": "int8"}, ["optimizer.weights=int8"]),
        (1, {"train.grad_clip_mode": "per_parameter"}, ["train.grad_clip_mode=per_parameter"]),
        (3, {"diagnostics.every": 2}, ["diagnostics.every=2", "parallel.zero_stage: 2"]),
        (3, {"train.compile": True}, ["train.compile=true", "parallel.zero_stage: 2"]),
        (3, {"optimizer.name": "muon", "optimizer.qk_clip": 50.0}, ["optimizer.qk_clip=50"]),
    ],
)
def test_what_partitions_cannot_carry_is_refused_with_both_keys(installed, run_config, stage, changes, words):
    config = run_config(**changes)
    with pytest.raises(UserError) as error:
        check_deepspeed(config, stage)
    message = str(error.value)
    assert all(word in message for word in [*words, f"parallel.strategy=deepspeed (ZeRO-{stage})"]), message


@pytest.mark.parametrize("name", ["adamw", "muon", "galore", "scale", "lanton"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_methods_that_run_are_not_refused(installed, run_config, name, stage):
    check_deepspeed(run_config(**{"optimizer.name": name}), stage)


def meta_model(**changes):
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    with torch.device("meta"):
        return LlmNormForCausalLM(LlmNormConfig(**sizes, num_attention_heads=2, **changes))


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        (2, {"norm": "pre_rmsnorm", "norm_options": {"recentered": True}}, ["recentered=true"]),
        (3, {"norm": "ngpt"}, ["model.norm", "parallel.zero_stage: 2"]),
        (3, {"weight_constraint": {"name": "spectral_cap"}}, ["model.weight_constraint.name=spectral_cap"]),
        (3, {"weight_parametrization": "weight_norm"}, ["model.weight_parametrization.name=weight_norm"]),
    ],
)
def test_a_model_with_rules_of_its_own_is_refused_where_they_cannot_be_kept(stage, changes, words):
    with pytest.raises(UserError, match=rf"parallel.strategy=deepspeed \(ZeRO-{stage}\)") as error:
        check_module(meta_model(**changes), stage)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_constrained_model_runs_under_stage_2():
    check_module(meta_model(norm="ngpt"), 2)


def test_a_missing_or_old_deepspeed_is_one_error_with_the_command(monkeypatch, run_config):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"deepspeed, which is not installed; run .*pip install"):
        check_deepspeed(run_config(), 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(zero_checks.importlib.metadata, "version", lambda name: "0.18.3")
    with pytest.raises(UserError, match=r"0\.19 or newer, and 0\.18\.3"):
        check_deepspeed(run_config(), 2)
