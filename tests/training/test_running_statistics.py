"""O14: statistics over two processes are those of one; resumed, skipped and exported with the weights."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from statistics_cases import APART, CASES, WHOLE, Case, batches, build, compute, work

from llmnorm.checkpoint import newest_checkpoint
from llmnorm.errors import UserError
from llmnorm.export import export_checkpoint
from llmnorm.export.source import load_model
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.training import train
from llmnorm.training.processes import Processes

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
NORMS = tuple(WHOLE)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Results of every case on two gloo processes; one group computes them all."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(2, port, str(folder)), nprocs=2)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in CASES
    }


def assert_same(result: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """fp32: sums in another order; a weight may differ by a part of Adam's first steps of lr = 1e-2."""
    for (loss, norm, tokens), (its_loss, its_norm, its_tokens) in zip(
        result["measured"], expected["measured"], strict=True
    ):
        assert tokens == its_tokens == 23
        assert loss == pytest.approx(its_loss, rel=rtol)
        assert norm == pytest.approx(its_norm, rel=10 * rtol)
    for name, value in expected["state"].items():
        statistic = name.rpartition(".")[2] not in ("weight", "bias", "identity_scale")
        scale = value.abs().max().item() or 1.0
        tolerance = 30 * rtol * scale if statistic else 1e-3
        torch.testing.assert_close(result["state"][name], value, rtol=0, atol=tolerance, msg=name)
        if name.endswith("updates"):
            assert value.item() == 4


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("norm", NORMS)
def test_o14_two_processes_equal_one(pair, norm: str, strategy: str) -> None:
    """Half of the batch on each: the statistics of the forward and the backward pass are of the whole.
    Under FSDP2 the layers are computed again as well.
    """
    expected = compute(WHOLE[norm], ALONE)
    for result in pair[f"{strategy}-{norm}"]:
        assert_same(result, expected)


@pytest.mark.distributed
@pytest.mark.parametrize("norm", NORMS)
def test_o14_accumulating_equals_processes_that_keep_their_batch(pair, norm: str) -> None:
    """`synchronize: false`: two micro-batches in one process are two processes; the statistics are pooled."""
    case = APART[norm]
    expected = compute(Case(norm, case.options, micro_batch_size=2), ALONE)
    for result in pair[f"apart-{norm}"]:
        assert_same(result, expected)
    assert expected["measured"][1][0] != pytest.approx(compute(case, ALONE)["measured"][1][0], rel=1e-5)


@pytest.mark.distributed
def test_processes_end_with_identical_statistics(pair) -> None:
    for name in CASES:
        first, second = (result["state"] for result in pair[name])
        assert all(torch.equal(first[key], second[key]) for key in first), name


@pytest.mark.distributed
def test_bf16_statistics_are_fp32_under_fsdp2(pair) -> None:
    result, exact = pair["bf16"][0], compute(WHOLE["prepbn"], ALONE)
    for name, value in exact["state"].items():
        assert result["state"][name].dtype == value.dtype
    assert result["measured"][0][0] == pytest.approx(exact["measured"][0][0], rel=2**-8)


@pytest.mark.parametrize("norm", NORMS)
def test_a_dropped_step_leaves_no_trace(norm: str) -> None:
    model, update = build(WHOLE[norm], ALONE)
    update.measure(batches(WHOLE[norm], 0, ALONE))
    update.apply(1.0)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    update.measure(batches(WHOLE[norm], 1, ALONE))
    update.drop()
    update.measure(batches(WHOLE[norm], 1, ALONE))
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    update.apply(1.0)
    model_, update_ = build(WHOLE[norm], ALONE)
    for step in range(2):
        update_.measure(batches(WHOLE[norm], step, ALONE))
        update_.apply(1.0)
    assert model.module.model.norm.step == 2
    after = model_.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in model.module.state_dict().items())


def run_options(norm: str) -> dict[str, Any]:
    options = {
        "powernorm": {"statistics_warmup": 3},
        "unified_norm": {"statistics_warmup": 0, "window": 2},
        "prepbn": {"hold_steps": 1, "interpolation_steps": 4},
    }[norm]
    return {"model.norm": norm, "model.norm_options": options, "train.micro_batch_size": 2}


@pytest.mark.parametrize(
    "norm", [*(pytest.param(norm, marks=pytest.mark.slow) for norm in NORMS[:2]), NORMS[2]]
)
def test_o12_o15_resume_is_bit_identical(run_config, rows, tmp_path: Path, norm: str) -> None:
    """Six updates against the same run thrown back to its checkpoint of the second: every metric and every
    tensor to the last bit, and lambda by the counter in the checkpoint.
    """
    config = run_config(**run_options(norm))
    train(config)
    run = tmp_path / "run"
    straight = [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)]
    evaluated = [row["eval/loss"] for row in rows(run, "eval/loss")]
    expected = load_model(run).state_dict()
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step}", ignore_errors=True)
    assert newest_checkpoint(run / "checkpoints").name == "step_2"
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] < 3]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    train(config)
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run)] == straight
    assert [row["eval/loss"] for row in rows(run, "eval/loss")] == evaluated
    found = load_model(run)
    assert found.model.norm.step == 6
    for name, value in expected.items():
        assert torch.equal(found.state_dict()[name], value), name


def test_o15_a_run_is_exported_with_its_statistics(run_config, tmp_path: Path) -> None:
    """Loaded from its repository by transformers alone, in bf16: fp32 statistics, to the last bit."""
    train(run_config(**run_options("prepbn")))
    model = load_model(tmp_path / "run")
    folder = export_checkpoint(tmp_path / "run", tmp_path / "export", dtype=torch.bfloat16)
    exported = LlmNormForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if "rotary" not in name:
            assert torch.equal(exported.get_buffer(name), buffer), name
    assert exported.model.norm.weight.dtype == torch.bfloat16
    assert exported.model.norm.step == 6 and exported.model.norm.token_share == 0.0
    assert exported.model.norm.running_variance.dtype == torch.float32
    assert (exported.model.norm.running_variance != 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.norm_options": {"hold_steps": 3, "interpolation_steps": 4}},
            r"hold_steps=3 and interpolation_steps=4 end after 7 updates.*train\.max_steps=6.*"
            r"interpolation_steps: 4, four fifths",
        ),
        (
            {"model.norm_options": {"interpolation_steps": 4}, "data.document_masking": True},
            r"data\.document_masking=true keeps documents apart, and model\.norm_options\.statistics=batch",
        ),
        (
            {"model.norm_options": {"interpolation_steps": 4}, "train.compile": True},
            r"train\.compile=true does not go with model\.norm=prepbn",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    run_config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(run_config(**{"model.norm": "prepbn", **changes}))
    assert not (tmp_path / "run").exists()
