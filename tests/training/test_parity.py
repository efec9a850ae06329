"""The parity table: every optimizer under every strategy trains as one process does."""

import importlib.util
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from parity_cases import Backend, Run, losses, once, resumable, runs, save_and_go_on, trained, updated, work

from llmnorm.optim.registry import METHODS
from llmnorm.training.combinations import combination_table, combinations
from llmnorm.training.processes import Processes
from llmnorm.training.state_by_rank import Layout, state_by_rank

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is an optional extra: pip install 'llmnorm[deepspeed]'",
)
ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
# Relative, of the loss at every step: sums in another order leave 1e-7 in fp32, which orthogonalization and
# bases amplify; an engine in bf16 may round the other way, 2^-9 of an entry of an update of 1e-3.
ELEMENTWISE_OR_ROWS, WHOLE, BF16 = 1e-6, 1e-5, 1e-4


def tolerance(run: Run) -> float:
    if run.bf16_engine:
        return BF16
    return WHOLE if "owner" in combinations()[run.method]["fsdp2"] else ELEMENTWISE_OR_ROWS


def compare(tmp_path, backend: Backend, chosen: list[Run]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(backend, chosen, port, str(tmp_path)), nprocs=backend.processes)
    check_results([tmp_path / f"{rank}.pt" for rank in range(backend.processes)], backend, chosen)


def check_results(files: list[Path], backend: Backend, chosen: list[Run]) -> None:
    """What each rank wrote against one process, over all of `chosen`."""
    by_rank = [torch.load(file, weights_only=True) for file in files]
    wrong = {}
    for run in chosen:
        expected = torch.tensor(losses(run, Backend(), ALONE)[0], dtype=torch.float64)
        for found in by_rank:
            error = (torch.tensor(found[run.name][0], dtype=torch.float64) / expected - 1).abs().max().item()
            if not error <= tolerance(run):
                wrong[run.name] = error
        planned, held = planned_bytes(run, backend), [found[run.name][1] for found in by_rank]
        if held != pytest.approx(planned, rel=0.02):
            wrong[f"{run.name} bytes"] = (held, planned)
    assert not wrong
    if backend.section.zero_stage:
        for found in by_rank:
            compare_updates(found["updated"], chosen)


def planned_bytes(run: Run, backend: Backend) -> list[int]:
    """What the plan says of the state of each rank; replicas hold the same."""
    model, update = resumable(run, Backend(), ALONE)
    section = backend.section
    layout = Layout(section.strategy, backend.processes, section.replicas)
    roles = state_by_rank(model.module, update.optimizer, layout)
    shares = [sum(sum(kinds) for kinds in held.values()) for held in roles]
    return [shares[rank % len(shares)] for rank in range(backend.processes)]


def compare_updates(found: dict[str, dict[str, torch.Tensor]], chosen: list[Run]) -> None:
    """An update of ZeRO against one process, from one gradient: 1e-6 of it beside the weight's rounding."""
    for run in once(chosen):
        start = dict(resumable(run, Backend(), ALONE)[0].module.named_parameters())
        for name, weight in updated(run, Backend(), ALONE).items():
            update = (weight - start[name]).abs().max().item()
            assert update > 0, (run.name, name)
            rounding = 2**-23 * weight.abs().max().item()
            torch.testing.assert_close(
                found[run.name][name],
                weight,
                rtol=0,
                atol=1e-6 * update + rounding,
                msg=lambda text, place=(run.name, name): f"{place}: {text}",
            )


@pytest.mark.distributed
def test_a_slice_of_the_parity_table_equals_one_process(tmp_path):
    methods = ("adamw", "scale", "sinkgd", "apollo", "muon", "lanton")
    compare(tmp_path, Backend("fsdp2", 2), [Run(method, 5, 4) for method in methods])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_every_optimizer_equals_one_process(tmp_path, strategy, processes):
    compare(tmp_path, Backend(strategy, processes), runs(20))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_every_optimizer_under_zero_equals_one_process(tmp_path, strategy, processes):
    compare(tmp_path, Backend(strategy, processes), runs(20))


@pytest.mark.slow
@pytest.mark.distributed
def test_replicas_of_a_sharded_model_equal_one_process(tmp_path):
    """HSDP: two replicas, each over two processes."""
    compare(tmp_path, Backend("fsdp2", 4, replicas=2), runs(20))


def go_on(tmp_path, saver: Backend, readers: list[Backend], chosen: list[Run]) -> None:
    """State that owners keep, saved by `saver`, is found under other layouts and by one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(save_and_go_on, args=(saver, readers, chosen, port, str(tmp_path)), nprocs=saver.processes)
    found = torch.load(tmp_path / "0.pt", weights_only=True)
    for run in chosen:
        half = run.steps // 2
        model, update = resumable(run, Backend(), ALONE)
        model.restore(update.optimizer, tmp_path / run.name / f"step_{half}")
        ways = {"none": trained(update, run, ALONE, half, run.steps)}
        ways |= {reader.strategy: found[f"{run.name}/{reader.strategy}"] for reader in readers}
        for way, result in ways.items():
            expected = losses(run, Backend(), ALONE)[0][half:]
            assert result == pytest.approx(expected, rel=tolerance(run)), f"{run.name} {way}"


@pytest.mark.distributed
def test_a_checkpoint_of_owners_goes_on_under_ddp_fsdp2_and_one_process(tmp_path):
    readers = [Backend("ddp", 2), Backend("fsdp2", 2)]
    go_on(
        tmp_path,
        Backend("fsdp2", 2),
        readers,
        [Run(method, 4, 4) for method in ("muon", "novograd", "apollo")],
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_every_checkpoint_of_four_processes_and_replicas_goes_on(tmp_path):
    readers = [Backend("ddp", 4), Backend("fsdp2", 4, replicas=2)]
    go_on(tmp_path, Backend("fsdp2", 4), readers, [Run(method, 6, 4) for method in combinations()])


def test_the_table_has_a_cell_for_every_method_and_strategy():
    cells = combinations()
    assert set(cells) == set(METHODS)
    assert all(set(row) == {"none", "ddp", "fsdp2", "zero1", "zero2", "zero3"} for row in cells.values())
    ways = {name: row["fsdp2"] for name, row in cells.items()}
    assert ways["adamw"] == ways["spam"] == "local"
    assert ways["scale"] == ways["sinkgd"] == ways["lamb"] == "rows"
    assert ways["muon"] == ways["galore"] == "owner"
    assert ways["apollo"] == "rows, owner"  # a wide matrix is projected on its left
    assert cells["muon"]["ddp"] == "owner"
    assert cells["scale"]["ddp"] == "local"
    assert [cells[name]["zero3"] for name in ("adamw", "muon", "lanton")] == ["local", "owner", "owner"]
    assert "| adamw | local | local | local | local | local | local |" in combination_table()
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    assert f"<!-- combinations -->\n{combination_table()}\n<!-- end" in page.read_text(encoding="utf-8")
