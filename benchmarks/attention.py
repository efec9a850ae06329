"""Time and memory of an attention sublayer against the length: linear attention and softmax under SDPA.

    python benchmarks/attention.py [--device cpu|cuda] [--lengths 256 ... 16384] [--repeats 3] [--budget 9]
    python benchmarks/attention.py --device cpu --table [--into docs/attention.md]

One sublayer of a model, projections included, forward and backward on one sequence. CPU: hidden 128, 2 heads
of 64, fp32, one thread, seconds of the process (a busy machine then changes little), each measurement in its
own process, whose growth in resident memory is the peak. CUDA: hidden 1024, 16 heads of 64, bf16, events,
torch's own peak. Written are the least time of the repeats, the exponent b of the fit time = a T^b over the
lengths of at least 1,024, and the crossover: the length from which a linear attention stays faster than SDPA.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from budget import Budget, add_budget
from tables import put_into
from torch import Tensor

from llmnorm.evaluation import describe_environment
from llmnorm.modeling import LlmNormConfig, LlmNormModel
from llmnorm.modeling.linear_mixers import LinearInputs

HERE = Path(__file__).parent / "results"
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "nalaformer": {"attention": "nalaformer"},
    "relu": {"attention": "nalaformer", "attention_options": {"feature_map": "relu"}},
    "sla": {"attention": "sla"},
}
SHAPES: dict[str, dict[str, int]] = {
    "cpu": {"hidden_size": 128, "num_attention_heads": 2},
    "cuda": {"hidden_size": 1024, "num_attention_heads": 16},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
FITTED_FROM = 1024


def sublayer(variant: str, device: str) -> tuple[torch.nn.Module, LlmNormModel]:
    torch.manual_seed(0)
    config = LlmNormConfig(
        vocab_size=8, intermediate_size=16, num_hidden_layers=1, **SHAPES[device], **VARIANTS[variant]
    )
    model = LlmNormModel(config).to(device=device, dtype=DTYPES[device])
    return model.layers[0].self_attn, model


def step(layer: torch.nn.Module, z: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
    y, _ = layer(z, position_embeddings=rotary, attention_mask=None, linear_inputs=LinearInputs())
    y.sum().backward()


def prepare(variant: str, length: int, device: str) -> tuple[torch.nn.Module, Tensor, tuple[Tensor, Tensor]]:
    layer, model = sublayer(variant, device)
    z = torch.randn(1, length, SHAPES[device]["hidden_size"], device=device, dtype=DTYPES[device])
    cos, sin = model.rotary_emb(z, torch.arange(length, device=device)[None])
    return layer, z.requires_grad_(), (cos.unsqueeze(1), sin.unsqueeze(1))


def on_cpu(variant: str, length: int, repeats: int) -> dict[str, float]:
    """Measured in this process, which should be a fresh one."""
    torch.set_num_threads(1)
    inputs = prepare(variant, length, "cpu")
    step(*prepare(variant, 64, "cpu"))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    seconds = []
    for _ in range(repeats):
        begun = time.process_time()
        step(*inputs)
        seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": min(seconds), "peak_mib": peak / 2**20}


def on_cuda(variant: str, length: int, repeats: int) -> dict[str, float]:
    inputs = prepare(variant, length, "cuda")
    for _ in range(3):
        step(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, milliseconds = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step(*inputs)
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - before
    return {"seconds": min(milliseconds) / 1000, "peak_mib": peak / 2**20}


def _send(connection: Any, variant: str, length: int, repeats: int) -> None:
    connection.send(on_cpu(variant, length, repeats))


def measure(variant: str, length: int, repeats: int, device: str) -> dict[str, float]:
    if device == "cuda":
        return on_cuda(variant, length, repeats)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (sender, variant, length, repeats)
    process = multiprocessing.get_context("fork").Process(target=_send, args=arguments)
    process.start()
    result = receiver.recv()
    process.join()
    return result


def exponent(times: dict[int, float]) -> float | None:
    """The slope of log time over log length, least squares, over lengths of at least FITTED_FROM; None of
    fewer than two."""
    points = [(math.log(n), math.log(t)) for n, t in times.items() if n >= FITTED_FROM]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def crossover(times: dict[int, float], softmax: dict[int, float]) -> int | None:
    """The least length from which on every longer one is faster too."""
    slower = [length for length in times if times[length] >= softmax[length]]
    faster = [length for length in times if length > max(slower, default=0)]
    return min(faster, default=None)


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    times = {v: {r["length"]: r["seconds"] for r in rows if r["variant"] == v} for v in VARIANTS}
    return {
        variant: {
            "exponent": exponent(measured),
            "crossover": None if variant == "softmax" else crossover(measured, times["softmax"]),
        }
        for variant, measured in times.items()
    }


def table(content: dict[str, Any]) -> str:
    rows = {(row["variant"], row["length"]): row for row in content["rows"]}
    lengths = sorted({length for _, length in rows})
    heads = [f"{variant}, ms" for variant in VARIANTS] + [f"{variant}, MiB" for variant in VARIANTS]
    lines = [f"| tokens | {' | '.join(heads)} |", f"| ---: | {' | '.join('---:' for _ in heads)} |"]
    for length in lengths:
        times = [f"{1000 * rows[v, length]['seconds']:,.1f}" for v in VARIANTS]
        peaks = [f"{rows[v, length]['peak_mib']:,.0f}" for v in VARIANTS]
        lines.append(f"| {length:,} | {' | '.join(times + peaks)} |")
    slopes = [content["summary"][v]["exponent"] for v in VARIANTS]
    fitted = ["" if slope is None else f"{slope:.2f}" for slope in slopes]
    lines.append(f"| exponent | {' | '.join(fitted)} | {' | '.join([''] * len(VARIANTS))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SHAPES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    add_budget(parser)
    parser.add_argument("--table", action="store_true", help="print the table of the JSON that is there")
    parser.add_argument("--into", type=Path, help="with --table: the page of docs that holds it")
    arguments = parser.parse_args()
    output = arguments.output or HERE / f"attention_{arguments.device}.json"
    if arguments.table:
        text = table(json.loads(output.read_text()))
        print(text)
        if arguments.into:
            put_into(arguments.into, output.stem, text)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/attention.py: there is no GPU to measure; nothing was measured or written")
        return
    longest = 65_536 if arguments.device == "cuda" else 16_384
    lengths = arguments.lengths or [n for n in (2**e for e in range(8, 17)) if n <= longest]
    rows = []
    budget = Budget(arguments.budget, arguments.device)
    # A length is measured whole or not at all, so that every variant has the same.
    for length in (n for n in lengths if budget.allows(f"{n} tokens")):
        for variant in VARIANTS:
            numbers = measure(variant, length, arguments.repeats, arguments.device)
            rows.append({"variant": variant, "length": length, **numbers})
            milliseconds, peak = 1000 * numbers["seconds"], numbers["peak_mib"]
            print(f"{variant:<12} {length:>6}: {milliseconds:9.1f} ms {peak:8.0f} MiB", flush=True)
    budget.report()
    content = {
        "device": arguments.device,
        "shape": SHAPES[arguments.device],
        "dtype": str(DTYPES[arguments.device]).removeprefix("torch."),
        "repeats": arguments.repeats,
        "left_out": budget.left_out,
        "environment": describe_environment(),
        "summary": summary(rows),
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content["summary"]))


if __name__ == "__main__":
    main()
