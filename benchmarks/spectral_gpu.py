"""Matrix optimizers on this GPU: losses and the optimizer's share at 60m, the time of a step at 1b shapes.

    python benchmarks/spectral_gpu.py [--data TRAIN --validation HELD_OUT] [--tokens 50e6] [--minutes 9]

Two parts, written to benchmarks/results/spectral_gpu.json and into docs/optimizers.md:

    steps     time of one optimizer step at the 1b shape, all methods on the same weights and gradients, one
              after the other in each of several rounds, and of forward and backward in bfloat16
    training  `llmnorm compare configs/compare/spectral_60m.yaml`: 60m, eight methods, --tokens each

A call ends after --minutes; the same command goes on with what is missing, from the checkpoints and results
in --output_dir. The questions, with their formulas:

    SCALE and SinkGD:  t(method) / t(torch fused AdamW) <= 0.6
    Muon's added share:  (t(muon) - t(adamw)) / (524288 / r + t(adamw)) <= 0.05
                         r: tokens per second of forward and backward; t: one optimizer step, fp32 weights
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tables import put_into

import llmnorm_kernels as kernels
from llmnorm import LlmNormConfig, LlmNormForCausalLM, create_optimizer
from llmnorm.config import yaml_dialect
from llmnorm.config.presets import PRESETS
from llmnorm.optim import Role, route_parameters

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "spectral_gpu.json"
PAGE = ROOT / "docs" / "optimizers.md"
STUDY = ROOT / "configs" / "compare" / "spectral_60m.yaml"
TOKENS_PER_UPDATE = 512 * 256  # of the study
STEP_TOKENS = 2**19
LARGEST_RATIO, LARGEST_SHARE = 0.6, 0.05
NOT_MEASURED = "Not yet measured on a GPU: `python benchmarks/spectral_gpu.py` writes this table."
# Small enough for a processor and a test.
SMOKE = {
    "model.preset": "2m",
    "model.num_hidden_layers": 2,
    "data.tokenizer": "{train: bpe, vocab_size: 320}",
    "data.sequence_length": 32,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 4,
    "train.precision": "fp32",
    "train.log_every": 1,
    "schedule.warmup_steps": 1,
    "evaluation.max_tokens": 256,
    "evaluation.batch_size": 4,
}
Step = Callable[[], None]


def torch_adamw(model: torch.nn.Module) -> Step:
    return torch.optim.AdamW(model.parameters(), lr=1e-8, weight_decay=0.0, fused=True).step


def torch_muon(model: torch.nn.Module) -> Step:
    """torch.optim.Muon on hidden matrices, torch's fused AdamW on the rest."""
    routed = route_parameters(model)
    hidden = [p.parameter for p in routed if p.role is Role.HIDDEN_MATRIX]
    others = [p.parameter for p in routed if p.role is not Role.HIDDEN_MATRIX]
    muon = torch.optim.Muon(hidden, lr=1e-8, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=1e-8, weight_decay=0.0, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def ours(name: str, **options: Any) -> Callable[[torch.nn.Module], Step]:
    return lambda model: create_optimizer(name, model, lr=1e-8, **options).step


STEPS: dict[str, Callable[[torch.nn.Module], Step]] = {
    "torch fused adamw": torch_adamw,
    "torch muon": torch_muon,
    "adamw": ours("adamw"),
    "scale": ours("scale"),
    "sinkgd": ours("sinkgd"),
    "muon": ours("muon"),
    "muon, gram": ours("muon", ns_method="gram"),
    "muon, aol": ours("muon", ns_coefficients="aol", ns_preconditioner="aol", ns_steps=4),
    "normuon": ours("normuon"),
}


def seconds(step: Step, device: torch.device, repeats: int) -> float:
    """Seconds of one step, by the device's clock where it has one."""
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - began) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


class Shape(NamedTuple):
    """The model and the batch of the part steps."""

    preset: str
    vocab_size: int
    batch: int
    length: int
    layers: int
    repeats: int  # in a round


SHAPE, SMOKE_SHAPE = Shape("1b", 32000, 8, 1024, 24, 3), Shape("2m", 64, 1, 16, 1, 1)


def measure_steps(sizes: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """Times of every method's step on one model, in rounds: medians, and (largest - smallest) / median."""
    torch.manual_seed(0)
    preset, vocab_size, batch, length, layers, repeats = sizes
    shape = {**PRESETS[preset].sizes(), "num_hidden_layers": layers, "max_position_embeddings": length}
    shape["vocab_size"] = vocab_size
    model = LlmNormForCausalLM(LlmNormConfig(norm="pre_rmsnorm", **shape)).to(device).train()
    ids = torch.randint(0, vocab_size, (batch, length), device=device)

    def forward_and_backward() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    contestants = {"forward and backward": forward_and_backward}
    forward_and_backward()
    contestants |= {name: build(model) for name, build in STEPS.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, step in contestants.items():
            took = seconds(step, device, repeats)
            if round_:  # the first compiles, chooses kernels and makes the state
                samples[name].append(took)
    return {
        "preset": preset,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_of_a_pass": batch * length,
        "seconds": {name: statistics.median(values) for name, values in samples.items()},
        "spread": {
            name: (max(values) - min(values)) / statistics.median(values) for name, values in samples.items()
        },
    }


def answers(steps: dict[str, Any]) -> dict[str, float]:
    """The numbers of the two questions."""
    took = steps["seconds"]
    base, rate = took["torch fused adamw"], steps["tokens_of_a_pass"] / took["forward and backward"]
    whole = STEP_TOKENS / rate + base
    return {
        **{f"{name} / torch fused adamw": took[name] / base for name in STEPS if name != "torch fused adamw"},
        "forward and backward, tokens/s": rate,
        **{
            f"added share of {name}": (took[name] - base) / whole
            for name in ("torch muon", "muon", "muon, gram", "muon, aol")
        },
    }


def study_of(methods: list[str], output: Path) -> Path:
    """The committed study, or one beside `output` of some of its variants."""
    values, _ = yaml_dialect.read(STUDY)
    if not methods:
        return STUDY
    unknown = [name for name in methods if name not in values["variants"]]
    if unknown:
        raise SystemExit(f"--methods {unknown[0]} is none of {', '.join(values['variants'])}")
    values["variants"] = {name: values["variants"][name] for name in methods}
    values["base"], values["baseline"] = str(STUDY.parent / values["base"]), methods[0]
    study = output.with_name(f"{output.name}_study.yaml")
    study.parent.mkdir(parents=True, exist_ok=True)
    study.write_text(yaml_dialect.write(values), encoding="utf-8")
    return study


def train_on(options: argparse.Namespace, deadline: float) -> dict[str, Any] | None:
    """Go on with the study until the deadline; its results as far as they are, None before any."""
    output = Path(options.output_dir)
    changes = {f"data.{key}": path for key, path in options.files.items()} | (SMOKE if options.smoke else {})
    steps = 4 if options.smoke else math.ceil(options.tokens / TOKENS_PER_UPDATE)
    if steps != 382 and not options.smoke:
        changes["schedule.warmup_steps"] = max(1, steps // 10)
    study = study_of(options.methods, output)
    command = [sys.executable, "-m", "llmnorm.cli", "compare", str(study), "--output_dir", str(output)]
    command += ["--steps", str(steps), "--no-interval"]
    command += ["--set", *(f"{key}={value}" for key, value in changes.items())] if changes else []
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.terminate()  # every run saves a checkpoint first
        code = process.wait()
    if code not in (0, 1):
        raise SystemExit(f"llmnorm compare ended with exit code {code}; its message is above")
    file = output / "results.json"
    if not file.exists():
        return None
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return results


def table(record: dict[str, Any] | None) -> str:
    """The two tables of the page; `NOT_MEASURED` where there is no record."""
    if not record:
        return NOT_MEASURED
    where = f"{record['device']}, torch {record['versions']['torch']}, {record['date']}"
    lines = [f"{where}: `{record['command']}`", ""]
    if steps := record.get("steps"):
        found = answers(steps)
        lines += [
            f"One optimizer step at the {steps['preset']} shape ({steps['parameters'] / 1e6:,.0f}M "
            "parameters, fp32), and what it adds to an AdamW step of 0.5M tokens:",
            "",
            "| method | ms | / torch fused adamw | added share |",
            "| --- | ---: | ---: | ---: |",
        ]
        base = steps["seconds"]["torch fused adamw"]
        whole = STEP_TOKENS / found["forward and backward, tokens/s"] + base
        lines += [
            f"| {name} | {1e3 * took:.2f} | {took / base:.2f} | {100 * (took - base) / whole:+.2f} % |"
            for name, took in steps["seconds"].items()
            if name in STEPS
        ]
        lines.append("")
    if training := record.get("training"):
        tokens = training["settings"]["steps"] * training["settings"]["tokens_per_step"]
        lines += [
            f"60m, {tokens / 1e6:,.1f}M tokens each, one rate and one seed:",
            "",
            "| method | lr | held-out loss | tokens/s | ms per step | optimizer's share |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [_training_row(row) for row in training["variants"]]
        lines.append("")
    return "\n".join(lines).rstrip()


def _training_row(row: dict[str, Any]) -> str:
    if row["loss"]["mean"] is None:
        return f"| {row['name']} | | not finished | | | |"
    share = row["optimizer_seconds"] / row["seconds_per_step"] if row["optimizer_seconds"] else None
    return (
        f"| {row['name']} | {row['lr']:g} | {row['loss']['mean']:.4f} | {row['tokens_per_second']:,.0f} | "
        f"{1e3 * row['seconds_per_step']:.1f} | {'' if share is None else f'{100 * share:.1f} %'} |"
    )


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["steps", "training"], choices=["steps", "training"])
    parser.add_argument("--data", help="text to train on; default: the samples, far too few for 50M tokens")
    parser.add_argument("--validation", help="held-out text; needed with --data")
    parser.add_argument("--methods", nargs="+", default=[], help="of the part training; default: all eight")
    parser.add_argument("--tokens", type=float, default=50e6, help="of each method")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call")
    parser.add_argument("--rounds", type=int, default=7, help="of the part steps")
    parser.add_argument("--output_dir", default="runs/compare/spectral_60m", help="folder of the study")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON to write")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny shape on the processor, to try the script"
    )
    options = parser.parse_args(words)
    if bool(options.data) != bool(options.validation):
        parser.error("--data and --validation go together: give both, or neither for the samples")
    if options.smoke and options.results == RESULTS:
        parser.error("--smoke measures nothing; give --results FILE, so that no result is overwritten")
    given = {"train_files": options.data, "validation_files": options.validation}
    options.files = {key: str(Path(path).resolve()) for key, path in given.items() if path}
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = parse(words)
    deadline = time.monotonic() + 60 * options.minutes
    if not torch.cuda.is_available() and not options.smoke:
        print("benchmarks/spectral_gpu.py measures a GPU and there is none; nothing was measured or written")
        return 0
    device = torch.device("cpu" if options.smoke else "cuda")
    record: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    record |= {
        "command": " ".join(["python", "benchmarks/spectral_gpu.py", *(words or sys.argv[1:])]),
        "date": datetime.date.today().isoformat(),
        "device": "cpu" if options.smoke else torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "backends": kernels.describe_backends(),
    }
    if "steps" in options.parts and "steps" not in record:
        record["steps"] = measure_steps(SMOKE_SHAPE if options.smoke else SHAPE, device, options.rounds)
        record["answers"] = answers(record["steps"])
        save(options, record)
        for name, value in record["answers"].items():
            print(f"{name}: {value:.4g}", flush=True)
        print(f"asked: scale and sinkgd at most {LARGEST_RATIO}, added share at most {LARGEST_SHARE}")
        torch.cuda.empty_cache()
    if "training" in options.parts:
        record["training"] = train_on(options, deadline) or record.get("training")
        save(options, record)
        if record["training"] is None or record["training"]["not_run"]:
            print("not finished: start the same command again to go on")
    return 0


def save(options: argparse.Namespace, record: dict[str, Any]) -> None:
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.results == RESULTS:
        put_into(PAGE, "spectral_gpu", table(record))


if __name__ == "__main__":
    sys.exit(main())
