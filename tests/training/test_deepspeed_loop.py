"""Whole runs under ZeRO on two processes against one: guards that skip and roll back, a growing batch."""

import socket

import pytest
import torch.multiprocessing as mp
from deepspeed_loop_cases import Poison, work

from llmnorm.training import train

pytest.importorskip("deepspeed", reason="deepspeed is an optional extra: pip install 'llmnorm[deepspeed]'")
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("deepspeed")]

STAGED = {"name": "staged", "stages": [{"until_step": 2, "global_batch_size": 2}]}
MUON = {"optimizer.name": "muon", "optimizer.ns_dtype": "fp32"}
# run -> stage, changes, first training sample -> the loss that its update is made to have
RUNS = {
    # Sample 36 is first read by update 10: back to the checkpoint of step 9, and on behind that update.
    "spike": (2, {**MUON, "guards.spike": {"window": 8, "threshold": 50.0}}, {36: 90.0}),
    "skip": (3, MUON, {8: float("nan")}),
    "staged": (1, {"train.batch_schedule": STAGED, "train.micro_batch_size": 1}, {}),
}


def config_of(run_config, folder, name, **changes):
    common = {"train.max_steps": 12, "checkpoint.every": 3, "evaluation.at_start": False}
    return run_config(**common, **RUNS[name][1], **{"output_dir": str(folder / name), **changes})


def test_runs_with_guards_and_stages_equal_one_process(run_config, rows, tmp_path):
    files = []
    for name, (stage, _, losses) in RUNS.items():
        zero = {"parallel.strategy": "deepspeed", "parallel.zero_stage": stage}
        config = config_of(run_config, tmp_path / "two", name, **zero)
        (tmp_path / f"{name}.yaml").write_text(config.to_yaml(), encoding="utf-8")
        files.append((str(tmp_path / f"{name}.yaml"), losses))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(2, port, files), nprocs=2)
    for name, (_, _, losses) in RUNS.items():
        with Poison(losses):
            alone = train(config_of(run_config, tmp_path / "one", name)).output_dir
        ours, theirs = rows(tmp_path / "two" / name), rows(alone)
        assert [row["step"] for row in ours] == list(range(1, 13)), name
        for here, there in zip(ours, theirs, strict=True):
            for key in ("step", "tokens", "lr"):
                assert here[key] == there[key], (name, key)
            assert here.get("skipped") == there.get("skipped"), name
            assert here.get("global_batch_size") == there.get("global_batch_size"), name
            if here.get("skipped"):
                assert here["loss"] is None and there["loss"] is None, name
                continue
            # fp32 sums in another order, and matrices that are orthogonalized: rounding grows a little.
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-5), name
            assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4), name
        assert rows(tmp_path / "two" / name, "event") == rows(alone, "event"), name
    (event,) = rows(tmp_path / "two" / "spike", "event")
    assert (event["step"], event["spike_step"], event["skipped_samples"]) == (9, 10, [36, 39])
    assert [row["step"] for row in rows(tmp_path / "two" / "skip") if row.get("skipped")] == [3]
    sizes = [row["global_batch_size"] for row in rows(tmp_path / "two" / "staged")]
    assert sizes == [2] * 2 + [4] * 10
