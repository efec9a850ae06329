"""ZeRO-1, 2 and 3 on two processes make the updates of one process, save its checkpoints and read them."""

import functools
import socket
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from deepspeed_cases import (
    CAP,
    CASES,
    DROPPING,
    MUON,
    PARITY_SLICE,
    SAVED,
    SAVING,
    VARIANTS,
    build,
    compute,
    drop_one,
    resume,
    run,
    save,
    work,
)
from parallel_cases import ROWS
from parity_cases import Backend
from test_parity import check_results

from llmnorm.training.processes import Processes

pytest.importorskip("deepspeed", reason="deepspeed is an optional extra: pip install 'llmnorm[deepspeed]'")
pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("deepspeed")]

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
FAST = [
    "zero1-muon-accumulating",
    "zero1-qk_clip-accumulating",
    "zero1-multipliers-accumulating",
    "zero2-adamw-accumulating",
    "zero2-parametrized-accumulating",
    "zero2-penalized-accumulating",
    "zero3-class_path-accumulating",
    "zero2-ngpt-whole",
    "zero2-capped-accumulating",
    "zero3-muon-whole",
    "zero3-growing-accumulating",
    "zero3-reweighted-accumulating",
]
FAST_SAVING = ["zero2-muon-whole", "zero3-adamw-whole"]
# feature -> the same case without it
WITHOUT = {
    "multipliers": {"options": {}},
    "growing": {"growing": False},
    "reweighted": {"reweighted": False},
    "qk_clip": {"options": MUON},
    "penalized": {"penalized": False},
    "parametrized": {"parametrized": ()},
}
REST = [name for name in CASES if name not in FAST]
REST_SAVING = [name for name in SAVING if name not in FAST_SAVING]


def group_of(folder, cases, saving, parity=()):
    """Results of the cases on two gloo processes, which find checkpoints of one process in `alone`."""
    for name in {name.split("-")[1] for name in saving}:
        _, update = build(VARIANTS[name], ALONE)
        run(VARIANTS[name], update, range(SAVED))
        save(update, folder / "alone" / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(2, port, str(folder), cases, saving, list(parity)), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return group_of(tmp_path_factory.mktemp("few"), FAST, FAST_SAVING, PARITY_SLICE)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return group_of(tmp_path_factory.mktemp("many"), REST, REST_SAVING)


def load(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@functools.cache
def alone(name):
    """One process, all rows in one forward pass; under autocast row by row, as bf16 products then agree."""
    case = CASES[name]
    size = case.micro_batch_size if case.precision == "bf16" or case.growing else ROWS
    return compute(replace(case, stage=0, micro_batch_size=size), ALONE)


def assert_same(result, expected, rtol=2e-6, atol=5e-6):
    """fp32 sums in another order: losses and norms differ by some 1e-7. Weights move by 1e-2 a step, and
    AdamW shows where a gradient is all rounding; a wrong update would show as 1e-3 and more.
    """
    for (loss, norm, tokens), (its_loss, its_norm, its_tokens) in zip(
        result["measured"], expected["measured"], strict=True
    ):
        assert tokens == its_tokens > 0
        assert loss == pytest.approx(its_loss, rel=rtol)
        assert norm == pytest.approx(its_norm, rel=10 * rtol)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=atol)


def assert_equals_one_process(folder, name):
    first, second = (load(folder, name, rank) for rank in (0, 1))
    assert_same(first, alone(name))
    assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])


def assert_resumes(folder, name):
    result = load(folder, f"{name}-saved")
    straight, resumed = result["straight"], result["resumed"]
    assert straight["measured"] == resumed["measured"]
    assert all(torch.equal(straight["weights"][key], resumed["weights"][key]) for key in straight["weights"])
    expected = alone(name)
    rest = {"measured": expected["measured"][SAVED:], "weights": expected["weights"]}
    assert_same(straight, rest)
    assert_same(result["from_one"], rest)
    checkpoint = folder / f"checkpoints-{name}" / f"step_{SAVED}"
    assert_same(resume(VARIANTS[name.split("-")[1]], checkpoint, ALONE), rest)


@pytest.mark.parametrize("name", FAST)
def test_two_processes_equal_one(few, name):
    assert_equals_one_process(few, name)


@pytest.mark.parametrize("strategy", PARITY_SLICE)
def test_a_slice_of_the_parity_table_equals_one_process(few, strategy):
    """Losses, and the update from one identical gradient."""
    files = [few / f"parity-{strategy}-{rank}.pt" for rank in range(2)]
    check_results(files, Backend(strategy, 2), PARITY_SLICE[strategy])


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_two_processes_equal_one_with_every_method_and_stage(many, name):
    assert_equals_one_process(many, name)


@pytest.mark.parametrize("name", FAST_SAVING)
def test_a_checkpoint_resumes_to_the_bit_and_goes_between_zero_and_one_process(few, name):
    assert_resumes(few, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", REST_SAVING)
def test_a_checkpoint_of_every_stage_resumes_to_the_bit_and_goes_between(many, name):
    assert_resumes(many, name)


@pytest.mark.parametrize("name", [name for name in DROPPING if name in FAST])
def test_a_dropped_update_leaves_no_gradient_behind(few, name):
    """The next update must be what it is where nothing was measured before."""
    assert_dropped(few, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in DROPPING if name not in FAST])
def test_a_dropped_update_leaves_no_gradient_behind_at_any_stage(many, name):
    assert_dropped(many, name)


@pytest.mark.parametrize("feature", WITHOUT)
def test_a_feature_shows_in_one_process(feature):
    """Or a ZeRO run that ignores it would pass: it moves a weight by far more than two runs may differ."""
    case = replace(CASES[f"zero1-{feature}-accumulating"], stage=0)
    plain = compute(replace(case, **WITHOUT[feature]), ALONE)["weights"]
    weights = compute(case, ALONE)["weights"]
    assert max((weights[name] - plain[name]).abs().max().item() for name in plain) > 1e-3


def test_caps_hold_under_zero(few):
    """Each matrix's singular values by torch's own SVD; some matrix is at its cap, or nothing was tested."""
    weights = load(few, "zero2-capped-accumulating")["weights"]
    norms = [
        float(torch.linalg.matrix_norm(weight.double(), 2)) * (weight.shape[1] / weight.shape[0]) ** 0.5
        for name, weight in weights.items()
        if name.endswith("proj.weight")
    ]
    assert 0.95 * CAP < max(norms) <= CAP * (1 + 1e-5)


def assert_dropped(folder, name):
    result = load(folder, f"{name}-dropped")
    expected = drop_one(replace(CASES[name], stage=0), ALONE)
    assert_same(result, expected)
    undisturbed = {"measured": alone(name)["measured"][:2], "weights": expected["weights"]}
    assert_same(result, undisturbed)
