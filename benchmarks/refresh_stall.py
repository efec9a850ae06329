"""The longest step of GaLore against its usual one: every matrix finds its subspace at once, or in turns.

    python benchmarks/refresh_stall.py [--size 60m] [--gap 200] [--projections svd power]
    python benchmarks/refresh_stall.py --table [--into docs/optimizers.md]

A whole model of the shape with random weights and gradients. `usual` is the median of steps that find no
basis, `at once` a step that finds all of them, as happens every T steps without `stagger`, and `in turns`
the step of those T in which the most matrices have their turn. On a CPU times are the process's own, so that
what else the machine does is not in them. Written to benchmarks/results/refresh_stall.json, one record per
kind of device. Default sizes: 2m on a CPU, 60m on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from optimizer_step import DTYPES, LR, give_gradients, random_model
from tables import put_into

from llmnorm import create_optimizer
from llmnorm.config import PRESETS
from llmnorm.evaluation import describe_environment
from llmnorm.optim.lowrank import turn_of
from llmnorm.optim.matrix_optimizer import MatrixOptimizer

RESULTS = Path(__file__).parent / "results" / "refresh_stall.json"
SIZES = {"cpu": "2m", "cuda": "60m"}
USUAL = 3  # usual steps that are timed


def seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Of one step: processor time on a CPU, time until it is done on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def hidden(optimizer: MatrixOptimizer) -> list[tuple[str, torch.Tensor]]:
    groups = [group for group in optimizer.param_groups if group["role"] == "hidden_matrix"]
    return [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]


def refreshing(names: list[str], gap: int) -> Counter[int]:
    """Step among the first `gap` after step 1 -> how many matrices find their subspace in it, in turns."""
    return Counter(1 + gap - turn_of(name, gap) for name in names)


def go_before(optimizer: MatrixOptimizer, step: int) -> None:
    """Make the next step that of number `step`."""
    for state in optimizer.state.values():
        state["step"].fill_(step - 1)


def measure(size: str, projection: str, gap: int, device: str, vocab_size: int) -> dict[str, Any]:
    model = random_model(size, vocab_size, device, DTYPES[device])
    options = {"projection": projection, "update_proj_gap": gap}
    optimizer = create_optimizer("galore", model, LR, **options)
    assert isinstance(optimizer, MatrixOptimizer)
    give_gradients(model)
    names = [name for name, _ in hidden(optimizer)]
    turns = refreshing(names, gap)
    quiet = next(step for step in range(2, gap + 1) if not turns[step])
    busiest, most = max(turns.items(), key=lambda item: item[1])
    optimizer.step()
    times = {}
    go_before(optimizer, gap + 1)
    times["at_once"] = seconds(optimizer, device)
    for group in optimizer.param_groups:
        if "stagger" in group:
            group["stagger"] = True
    usual = []
    for _ in range(USUAL):
        go_before(optimizer, quiet)
        usual.append(seconds(optimizer, device))
    go_before(optimizer, busiest)
    times["in_turns"] = seconds(optimizer, device)
    return {
        "usual_ms": 1e3 * statistics.median(usual),
        "at_once_ms": 1e3 * times["at_once"],
        "in_turns_ms": 1e3 * times["in_turns"],
        "matrices": len(names),
        "most_in_one_step": most,
        "gap": gap,
    }


def table(content: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for record in content.values():
        lines += [
            f"GaLore at {record['size']}, {record['device']}, {record['date']}. {record['note']}".strip(),
            "",
            "| projection | usual ms | all at once | ratio | in turns | ratio | matrices, most at once |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, row in record["rows"].items():
            usual, once, turns = (row[f"{key}_ms"] for key in ("usual", "at_once", "in_turns"))
            lines.append(
                f"| {name} | {usual:,.0f} | {once:,.0f} | {once / usual:.1f} | {turns:,.0f} "
                f"| {turns / usual:.2f} | {row['matrices']}, {row['most_in_one_step']} |"
            )
        lines += ["", f"`{record['command']}`", ""]
    return "\n".join(lines).strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=sorted(DTYPES), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--size", choices=sorted(PRESETS))
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--projections", nargs="+", default=["svd", "randomized", "power"])
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--note", default="", help="what a reader of the numbers must know, kept beside them")
    parser.add_argument("--table", action="store_true", help="print the table of the JSON that is there")
    parser.add_argument("--into", type=Path, help="with --table: the page of docs that holds it")
    arguments = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.table:
        if arguments.into:
            put_into(arguments.into, "refresh_stall", table(content))
        else:
            print(table(content))
        return 0
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/refresh_stall.py: there is no GPU to measure; nothing was measured or written")
        return 0
    size = arguments.size or SIZES[device]
    rows = {}
    for projection in arguments.projections:
        rows[projection] = measure(size, projection, arguments.gap, device, arguments.vocab_size)
        print(projection, rows[projection], flush=True)
    content[device] = {
        "size": size,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads, processor time",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/refresh_stall.py", *sys.argv[1:]]),
        "environment": describe_environment(),
        "note": arguments.note,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
