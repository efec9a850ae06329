"""Bytes that every optimizer sends in a step under FSDP2, beside FSDP2's own, and where each stops scaling.

    python benchmarks/communication.py [--sizes 1b 7b] [--processes 8 64]
        [--tokens 8192] [--utilization 0.4] [--peak 989e12] [--node 8] [--fast 300e9] [--slow 25e9]

Nothing is run: shapes alone decide (`llmnorm.optim.communication`, which tests compare with counted bytes).
The step-time model takes a GPU's speed as parameters, because none has been measured yet:

    forward and backward    6 N tokens / (utilization peak)
    FSDP2's messages        hidden behind them, in so far as they take no longer
    the optimizer's own     not hidden: bytes / bandwidth, and 20 us per message and doubling of processes
    element-wise part       16 bytes per element of the shard / 3 TB/s
    whole matrices          the load of the busiest owner: matrix products of its updates, counted by torch's
                            flop counter on the meta device, at half the utilized speed

Bandwidth per GPU is `fast` where the processes fit a node and `slow` beyond. Decompositions (GaLore's SVD,
Conda's eigenvectors) are not products and not counted. Writes benchmarks/results/communication.json and the
tables of docs/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tables import put_into

from llmnorm.config import PRESETS
from llmnorm.evaluation import describe_environment
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.optim import Role, create_optimizer, route_parameters
from llmnorm.optim.communication import backend_bytes, optimizer_bytes, owner_load
from llmnorm.training.combinations import combination_table

HERE = Path(__file__).parent
RESULT = HERE / "results" / "communication.json"
PAGE = HERE.parent / "docs" / "distributed.md"
VOCABULARY = 32_000
# row -> method and options
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "scale": ("scale", {}),
    "sinkgd": ("sinkgd", {}),
    "lamb": ("lamb", {}),
    "stable_spam": ("stable_spam", {}),
    "apollo": ("apollo", {}),
    "apollo, side: right": ("apollo", {"side": "right"}),
    "apollo_mini": ("apollo_mini", {}),
    "apollo_mini, side: right": ("apollo_mini", {"side": "right"}),
    "galore": ("galore", {}),
    "muon": ("muon", {}),
    "muon, ns_dtype: fp32": ("muon", {"ns_dtype": "fp32"}),
    "normuon": ("normuon", {}),
    "swan": ("swan", {}),
    "lanton": ("lanton", {}),
    "psgd_kron": ("psgd_kron", {}),
}
SCALES = (8, 16, 32, 64, 128, 256, 512, 1024)
SCALED = ("adamw", "scale", "sinkgd", "apollo, side: right", "muon", "lanton")
LATENCY, MEMORY_BANDWIDTH = 20e-6, 3e12


def model_of(size: str) -> LlmNormForCausalLM:
    sizes = PRESETS[size].sizes(paper_exact=False)
    with torch.device("meta"):
        return LlmNormForCausalLM(LlmNormConfig(vocab_size=VOCABULARY, norm="mix_ln", **sizes))


def matrices_of(model: LlmNormForCausalLM) -> list[tuple[torch.Size, bool]]:
    """(shape, in a block) of everything that FSDP2 cuts."""
    routed = [routed for routed in route_parameters(model) if routed.role is not Role.VECTOR]
    return [(routed.parameter.shape, routed.role is Role.HIDDEN_MATRIX) for routed in routed]


def bytes_of(size: str, processes: list[int]) -> dict[str, Any]:
    """row -> processes -> the step's bytes and their ratio to FSDP2's."""
    model, found = model_of(size), {}
    for row, (method, options) in ROWS.items():
        optimizer = create_optimizer(method, model, lr=1e-3, **options)
        found[row] = {}
        for count in processes:
            backend = backend_bytes(matrices_of(model), count)
            own = optimizer_bytes(optimizer, count)
            found[row][str(count)] = {
                "backend": round(sum(backend.values())),
                "sums": round(own.sums),
                "to_owners": round(own.to_owners),
                "to_holders": round(own.to_holders),
                "ratio": round(own.total / sum(backend.values()), 5),
            }
        print(size, row, found[row], flush=True)
    return found


def step_times(size: str, hardware: argparse.Namespace) -> dict[str, Any]:
    """row -> processes -> milliseconds of a step, by the model above."""
    model, found = model_of(size), {}
    elements = sum(shape.numel() for shape, _ in matrices_of(model))
    speed = hardware.utilization * hardware.peak
    for row in SCALED:
        method, options = ROWS[row]
        optimizer = create_optimizer(method, model, lr=1e-3, **options)
        found[row] = {}
        for count in SCALES:
            bandwidth = hardware.fast if count <= hardware.node else hardware.slow
            compute = 6 * elements * hardware.tokens / speed
            backend = sum(backend_bytes(matrices_of(model), count).values()) / bandwidth
            own = optimizer_bytes(optimizer, count)
            messages = own.messages * LATENCY * math.log2(count)
            update = 16 * elements / count / MEMORY_BANDWIDTH + owner_load(optimizer, count) / (speed / 2)
            total = max(compute, backend) + own.total / bandwidth + messages + update
            found[row][str(count)] = round(1e3 * total, 2)
        print(size, row, found[row], flush=True)
    return found


def bytes_table(results: dict[str, Any], processes: list[int]) -> str:
    columns = [(size, str(count)) for size in results for count in processes]
    heads = " | ".join(f"{size}, {count} processes" for size, count in columns)
    lines = [f"| optimizer | {heads} |", f"|---|{'---:|' * len(columns)}"]
    for row in ROWS:
        cells = []
        for size, count in columns:
            cell = results[size][row][count]
            own = cell["sums"] + cell["to_owners"] + cell["to_holders"]
            cells.append(f"{own / 1e6:,.1f} MB, +{100 * cell['ratio']:.2f} %")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def times_table(results: dict[str, Any]) -> str:
    lines = []
    for size, rows in results.items():
        lines += [
            f"| {size}: optimizer | {' | '.join(map(str, SCALES))} |",
            f"|---|{'---:|' * len(SCALES)}",
        ]
        lines += [
            f"| {row} | {' | '.join(f'{times[str(count)]:,.0f}' for count in SCALES)} |"
            for row, times in rows.items()
        ]
        lines.append("")
    return "\n".join(lines[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["1b", "7b"], choices=sorted(PRESETS))
    parser.add_argument("--processes", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--tokens", type=float, default=8192, help="per GPU and step")
    parser.add_argument("--utilization", type=float, default=0.4, help="of the peak, forward and backward")
    parser.add_argument("--peak", type=float, default=989e12, help="bf16 products per second of a GPU")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--fast", type=float, default=300e9, help="bytes per second and GPU within a node")
    parser.add_argument("--slow", type=float, default=25e9, help="bytes per second and GPU between nodes")
    parser.add_argument("--smoke", action="store_true", help="print the tables, write nothing")
    arguments = parser.parse_args()
    sizes = {size: bytes_of(size, arguments.processes) for size in arguments.sizes}
    times = {size: step_times(size, arguments) for size in arguments.sizes}
    tables = {
        "combinations": combination_table(),
        "bytes": bytes_table(sizes, arguments.processes),
        "step times": times_table(times),
    }
    if arguments.smoke:
        print("\n\n".join(tables.values()))
        return
    record = {
        "what": "bytes that one process sends per optimizer step (mean over processes), FSDP2, bf16 weights, "
        "fp32 gradients, one micro-batch; modeled milliseconds per step",
        "formula": "sums: 2 (P-1)/P of what rules ask for; owners: elements not already there / P, gradients "
        "in the gradient's dtype, updates in the update's; factors in place of updates are sums",
        "command": " ".join(["python", "benchmarks/communication.py", *sys.argv[1:]]),
        "assumed": {
            key: getattr(arguments, key) for key in ("tokens", "utilization", "peak", "node", "fast", "slow")
        },
        "environment": describe_environment(),
        "bytes": sizes,
        "milliseconds": times,
    }
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, table in tables.items():
        put_into(PAGE, name, table)


if __name__ == "__main__":
    main()
