"""Two processes, sharded or not, diagnose what one process does."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from diagnosis_cases import ALONE, CASES, diagnosed, work

from llmnorm.training.processes import Processes

pytestmark = pytest.mark.distributed

ONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(2, port, str(folder)), nprocs=2)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in CASES
    }


@pytest.fixture(scope="module")
def alone():
    return {tied: diagnosed(next(c for c in ALONE.values() if c.tied == tied), ONE) for tied in (False, True)}


@pytest.mark.parametrize("name", CASES)
def test_o14_two_processes_diagnose_the_same_numbers(pair, alone, name) -> None:
    expected = alone[CASES[name].tied]["rows"]
    for result in pair[name]:
        for row, its in zip(result["rows"], expected, strict=True):
            assert row.keys() == its.keys()
            for key, value in its.items():
                # The weights of later steps differ by rounding, which Adam's first steps enlarge.
                assert row[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
        first, its_first = result["rows"][0], expected[0]
        for key in (key for key in first if key.startswith("diagnostics/gradient_norm")):
            assert first[key] == pytest.approx(its_first[key], rel=2e-6), key
    assert pair[name][0]["rows"] == pair[name][1]["rows"], "both processes know the same"


@pytest.mark.parametrize("name", CASES)
def test_diagnostics_change_no_weight_under_two_processes(pair, name) -> None:
    for result in pair[name]:
        for parameter, value in result["weights"].items():
            assert torch.equal(value, result["unwatched"][parameter]), parameter
