"""Bytes of a step: the formula of `communication.py` against what collectives are seen to send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matrix_cases import SHAPES, gradients, groups
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmnorm.optim.communication import StepBytes, backend_bytes, optimizer_bytes, owner_load
from llmnorm.optim.owners import assign_owners, matrix_cost
from llmnorm.optim.registry import MATRIX_METHODS

WORLD = 2
MATRICES = {name: shape for name, (_, shape) in SHAPES.items() if len(shape) == 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MATRIX_METHODS},
    "apollo_right": ("apollo", {"side": "right"}),
    "apollo_svd": ("apollo", {"projection": "svd"}),
}


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this process sends to others in its context, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name.startswith("c10d::"):
            self.sent[name] = self.sent.get(name, 0) + self._bytes(name, args)
        return function(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> float:
        rank = dist.get_rank()
        if name == "c10d::allreduce_":
            return sum(2 * (WORLD - 1) / WORLD * t.nbytes for t in args[0])
        if name == "c10d::alltoall_base_":
            outgoing, splits = args[1], args[4]
            return (outgoing.numel() - splits[rank]) * outgoing.element_size()
        raise AssertionError(f"{name} is not in the formula")


def matrices_only() -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in MATRICES.items()}


def _count(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))

    def cut(whole: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    found = {}
    for name, (method, options) in CASES.items():
        parameters = {key: cut(whole).requires_grad_() for key, whole in matrices_only().items()}
        optimizer = MATRIX_METHODS[method](groups(parameters), **options)
        for grads in gradients(1):
            for key, parameter in parameters.items():
                parameter.grad = cut(grads[key])
        with SentBytes() as counter:
            optimizer.step()
        found[name] = counter.sent
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_the_formula_equals_the_bytes_that_collectives_send(tmp_path: Path) -> None:
    mp.spawn(_count, args=(str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=WORLD)
    counted = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(WORLD)]
    for name, (method, options) in CASES.items():
        optimizer = MATRIX_METHODS[method](groups(matrices_only()), **options)
        expected = optimizer_bytes(optimizer, WORLD)
        mean = {
            operation: sum(found[name].get(operation, 0) for found in counted) / WORLD
            for operation in ("c10d::allreduce_", "c10d::alltoall_base_")
        }
        # LANTON joins the noises of its layers besides: 4 bytes for each of seven, over two families.
        noise = 4 * len(MATRICES) if method == "lanton" else 0
        assert mean["c10d::allreduce_"] == pytest.approx(expected.sums + noise), name
        assert mean["c10d::alltoall_base_"] == pytest.approx(expected.to_owners + expected.to_holders), name


def test_rules_by_rows_ask_for_what_their_equations_need() -> None:
    """SCALE: one number per matrix, and the columns of the embedding; SinkGD: all columns, six times."""
    columns = sum(shape[1] for name, shape in MATRICES.items() if SHAPES[name][0] == "hidden_matrix")
    scale = optimizer_bytes(MATRIX_METHODS["scale"](groups(matrices_only())), 2)
    assert scale == StepBytes(sums=4.0 * (len(MATRICES) - 1 + 12), messages=1)
    sinkgd = optimizer_bytes(MATRIX_METHODS["sinkgd"](groups(matrices_only())), 2)
    assert sinkgd == StepBytes(sums=4.0 * 6 * columns, messages=6)


def test_owners_move_a_process_count_th_of_what_gathering_moves() -> None:
    """2 (P - 1) / P^2 of all elements, not 2 (P - 1) / P: the reason that Muon's share falls with P."""
    weight = {"up_proj": torch.ones(64, 32)}
    muon = [("up_proj", tensor) for tensor in weight.values()]
    for processes in (2, 4, 8):
        found = optimizer_bytes(MATRIX_METHODS["muon"](muon, ns_dtype="fp32"), processes)
        assert found.total == pytest.approx(2 * 4 * 64 * 32 * (processes - 1) / processes**2)


def test_owners_of_apollo_send_factors_back_and_not_updates() -> None:
    """down_proj, wide: the gradient to its owner and a number for each column to all; with a sketch of one
    row no owner, but that row and the squares of the columns, summed once."""
    m, n, processes = 16, 64, 4
    weight, role = torch.ones(m, n), "hidden_matrix"
    group = [{"params": [("down_proj", weight)], "role": role}]
    found = optimizer_bytes(MATRIX_METHODS["apollo"](group), processes)
    share = (processes - 1) / processes
    assert found.to_owners == 4 * m * n * share / processes
    assert found.to_holders == 0 and found.sums == pytest.approx(2 * share * 4 * n)
    mini = optimizer_bytes(MATRIX_METHODS["apollo_mini"](group), processes)
    assert mini == StepBytes(sums=pytest.approx(2 * share * 4 * 2 * n), messages=1)


def test_backend_bytes_count_padded_rows() -> None:
    """5 rows on 4 processes are padded to 8: gathered twice in 2 bytes and scattered once in 4."""
    found = backend_bytes([((5, 3), True)], 4)
    assert found == {"weights": 0.75 * 8 * 3 * 4, "gradients": 0.75 * 8 * 3 * 4}


def test_owners_share_the_work_within_the_bound_of_longest_first() -> None:
    costs = [matrix_cost(shape) for shape in [(64, 64)] * 4 + [(172, 64)] * 2 + [(64, 172)]] * 6
    for processes in (1, 2, 4, 8):
        owners = assign_owners(costs, processes)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(processes)]
        best = max(sum(costs) / processes, max(costs))
        assert max(loads) <= (4 / 3 - 1 / (3 * processes)) * best
        assert assign_owners(costs, processes) == owners


def test_owner_load_counts_the_products_of_newton_schulz() -> None:
    """Per step of the quintic: A = X X^T, A A, and B X; 5 steps of an m x n matrix with m <= n."""
    m, n = 16, 32
    muon = MATRIX_METHODS["muon"]([("down_proj", torch.ones(m, n))])
    assert owner_load(muon, 4) == 5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


def test_owners_have_about_equal_shares_and_are_the_same_everywhere():
    sizes = [100, 1, 50, 50, 30, 30, 30, 9]
    owners = assign_owners(sizes, 3)
    loads = [
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(3)
    ]
    assert owners == assign_owners(sizes, 3) and sorted(loads) == [90, 100, 110]


def test_the_page_shows_what_was_written_beside_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of docs/distributed.md come from communication.json and nowhere else."""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    import communication  # type: ignore[import-not-found]

    record = json.loads((benchmarks / "results" / "communication.json").read_text(encoding="utf-8"))
    page = (benchmarks.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    for name, table in (
        ("bytes", communication.bytes_table(record["bytes"], [8, 64])),
        ("step times", communication.times_table(record["milliseconds"])),
    ):
        assert f"<!-- {name} -->\n{table}\n<!-- end of {name} -->" in page, name
