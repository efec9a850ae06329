"""What keeping weights under a constraint costs beside the optimizer's step, per rule.

    python benchmarks/constraint_cost.py [--size 350m] [--device cpu] [--repeats 5]
    python benchmarks/constraint_cost.py --render

One layer of a preset, all seven matrices and a vocabulary of 64, in fp32. For each rule of
`model.weight_constraint`, and for bringing `weight_parametrization` up to date, the time of
`project_weights(model, optimizer)`; beside it, in the same run, that of `optimizer.step()` with Muon and with
AdamW. Before each repetition the matrices are set back to norms of 1.05 times the limit, so that there is
something to cut; "nothing above" has them at 0.9. Medians over the repetitions, seconds of the process on a
CPU (which a busy machine does not count), synchronized wall time on a GPU. All rules take products and
decompositions of the same matrices as Muon, so that ratios carry over to more layers, and, as both grow with
the cube of the width, roughly to wider ones. Writes benchmarks/results/constraint_cost.json and the table in
docs/lipschitz.md. The goal of the caps is a ratio to Muon of 0.1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tables import put_into

from llmnorm import LlmNormConfig, LlmNormForCausalLM, create_optimizer
from llmnorm.config import PRESETS
from llmnorm.evaluation import describe_environment
from llmnorm.modeling import initialize_weights
from llmnorm.optim import Role, project_weights, route_parameters
from llmnorm.optim.spectral_caps import spectral_norm

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "constraint_cost.json"
PAGE = ROOT / "docs" / "lipschitz.md"
GOAL, RATE, ABOVE, BELOW = 0.1, 1e-3, 1.05, 0.9


def capped(name: str, **options: Any) -> dict[str, Any]:
    return {"weight_constraint": {"name": name, **options}}


# row -> (keys of the model, largest singular value over the limit before each repetition)
ROWS: dict[str, tuple[dict[str, Any], float]] = {
    "spectral_cap": (capped("spectral_cap"), ABOVE),
    "spectral_cap, nothing above": (capped("spectral_cap"), BELOW),
    "spectral_cap, polynomial": (capped("spectral_cap", method="polynomial"), ABOVE),
    "spectral_soft_cap": (capped("spectral_soft_cap"), ABOVE),
    "spectral_normalize": (capped("spectral_normalize"), ABOVE),
    "spectral_normalize, nothing above": (capped("spectral_normalize"), BELOW),
    "spectral_hammer": (capped("spectral_hammer"), ABOVE),
    "spectral_weight_decay": (capped("spectral_weight_decay"), ABOVE),
    "stiefel": (capped("stiefel"), ABOVE),
    "normalize_and_project": (capped("normalize_and_project"), ABOVE),
    "weight_parametrization spectral_norm": ({"weight_parametrization": "spectral_norm"}, ABOVE),
    "weight_parametrization spectral_norm, power": (
        {"weight_parametrization": {"name": "spectral_norm", "method": "power"}},
        ABOVE,
    ),
}
# Muon's iterations are in bf16 by default, which some processors compute slower than fp32.
MUON = {"lr_mode": "rms_to_rms"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon", MUON),
    "muon, fp32 iterations": ("muon", {**MUON, "ns_dtype": "fp32"}),
    "adamw": ("adamw", {}),
}


def build(size: str, device: str, **keys: Any) -> LlmNormForCausalLM:
    """One layer with gradients; hidden matrices have a largest singular value of sqrt(out/in)."""
    preset = PRESETS[size]
    config = LlmNormConfig(
        vocab_size=64,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=preset.num_attention_heads,
        **keys,
    )
    model = LlmNormForCausalLM(config)
    initialize_weights(model, 0)
    model.to(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter, role in route_parameters(model):
            if role is Role.HIDDEN_MATRIX:
                m, n = parameter.shape
                parameter.mul_(math.sqrt(m / n) / float(spectral_norm(parameter)))
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
    project_weights(model)
    return model


def seconds(work: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def set_back(model: LlmNormForCausalLM, saved: Mapping[Any, torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in saved.items():
            parameter.copy_(value)


def measure(size: str, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """row -> median, least and largest milliseconds."""
    times: dict[str, list[float]] = {}
    for label, (method, options) in METHODS.items():
        model = build(size, device)
        optimizer = create_optimizer(method, model, lr=RATE, **options)
        optimizer.step()
        times[f"step of {label}"] = [seconds(optimizer.step, device) for _ in range(repeats)]
    for row, (keys, excess) in ROWS.items():
        model = build(size, device, **keys)
        optimizer = create_optimizer("muon", model, lr=RATE, **MUON)
        optimizer.step()
        hidden = [p for _, p, role in route_parameters(model) if role is Role.HIDDEN_MATRIX]
        saved = {p: p.detach() * excess / largest(p) for p in hidden}
        times[row] = []
        for _ in range(repeats):
            set_back(model, saved)
            times[row].append(seconds(lambda m=model, o=optimizer: project_weights(m, o), device))
        print(row, [round(value, 4) for value in times[row]], flush=True)
    return {
        row: {
            name: round(1e3 * function(values), 3)
            for name, function in (("median", statistics.median), ("min", min), ("max", max))
        }
        for row, values in times.items()
    }


def largest(parameter: torch.Tensor) -> float:
    m, n = parameter.shape
    return float(spectral_norm(parameter.detach())) / math.sqrt(m / n)


def short(number: float) -> str:
    """Two digits or more, without exponents."""
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}" if number >= 0.01 else f"{number:.3f}"


def table(record: Mapping[str, Any] | None) -> str:
    """The times and ratios, as Markdown."""
    if record is None:
        return "Not yet measured: `python benchmarks/constraint_cost.py` writes this table."
    results = record["results"]
    steps = [results[f"step of {label}"]["median"] for label in METHODS]
    lines = [
        f"| after a step, one layer of {record['size']} ({record['repeats']} repetitions) | ms, median "
        f"(least to largest) | over {' | over '.join(METHODS)} |",
        f"|---|---|{'---|' * len(METHODS)}",
    ]
    for row, times in results.items():
        shown = f"{short(times['median'])} ({short(times['min'])} to {short(times['max'])})"
        ratios = " | ".join(short(times["median"] / step) for step in steps)
        lines.append(f"| {row} | {shown} | {ratios} |")
    environment = record["environment"]
    lines.append(
        f"\n{record['device']}, {record['threads']} thread(s), torch {environment['torch']}, "
        f"{record['date']}; `{record['command']}`."
    )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="350m", choices=sorted(PRESETS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--render", action="store_true", help="only write the table from the JSON")
    options = parser.parse_args(words)
    if not options.render:
        name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU (process seconds)"
        given = sys.argv[1:] if words is None else words
        record = {
            "what": "milliseconds of project_weights(model, optimizer) and of optimizer.step(), one layer",
            "goal": GOAL,
            "command": " ".join(["python benchmarks/constraint_cost.py", *given]),
            "size": options.size,
            "device": name,
            "threads": torch.get_num_threads(),
            "repeats": options.repeats,
            "date": time.strftime("%Y-%m-%d"),
            "environment": describe_environment(),
            "results": measure(options.size, options.device, options.repeats),
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.output == RESULT:
        content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else None
        put_into(PAGE, "constraint cost", table(content))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
