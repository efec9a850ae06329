"""The strategy is the launcher's or the config's, and never silently neither."""

import pytest
import torch.distributed as dist

from llmnorm.config import ParallelSection, TrainSection
from llmnorm.errors import UserError
from llmnorm.training.processes import lost_process, resolve_strategy, start_processes

ALONE: dict[str, str] = {}
ONE = {"RANK": "0", "WORLD_SIZE": "1"}
TWO = {"RANK": "0", "WORLD_SIZE": "2"}
FSDP2 = {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP1 = {**TWO, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}


def resolve(strategy, environment, precision="bf16", **options):
    parallel = ParallelSection(strategy=strategy, **options)
    return resolve_strategy(
        parallel, TrainSection(max_steps=1, global_batch_size=1, precision=precision), environment
    )


@pytest.mark.parametrize(
    ("strategy", "environment", "expected"),
    [
        ("auto", ALONE, "none"),
        ("auto", ONE, "none"),
        ("auto", TWO, "ddp"),
        ("auto", FSDP2, "fsdp2"),
        ("none", ALONE, "none"),
        ("ddp", TWO, "ddp"),
        ("ddp", ONE, "ddp"),
        ("fsdp2", TWO, "fsdp2"),
        ("fsdp2", FSDP2, "fsdp2"),
    ],
)
def test_strategy(strategy, environment, expected):
    assert resolve(strategy, environment) == expected


@pytest.mark.parametrize(
    ("strategy", "environment", "words"),
    [
        ("none", TWO, ["parallel.strategy=none", "2 processes"]),
        ("ddp", ALONE, ["parallel.strategy=ddp", "torchrun"]),
        ("fsdp2", ALONE, ["parallel.strategy=fsdp2", "torchrun"]),
        ("ddp", FSDP2, ["parallel.strategy=ddp", "asks for fsdp2"]),
        ("none", FSDP2, ["parallel.strategy=none", "asks for fsdp2"]),
        ("auto", FSDP1, ["FSDP version 1", "fsdp_version: 2"]),
        ("fsdp2", FSDP1, ["FSDP version 1"]),
    ],
)
def test_a_contradiction_is_an_error_with_both_sides(strategy, environment, words):
    with pytest.raises(UserError) as error:
        resolve(strategy, environment)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("settings", "precision", "options", "key"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "bf16", {}, "train.precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "fp32", {}, "train.precision=fp32"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "bf16", {}, "parallel.cpu_offload=false"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "bf16", {}, "parallel.reshard_after_forward=true"),
    ],
)
def test_a_launcher_setting_that_we_would_ignore_is_refused(settings, precision, options, key):
    with pytest.raises(UserError, match="contradicts") as error:
        resolve("auto", {**FSDP2, **settings}, precision, **options)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("environment", "key", "value", "reader"),
    [
        (TWO, "replicas", 2, "fsdp2"),
        (TWO, "cpu_offload", True, "fsdp2"),
        (TWO, "zero_stage", 2, "deepspeed"),
        (FSDP2, "share_updates", False, "ddp"),
        ({**TWO, "ACCELERATE_USE_DEEPSPEED": "true"}, "reshard_after_forward", False, "fsdp2"),
        ({**TWO, "ACCELERATE_USE_DEEPSPEED": "true"}, "replicas", 2, "fsdp2"),
    ],
)
def test_a_key_of_another_strategy_than_the_one_that_auto_found_is_refused(environment, key, value, reader):
    with pytest.raises(UserError) as error:
        resolve("auto", environment, **{key: value})
    assert f"parallel.{key}={str(value).lower()} does nothing with parallel.strategy=auto" in str(error.value)
    assert f"set parallel.strategy: {reader}" in str(error.value)


def test_keys_of_several_processes_may_stay_where_one_goes_on():
    assert resolve("auto", ALONE, replicas=4, share_updates=False) == "none"


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure", "fp32"])
def test_launcher_settings_that_agree_or_say_nothing_are_fine(precision):
    agreed = {"ACCELERATE_MIXED_PRECISION": "bf16"} if precision != "fp32" else {}
    assert resolve("auto", {**FSDP2, "ACCELERATE_MIXED_PRECISION": "no"}, precision) == "fsdp2"
    assert (
        resolve("auto", {**FSDP2, "FSDP_OFFLOAD_PARAMS": "false", **agreed}, precision, cpu_offload=False)
        == "fsdp2"
    )


def test_a_process_of_its_own_is_rank_zero_of_one():
    processes = start_processes()
    assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited"),
    ],
)
def test_a_collective_without_its_peer_says_where_and_how_to_go_on(error):
    lost = lost_process(error, "after step 7")
    for part in ("after step 7", "has died or does not answer", str(error), "--max-restarts"):
        assert part in str(lost)


def test_other_errors_are_not_called_a_lost_process():
    assert lost_process(RuntimeError("CUDA error: an illegal memory access"), "after step 7") is None
