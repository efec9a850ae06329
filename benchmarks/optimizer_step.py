"""The time of one optimizer step against torch.optim.AdamW, for every method and the published packages.

    python benchmarks/optimizer_step.py [--sizes 60m 130m 350m 1b] [--methods galore ...] [--repeats 24]
        [--budget 9]
    python benchmarks/optimizer_step.py --table [--into docs/optimizers.md]
    python benchmarks/optimizer_step.py --memory-7b          peak memory of one training step, on a GPU

Both sides are whole models of the shape with random weights and gradients, never zeros. A repeat times one
step of the method and one of AdamW (fused), so that what else the machine does falls on both; ratios are
medians over repeats. A method that finds its subspace again every T steps is timed with a gap of GAP:
`plain` are the steps between, `refresh` the ones that find it, `amortized` = plain + (refresh - plain) / T
with the T it has by default. Written to benchmarks/results/optimizer_step.json, one record per kind of
device; rows that would begin after the budget's minutes are named, and a call with their --methods adds them.
A package that is not installed is listed as absent. Default sizes: 2m on a CPU, 60m to 1b on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from budget import Budget, add_budget
from tables import put_into
from torch import nn

from llmnorm import LlmNormConfig, LlmNormForCausalLM, create_optimizer
from llmnorm.config import PRESETS
from llmnorm.evaluation import describe_environment
from llmnorm.optim import Role, route_parameters, routing_table
from llmnorm.training.build import rebuild

RESULTS = Path(__file__).parent / "results" / "optimizer_step.json"
SIZES = {"cpu": ["2m"], "cuda": ["60m", "130m", "350m", "1b"]}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
LR, GAP, WARM = 1e-5, 8, 2
BASELINE = "torch.optim.AdamW"
Builder = Callable[[LlmNormForCausalLM], Any]


class Several:
    """Optimizers that make one step together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def random_model(size: str, vocab_size: int, device: str, dtype: torch.dtype) -> LlmNormForCausalLM:
    """The model of a preset with random weights."""
    shape = {**PRESETS[size].sizes(), "vocab_size": vocab_size, "norm": "pre_rmsnorm"}
    with torch.device("meta"):
        model = LlmNormForCausalLM(LlmNormConfig(**shape))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = model.to_empty(device=device)
    rebuild(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.02)
    return model.train()


def give_gradients(model: nn.Module) -> None:
    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
        p.grad = grad.mul_(1e-3)


def hidden_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    routed = route_parameters(model)
    hidden = [r.parameter for r in routed if r.role is Role.HIDDEN_MATRIX]
    return hidden, [r.parameter for r in routed if r.role is not Role.HIDDEN_MATRIX]


def torch_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def torch_muon(model: nn.Module) -> Several:
    hidden, rest = hidden_and_rest(model)
    return Several(torch.optim.Muon(hidden, lr=LR), torch.optim.AdamW(rest, lr=LR, fused=True))


def _projected(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    hidden, rest = hidden_and_rest(model)
    rank = max(1, max(min(p.shape) for p in hidden) // 4)
    return [{"params": rest}, {"params": hidden, "rank": rank, "update_proj_gap": GAP, **options}]


def galore_torch(model: nn.Module) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW(_projected(model, scale=0.25, proj_type="std"), lr=LR)


def apollo_torch(model: nn.Module) -> torch.optim.Optimizer:
    from apollo_torch import APOLLOAdamW

    options = {"scale": 1.0, "proj": "random", "scale_type": "channel", "proj_type": "std"}
    return APOLLOAdamW(_projected(model, **options), lr=LR)


def bitsandbytes(model: nn.Module) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=LR)


def torchao(model: nn.Module) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=LR)


# name -> (module that must be there, builder)
PACKAGES: dict[str, tuple[str, Builder]] = {
    "torch.optim.Muon": ("torch", torch_muon),
    "galore-torch": ("galore_torch", galore_torch),
    "apollo-torch": ("apollo_torch", apollo_torch),
    "bitsandbytes AdamW8bit": ("bitsandbytes", bitsandbytes),
    "torchao AdamW8bit": ("torchao", torchao),
}
REFRESHED_PACKAGES = ("galore-torch",)
# Methods with options that change what a step has to do.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "galore, 8-bit state": ("galore", {"state_bits": 8}),
    "galore, Q-GaLore": ("galore", {"state_bits": 8, "projection_bits": 4, "weights": "int8"}),
    "galore, randomized": ("galore", {"projection": "randomized"}),
    "spam, density 0.25": ("spam", {"density": 0.25}),
}


class Contestant(NamedTuple):
    """gap: the T it has by default, 1 where no step differs from the others."""

    optimizer: Any
    gap: int = 1


def ours(model: LlmNormForCausalLM, name: str, options: Mapping[str, Any]) -> Contestant:
    """A method of this project; one with a gap is built with GAP, so that few steps see a refresh."""
    gap = 1
    if "update_proj_gap" in create_optimizer.options(name):
        with torch.device("meta"):
            small = nn.Linear(8, 8, bias=False)
        default = create_optimizer(name, small, LR).param_groups[0]
        if default["update_proj_gap"] > 1 and default.get("projection") != "random":
            gap, options = default["update_proj_gap"], {**options, "update_proj_gap": GAP}
    return Contestant(create_optimizer(name, model, LR, **options), gap)


def contestants(
    wanted: list[str] | None,
) -> Iterator[tuple[str, Callable[[LlmNormForCausalLM], Contestant] | None]]:
    """(name, builder) of every side that is wanted; None for a package that is absent."""

    def own(name: str, options: Mapping[str, Any]) -> Callable[[LlmNormForCausalLM], Contestant]:
        return lambda model: ours(model, name, options)

    def foreign(name: str, build: Builder) -> Callable[[LlmNormForCausalLM], Contestant]:
        return lambda model: Contestant(build(model), 200 if name in REFRESHED_PACKAGES else 1)

    rows: dict[str, Any] = {name: own(name, {}) for name in create_optimizer.names()}
    rows |= {title: own(name, options) for title, (name, options) in OPTIONS.items()}
    for title, (module, build) in PACKAGES.items():
        rows[title] = foreign(title, build) if importlib.util.find_spec(module) else None
    for name, build in rows.items():
        if wanted is None or name in wanted:
            yield name, build


def seconds(optimizer: Any, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def summary(method: list[float], baseline: list[float], gap: int, first: int) -> dict[str, Any]:
    """Ratios of paired times; the first of them is of update `first`, counted from 1.

    A gap above 1 is the T of a method that was timed with GAP: updates 1, 1 + GAP, ... find the subspace.
    """
    ratios = [ours / theirs for ours, theirs in zip(method, baseline, strict=True)]
    refreshing = [gap > 1 and (first + i - 1) % GAP == 0 for i in range(len(ratios))]
    plain = statistics.median(r for r, new in zip(ratios, refreshing, strict=True) if not new)
    row: dict[str, Any] = {"plain": plain, "worst": max(ratios)}
    if gap > 1:
        refresh = statistics.median(r for r, new in zip(ratios, refreshing, strict=True) if new)
        row |= {"refresh": refresh, "gap": gap, "amortized": plain + (refresh - plain) / gap}
    return {**row, "amortized": row.get("amortized", plain)}


def measure(
    build: Callable[[LlmNormForCausalLM], Contestant],
    baseline: Any,
    make: Callable[[], LlmNormForCausalLM],
    device: str,
    repeats: int,
) -> dict[str, Any]:
    """One row: ratios, milliseconds, bytes of state and, on a GPU, what a step needs beside them."""
    model = make()
    contestant = build(model)
    give_gradients(model)  # after the method, which may have put other weights into the model
    state = None
    if (
        isinstance(contestant.optimizer, torch.optim.Optimizer)
        and "role" in contestant.optimizer.param_groups[0]
    ):
        sizes = [route.state_bytes for route in routing_table(contestant.optimizer)]
        state = None if None in sizes else sum(size or 0 for size in sizes)
    for _ in range(WARM):
        seconds(contestant.optimizer, device)
    held = 0
    if device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    method, other = [], []
    for _ in range(repeats):
        method.append(seconds(contestant.optimizer, device))
        other.append(seconds(baseline, device))
    row = summary(method, other, contestant.gap, WARM + 1)
    row |= {"ms": 1e3 * statistics.median(method), "baseline_ms": 1e3 * statistics.median(other)}
    row |= {"state_bytes": state, "step_peak_bytes": None}
    if device == "cuda":
        row["step_peak_bytes"] = torch.cuda.max_memory_allocated() - held
    return row


def measure_size(size: str, arguments: argparse.Namespace, device: str, budget: Budget) -> dict[str, Any]:
    dtype = DTYPES[device]

    def make() -> LlmNormForCausalLM:
        return random_model(size, arguments.vocab_size, device, dtype)

    model = make()
    give_gradients(model)
    baseline = torch_adamw(model)
    for _ in range(WARM):
        seconds(baseline, device)
    rows: dict[str, Any] = {}
    for name, build in contestants(arguments.methods):
        if build is None:
            rows[name] = {"absent": True}
            continue
        if not budget.allows(f"{size} {name}"):
            continue
        try:
            rows[name] = measure(build, baseline, make, device, arguments.repeats)
        except torch.cuda.OutOfMemoryError:
            rows[name] = {"failed": "out of memory"}
        if device == "cuda":
            torch.cuda.empty_cache()
        print(size, name, rows[name], flush=True)
    elements = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": elements, "dtype": str(dtype).removeprefix("torch."), "rows": rows}


# The 224 singular value decompositions of a first step of galore would take minutes at 7b.
MEMORY_METHODS: dict[str, dict[str, Any]] = {
    "adamw8bit": {},
    "galore": {"projection": "randomized"},
    "apollo_mini": {},
}


def training_step_memory(name: str, own: Mapping[str, Any], size: str, vocab_size: int) -> dict[str, Any]:
    """Peak bytes of two training steps at 1 x 256 tokens with full activation checkpointing, bf16 weights."""
    fused = "fused_backward" in create_optimizer.options(name)
    options = {**own, **({"fused_backward": True} if fused else {})}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = random_model(size, vocab_size, "cuda", torch.bfloat16)
        model.set_activation_checkpointing("full")
        optimizer = create_optimizer(name, model, LR, **options)
        ids = torch.randint(0, vocab_size, (1, 256), device="cuda")
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False, return_logits=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of memory", "fused_backward": fused}
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {**peaks, "options": dict(own), "fused_backward": fused}


def table(content: Mapping[str, Any]) -> str:
    """Markdown of every record: one table per device and size."""
    lines: list[str] = []
    for record in content.values():
        for size, result in record["sizes"].items():
            lines += [
                f"{size} ({result['parameters']:,} parameters, {result['dtype']}), {record['device']}, "
                f"{record['date']}; a step of fused {BASELINE} is 1. {record['note']}",
                "",
                "| method | plain step | refresh step | amortized | worst | ms | step peak MiB |",
                "|---|---:|---:|---:|---:|---:|---:|",
            ]
            known = {name: row for name, row in result["rows"].items() if "plain" in row}
            for name, row in sorted(known.items(), key=lambda item: item[1]["amortized"]):
                lines.append(_line(name, row))
            for reason in ("absent", "failed"):
                names = [name for name, row in result["rows"].items() if reason in row]
                if names:
                    lines += [
                        "",
                        f"{'Not installed' if reason == 'absent' else 'Out of memory'}: {', '.join(names)}.",
                    ]
            lines.append("")
        for name, row in record.get("memory_7b", {}).items():
            shown = (
                row.get("failed")
                or f"{row['allocated'] / 1e9:.1f} GB allocated, {row['reserved'] / 1e9:.1f} reserved"
            )
            how = "with" if row["fused_backward"] else "without"
            lines.append(f"- 7b, 1 x 256 tokens, full checkpointing, {name} {how} fused backward: {shown}")
    if "cuda" not in content:
        lines.append("Not yet measured on a GPU: no time, no peak of a step, no `--memory-7b`.")
    return "\n".join(lines).strip()


def _line(name: str, row: Mapping[str, Any]) -> str:
    refresh = f"{row['refresh']:.2f}" if "refresh" in row else ""
    peak = "" if row["step_peak_bytes"] is None else f"{row['step_peak_bytes'] / 2**20:,.0f}"
    return (
        f"| {name} | {row['plain']:.2f} | {refresh} | {row['amortized']:.2f} | {row['worst']:.2f} "
        f"| {row['ms']:.2f} | {peak} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=sorted(SIZES), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--sizes", nargs="+", choices=sorted(PRESETS))
    parser.add_argument("--methods", nargs="+", help="rows of the table; all unless given")
    parser.add_argument(
        "--repeats", type=int, default=24, help=f"at least {GAP}, so that a refresh is among them"
    )
    parser.add_argument("--vocab-size", type=int, default=32000)
    add_budget(parser)
    parser.add_argument("--note", default="", help="what a reader of the numbers must know, kept beside them")
    parser.add_argument(
        "--memory-7b", action="store_true", help="peak memory of one 7b training step, on a GPU"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the JSON that is there")
    parser.add_argument("--into", type=Path, help="with --table: the page of docs that holds it")
    arguments = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.table:
        if arguments.into:
            put_into(arguments.into, "optimizer_step", table(content))
        else:
            print(table(content))
        return 0
    if arguments.repeats < GAP:
        parser.error(f"--repeats {arguments.repeats} must be at least {GAP}, so that a refresh is among them")
    device = arguments.device
    if (device == "cuda" or arguments.memory_7b) and not torch.cuda.is_available():
        print("benchmarks/optimizer_step.py: there is no GPU to measure; nothing was measured or written")
        return 0
    record = content.setdefault(device, {"sizes": {}})
    environment = describe_environment()
    record |= {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/optimizer_step.py", *sys.argv[1:]]),
        "environment": environment,
        "note": arguments.note or record.get("note", ""),
    }
    if arguments.memory_7b:
        record["memory_7b"] = {
            name: training_step_memory(name, own, "7b", arguments.vocab_size)
            for name, own in MEMORY_METHODS.items()
        }
        print(record["memory_7b"])
    else:
        budget = Budget(arguments.budget, device)
        for size in arguments.sizes or SIZES[device]:
            measured = measure_size(size, arguments, device, budget)
            held = record["sizes"].setdefault(size, {**measured, "rows": {}})
            held["rows"] |= measured["rows"]
        budget.report()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
