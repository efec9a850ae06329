"""A whole training step on this GPU: tokens per second, MFU, peak memory and a profile, against transformers
with Liger.

    python benchmarks/train_gpu.py [--sizes 130m 350m 1b] [--lengths 256 1024 2048] [--modes eager]
        [--repeats 5] [--budget 9]
    python benchmarks/train_gpu.py --sizes 130m --lengths 1024 --modes compile graphs
    python benchmarks/train_gpu.py --render
    python benchmarks/train_gpu.py --smoke --results FILE

Both sides train the same Llama shape in bfloat16 autocast over float32 weights on the same random batch of
32,768 tokens with torch's fused AdamW, in one process, their repeats interleaved; where Liger is not
installed, the other side is transformers alone, and the record says so. compile is torch.compile with
dynamic=False, graphs its mode reduce-overhead (CUDA graphs), both on both sides. Written to
benchmarks/results/train_gpu.json, where a further call on the same card and versions adds its rows, and into
docs/kernels.md; rows that would begin after the budget's minutes are left out and named. --smoke takes one
tiny shape on the CPU through all of it.

    MFU = tokens/s * FLOPs per token / the card's dense bfloat16 peak
    FLOPs per token = 6 * matmul parameters (head included, embedding look-up not) + causal attention

busy: device time of all kernels over the time of the step; the rest are gaps between launches.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from budget import Budget, add_budget
from tables import put_into

import llmnorm_kernels as kernels
from llmnorm import LlmNormConfig, LlmNormForCausalLM
from llmnorm.config.presets import PRESETS
from llmnorm.training.attention_backends import sdpa_order
from llmnorm.training.plan import flops_per_token
from llmnorm.training.throughput import peak_flops

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "train_gpu.json"
PAGE = ROOT / "docs" / "kernels.md"
NOT_MEASURED = "Not yet measured on a GPU: `python benchmarks/train_gpu.py` writes this table."
VOCAB_SIZE, TOKENS_PER_STEP = 32000, 32768
SMOKE_VOCAB, SMOKE_TOKENS = 128, 64
SIDES = ("ours", "transformers")
PARTS = ("forward", "backward", "clip and update")
COMPILED: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compile": {"dynamic": False},
    "graphs": {"dynamic": False, "mode": "reduce-overhead"},
}


class Clock:
    """Seconds between marks, by events on a GPU, so that nothing waits until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type != "cuda":
            return [end - begin for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


Step = Callable[[Clock], None]


def step_of(
    model: torch.nn.Module,
    ids: torch.Tensor,
    mode: str,
    attention: Callable[[torch.device], AbstractContextManager[Any]],
    **options: Any,
) -> Step:
    """Forward, backward, clip and update of one batch, a mark of the clock after each of PARTS."""
    device = ids.device
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    settings = COMPILED[mode]
    run = model if settings is None else torch.compile(model, **settings)

    def step(clock: Clock) -> None:
        if mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, torch.bfloat16), attention(device):
            loss = run(input_ids=ids, labels=ids, use_cache=False, **options).loss
        clock.mark()
        loss.backward()
        clock.mark()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark()

    return step


def ours(shape: dict[str, Any], ids: torch.Tensor, mode: str) -> Step:
    # As a training run does: its order of SDPA's back ends, and a loss that leaves no logits.
    model = LlmNormForCausalLM(LlmNormConfig(norm="pre_rmsnorm", **shape))
    return step_of(model, ids, mode, sdpa_order, return_logits=False)


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def theirs(shape: dict[str, Any], ids: torch.Tensor, mode: str) -> Step:
    if has_liger():
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    return step_of(model, ids, mode, lambda device: nullcontext())


def timed(step: Step, device: torch.device, steps: int) -> list[float]:
    """Seconds of a step's PARTS, means over `steps` steps."""
    clock = Clock(device)
    clock.mark()
    for _ in range(steps):
        step(clock)
    laps = clock.laps()
    return [sum(laps[part :: len(PARTS)]) / steps for part in range(len(PARTS))]


def profile(step: Step, device: torch.device, steps: int = 3) -> dict[str, Any]:
    """The 20 kernels (on a CPU: operators) with the most time, their share, and how busy the device is."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    with torch.profiler.profile(activities=[activity]) as trace:
        seconds = sum(timed(step, device, steps)) * steps
    events = sorted(trace.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events) or 1.0
    top = [
        {"kernel": event.key[:120], "share": getattr(event, name) / total, "calls": event.count}
        for event in events[:20]
    ]
    return {"busy": total / 1e6 / seconds, "kernels": top}


def shape_of(size: str, length: int, smoke: bool) -> dict[str, Any]:
    sizes = PRESETS[size].sizes() | ({"num_hidden_layers": 2} if smoke else {})
    vocab_size = SMOKE_VOCAB if smoke else VOCAB_SIZE
    return {**sizes, "vocab_size": vocab_size, "rms_norm_eps": 1e-6, "max_position_embeddings": length}


def measure(
    size: str, length: int, mode: str, repeats: int, device: torch.device, smoke: bool
) -> dict[str, Any]:
    """One row. A side that fails (memory, a compiler) leaves its reason and the other its numbers."""
    shape = shape_of(size, length, smoke)
    tokens = SMOKE_TOKENS if smoke else TOKENS_PER_STEP
    ids = torch.randint(0, shape["vocab_size"], (max(1, tokens // length), length), device=device)
    row: dict[str, Any] = {
        "failed": {},
        "flops_per_token": flops_per_token(LlmNormConfig(**shape), length).total,
    }
    steps: dict[str, Step] = {}
    for name, build in zip(SIDES, (ours, theirs), strict=True):
        torch.manual_seed(0)
        before = 0
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        try:
            step = build(shape, ids, mode)
            timed(step, device, 3)
        except Exception as error:
            row["failed"][name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        steps[name] = step
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else None
        row[name] = {"peak_gb": peak}
    samples: dict[str, list[list[float]]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            samples[name].append(timed(step, device, 5))
    for name, parts in samples.items():
        row[name] |= numbers(parts, ids.numel(), row["flops_per_token"], peak_flops(device, "bf16"))
    if len(steps) == 2:
        row["ratio"] = row["transformers"]["seconds"] / row["ours"]["seconds"]
    if "ours" in steps:
        row["profile"] = profile(steps["ours"], device)
    return row


def numbers(parts: list[list[float]], tokens: int, flops: float, peak: float | None) -> dict[str, Any]:
    """Median seconds of a step, what follows from them, and the shares of its parts."""
    whole = [sum(one) for one in parts]
    median = statistics.median(whole)
    shares = [statistics.median(one[i] for one in parts) / median for i in range(len(PARTS))]
    return {
        "seconds": median,
        "spread": (max(whole) - min(whole)) / median,
        "tokens_per_second": tokens / median,
        "mfu": None if peak is None else tokens / median * flops / peak,
        "shares": dict(zip(PARTS, shares, strict=True)),
    }


def table(record: dict[str, Any] | None) -> str:
    """The table of docs/kernels.md; `NOT_MEASURED` where there is no record."""
    if record is None:
        return NOT_MEASURED
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    other = "transformers with Liger" if record["liger"] else "transformers (Liger is not installed)"
    lines = [
        f"{record['device']}, {record['date']}, {versions}, `{record['command']}`. Thousand tokens/s / MFU / "
        "peak GB; the other side's time over ours; of our step, the share in which the device is busy and "
        "that of clip and update.",
        "",
        f"| shape | mode | ours | {other} | ratio | busy | update |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for name, row in record["results"].items():
        size, length, mode = name.split()
        cells = [_side(row, side) for side in SIDES]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        busy, update = "-", "-"
        if "profile" in row:
            busy = f"{row['profile']['busy']:.0%}"
            update = f"{row['ours']['shares']['clip and update']:.0%}"
        lines.append(f"| {size}, {length} | {mode} | {' | '.join(cells)} | {ratio} | {busy} | {update} |")
    return "\n".join(lines)


def _side(row: dict[str, Any], side: str) -> str:
    if side in row["failed"]:
        return row["failed"][side].partition(":")[0]
    values = row[side]
    mfu = "-" if values["mfu"] is None else f"{values['mfu']:.0%}"
    peak = "-" if values["peak_gb"] is None else f"{values['peak_gb']:.1f}"
    return f"{values['tokens_per_second'] / 1e3:.1f} / {mfu} / {peak}"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["130m", "350m", "1b"], choices=sorted(PRESETS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048])
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=list(COMPILED))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON to write")
    parser.add_argument("--render", action="store_true", help="write the table of the JSON into the page")
    parser.add_argument("--smoke", action="store_true", help="one tiny shape on the CPU, to try the script")
    add_budget(parser)
    options = parser.parse_args(words)
    if options.smoke and options.results == RESULTS:
        parser.error("--smoke measures nothing; give --results FILE, so that no result is overwritten")
    if options.smoke:
        options.sizes, options.lengths = ["2m"], [32]
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    held = json.loads(options.results.read_text()) if options.results.exists() else None
    if options.render:
        put_into(PAGE, "train_gpu", table(held))
        return 0
    if not options.smoke and not torch.cuda.is_available():
        print("benchmarks/train_gpu.py measures a GPU and there is none; nothing was measured or written")
        return 0
    device = torch.device("cpu" if options.smoke else "cuda")
    record: dict[str, Any] = {
        "device": "cpu" if options.smoke else torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "liger": has_liger(),
        "backends": kernels.describe_backends(device),
        "results": {},
    }
    if held is not None and all(held[key] == record[key] for key in ("device", "versions", "liger")):
        record["results"] = held["results"]
    record["command"] = " ".join(["python", "benchmarks/train_gpu.py", *(words or sys.argv[1:])])
    record["date"] = datetime.date.today().isoformat()
    print(record["backends"])
    budget = Budget(options.budget, device.type)
    for mode in options.modes:
        for size in options.sizes:
            for length in options.lengths:
                name = f"{size} {length} {mode}"
                if not budget.allows(name):
                    continue
                row = measure(size, length, mode, options.repeats, device, options.smoke)
                record["results"][name] = row
                print(name, {key: value for key, value in row.items() if key != "profile"}, flush=True)
                torch.compiler.reset()
                gc.collect()
                torch.cuda.empty_cache()
                save(options, record)
    budget.report()
    return 0


def save(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """After every row, so that a call that is ended leaves what it measured."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.results == RESULTS:
        put_into(PAGE, "train_gpu", table(record))


if __name__ == "__main__":
    sys.exit(main())
