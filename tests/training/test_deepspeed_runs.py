"""train.py under DeepSpeed: the rows of one process, a checkpoint that one goes on from, clean ends."""

import pytest
from test_launched_runs import launch

from llmnorm.training import train

pytest.importorskip("deepspeed", reason="deepspeed is an optional extra: pip install 'llmnorm[deepspeed]'")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def ask_for(monkeypatch, stage, **settings):
    """The environment that configs/accelerate/zeroN.yaml makes."""
    settings = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": str(stage), **settings}
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


@pytest.mark.parametrize(("stage", "method"), [(1, "galore"), (2, "muon"), (3, "adamw")])
def test_two_processes_then_one_equal_one_process_all_along(
    run_config, rows, tmp_path, monkeypatch, stage, method
):
    """With evaluation, samples, export and report; a process group that is left open would abort."""
    common = {
        "optimizer.name": method,
        "schedule.name": "constant",
        "evaluation.every": 2,
        "evaluation.at_start": True,
        "checkpoint.every": 2,
        "train.micro_batch_size": 1,
        "train.sample_every": 2,
        "train.sample_tokens": 3,
        "train.sample_prompt": "First",
    }
    alone = train(run_config(**common, **{"output_dir": str(tmp_path / "alone"), "train.max_steps": 6}))
    with monkeypatch.context() as patch:
        ask_for(patch, stage)
        printed = launch(run_config(**common, **{"train.max_steps": 4, "export.at_end": True}), tmp_path)
    assert f"2 x cpu (deepspeed ZeRO-{stage}, fp32), 4 sequences per update = 1 x 2 x 2" in printed
    assert (tmp_path / "run" / "export" / "config.json").exists()
    train(run_config(**common, **{"train.max_steps": 6}))
    # fp32 sums in another order, and methods that divide by what is small: rounding grows a little each step.
    for here, there in zip(rows(tmp_path / "run"), rows(alone.output_dir), strict=True):
        assert (here["step"], here["tokens"], here["lr"]) == (there["step"], there["tokens"], there["lr"])
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-4)
    for here, there in zip(
        rows(tmp_path / "run", "eval/loss"), rows(alone.output_dir, "eval/loss"), strict=True
    ):
        assert here["step"] == there["step"] and here["eval/tokens"] == there["eval/tokens"]
        assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-5)


def test_a_refused_setting_ends_every_process_with_2_and_writes_nothing(run_config, tmp_path, monkeypatch):
    ask_for(monkeypatch, 2, DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu")
    with pytest.raises(AssertionError, match=r"DeepSpeedCPUAdam[\s\S]*exitcode\s*: 2") as failed:
        launch(run_config(), tmp_path)
    assert "Traceback" not in str(failed.value).split("error: offload_optimizer_device")[1].split("\n")[0]
    assert not (tmp_path / "run").exists()
