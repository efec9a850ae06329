"""A whole training step on this GPU: tokens per second, MFU, peak memory and a profile, against transformers
with Liger.

    python benchmarks/train_gpu.py [--sizes 130m 350m 1b] [--lengths 256 1024 2048] [--compile]    under 10
    minutes

Both sides train the same Llama shape in bfloat16 autocast over float32 weights on the same random batch with
fused AdamW, one after the other in one process, interleaved. Written to benchmarks/results/train_gpu.json.
MFU = tokens/s * FLOPs per token / the card's dense bfloat16 peak; FLOPs per token = 6 * matmul parameters
(head included, embedding look-up not) + 6 * layers * hidden * length (causal attention), printed with the
result.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import llmnorm_kernels as kernels
from llmnorm import LlmNormConfig, LlmNormForCausalLM
from llmnorm.config.presets import PRESETS
from llmnorm.training.plan import flops_per_token

RESULTS = Path(__file__).parent / "results" / "train_gpu.json"
VOCAB_SIZE = 32000
TOKENS_PER_STEP = 32768
# Dense bfloat16 FLOP/s by the name of the card (vendors' data sheets).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "MI300": 1307e12}
Step = Callable[[], None]


def peak_flops(name: str) -> float:
    for card, peak in PEAKS.items():
        if card in name:
            return peak
    raise SystemExit(f"benchmarks/train_gpu.py knows no peak of {name!r}; add it to PEAKS")


def step_of(model: torch.nn.Module, ids: torch.Tensor, compiled: bool) -> Step:
    """Forward, backward, clip and update of one batch."""
    model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(shape: dict[str, Any], ids: torch.Tensor, compiled: bool) -> Step:
    return step_of(LlmNormForCausalLM(LlmNormConfig(norm="pre_rmsnorm", **shape)), ids, compiled)


def theirs(shape: dict[str, Any], ids: torch.Tensor, compiled: bool) -> Step:
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    return step_of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)), ids, compiled)


def seconds(step: Step, steps: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


def profile(step: Step) -> list[dict[str, Any]]:
    """The 20 kernels with the most device time in three steps, with their share of all device time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    events = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) or 1.0
    return [
        {"kernel": event.key[:120], "share": event.self_device_time_total / total, "calls": event.count}
        for event in events[:20]
    ]


def measure(size: str, length: int, compiled: bool, repeats: int) -> dict[str, Any]:
    shape = {
        **PRESETS[size].sizes(),
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": length,
    }
    ids = torch.randint(0, VOCAB_SIZE, (max(1, TOKENS_PER_STEP // length), length), device="cuda")
    row: dict[str, Any] = {"peak_gb": {}, "seconds": {}}
    steps: dict[str, Step] = {}
    for name, build in (("ours", ours), ("transformers", theirs)):
        torch.manual_seed(0)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps[name] = build(shape, ids, compiled)
        for _ in range(3):
            steps[name]()
        torch.cuda.synchronize()
        row["peak_gb"][name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            samples[name].append(seconds(step, 5))
    flops = flops_per_token(LlmNormConfig(**shape), length).total
    peak = peak_flops(torch.cuda.get_device_name())
    for name, values in samples.items():
        median = statistics.median(values)
        row["seconds"][name] = median
        row[f"{name}_tokens_per_second"] = ids.numel() / median
        row[f"{name}_mfu"] = ids.numel() / median * flops / peak
        row[f"{name}_spread"] = (max(values) - min(values)) / median
    row["ratio"] = row["seconds"]["transformers"] / row["seconds"]["ours"]
    row["flops_per_token"] = flops
    row["profile"] = profile(steps["ours"])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["130m", "350m", "1b"], choices=sorted(PRESETS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 2048])
    parser.add_argument("--compile", action="store_true", help="compile both sides, dynamic=False")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/train_gpu.py measures a GPU and there is none; nothing was measured or written")
        return 0
    print(kernels.describe_backends())
    results = {}
    for size in options.sizes:
        for length in options.lengths:
            results[f"{size} {length}"] = row = measure(size, length, options.compile, options.repeats)
            torch.cuda.empty_cache()
            print(size, length, {key: value for key, value in row.items() if key != "profile"}, flush=True)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    record = {
        "what": "training step, ours / transformers"
        + (" with Liger" if has_liger else " (Liger is not installed)"),
        "command": " ".join(["python", "benchmarks/train_gpu.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "compile": options.compile,
        "backends": kernels.describe_backends(),
        "results": results,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
