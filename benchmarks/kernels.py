"""Every operator of llmnorm_kernels on this GPU, against torch eager, torch.compile, torch's own kernels,
Liger and flash-linear-attention, in one run; the last two where they are installed.

    python benchmarks/kernels.py [--only norm] [--repeats 5] [--budget 9]
    python benchmarks/kernels.py --render
    python benchmarks/kernels.py --smoke

The first writes benchmarks/results/kernels.json and, as the second does from that file, the tables of
docs/kernels.md; cells that would begin after the budget's minutes are left out and named. --smoke runs tiny
shapes on the CPU, to see that all of it runs, and writes nothing.

Kernel time: a CUDA graph of calls over operands that together exceed the L2 cache four times, replayed; the
median of the replays, providers interleaved. "bwd" is forward + backward less forward. Memory-bound operators
are given as a share of the copy rate measured in the same run, on random data.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from budget import Budget, add_budget

import llmnorm_kernels as kernels
from llmnorm.optim.quantized_state import codebook, quantized_zeros

RESULTS = Path(__file__).parent / "results" / "kernels.json"
PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
L2_BYTES = 64 << 20
TOKENS = 16384


@dataclass(frozen=True)
class Cell:
    """One operator at one shape: fresh operands, each provider as a function of them, and what it must
    move."""

    name: str
    operands: Callable[[], list[torch.Tensor]]
    providers: dict[str, Callable[..., Any]]
    forward_bytes: float
    backward_bytes: float = 0.0  # zero: no gradient is taken
    flops: float = 0.0


def liger(name: str) -> Any:
    """A function of Liger-Kernel, or None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional

    return getattr(functional, name)


def on_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every operator on its torch reference. The switch is thrown outside of what is
    compiled."""

    def call(*operands: torch.Tensor) -> Any:
        with kernels.use_backend("torch"):
            return function(*operands)

    return call


def with_baselines(ours: Callable[..., Any], plain: Callable[..., Any], **others: Any) -> dict[str, Any]:
    """Ours, `plain` in eager torch and compiled, and the other providers that are present."""
    compiled = on_torch(torch.compile(plain, dynamic=False))
    given = {"ours": ours, "eager": on_torch(plain), "compile": compiled}
    return given | {name: function for name, function in others.items() if function is not None}


def random(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def norm_cells(device: str, tokens: int, widths: tuple[int, ...]) -> Iterator[Cell]:
    liger_rms = liger("liger_rms_norm")
    for d in widths:
        size = 2.0 * tokens * d

        def xw(d: int = d) -> list[torch.Tensor]:
            return [random(tokens, d, device=device), random(d, device=device)]

        def xrw(d: int = d) -> list[torch.Tensor]:
            return [
                random(tokens, d, device=device),
                random(tokens, d, device=device),
                random(d, device=device),
            ]

        others = {
            "torch fused": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
            "liger": liger_rms and (lambda x, w: liger_rms(x, w, 1e-6)),
        }
        providers = with_baselines(kernels.rms_norm, kernels.rms_norm, **others)
        yield Cell(f"rms_norm {d}", xw, providers, 2 * size, 3 * size)
        fused = liger("liger_fused_add_rms_norm")
        others = {"liger": fused and (lambda x, r, w, fused=fused: fused(x, r, w, 1e-6))}
        providers = with_baselines(kernels.add_rms_norm, kernels.add_rms_norm, **others)
        yield Cell(f"add_rms_norm {d}", xrw, providers, 4 * size, 4 * size)
        providers = with_baselines(
            kernels.layer_norm,
            kernels.layer_norm,
            **{"torch fused": lambda x, w: F.layer_norm(x, w.shape, w)},
        )
        yield Cell(f"layer_norm {d}", xw, providers, 2 * size, 3 * size)
        providers = with_baselines(kernels.sandwich_add, kernels.sandwich_add)
        yield Cell(f"sandwich_add {d}", xrw, providers, 3 * size, 3 * size)


def pointwise_cells(device: str, tokens: int, widths: tuple[int, ...]) -> Iterator[Cell]:
    liger_swiglu = liger("liger_swiglu")
    for d in widths:
        f = -(-int(d * 8 / 3) // 64) * 64
        size = 2.0 * tokens * f

        def gates(f: int = f) -> list[torch.Tensor]:
            return [random(tokens, f, device=device), random(tokens, f, device=device)]

        providers = with_baselines(kernels.swiglu, lambda g, u: F.silu(g) * u, liger=liger_swiglu)
        yield Cell(f"swiglu {f}", gates, providers, 3 * size, 5 * size)
        heads, time_steps = max(1, d // 128), min(2048, tokens)
        shape = (tokens // time_steps, time_steps, heads, 128)
        angle = torch.rand(1, time_steps, 128, device=device)
        cos, sin = angle.cos(), angle.sin()

        def qkw(shape: tuple[int, ...] = shape) -> list[torch.Tensor]:
            q, k = (random(*shape, device=device).transpose(1, 2) for _ in range(2))
            return [q, k, random(128, device=device), random(128, device=device)]

        def normed(q: Any, k: Any, wq: Any, wk: Any, cos: Any = cos, sin: Any = sin) -> Any:
            return kernels.qk_norm_rope(q, k, wq, wk, cos, sin)

        size = 2.0 * 2 * tokens * heads * 128
        yield Cell(f"qk_norm_rope {d}", qkw, with_baselines(normed, normed), 2 * size, 3 * size)


def loss_cells(
    device: str, tokens: int, widths: tuple[int, ...], vocabularies: tuple[int, ...]
) -> Iterator[Cell]:
    fused = liger("liger_fused_linear_cross_entropy")
    own = getattr(F, "linear_cross_entropy", None)
    for vocabulary in vocabularies:
        for d in widths:
            target = torch.randint(0, vocabulary, (tokens,), device=device)

            def xw(d: int = d, vocabulary: int = vocabulary) -> list[torch.Tensor]:
                return [random(tokens, d, device=device), random(vocabulary, d, device=device) / d**0.5]

            def ours(x: Any, w: Any, target: Any = target) -> Any:
                return kernels.linear_cross_entropy(x, w, target)

            def eager(x: Any, w: Any, target: Any = target) -> Any:
                return F.cross_entropy((x @ w.t()).float(), target)

            others = {
                "torch fused": own and (lambda x, w, target=target: own(x, w, target)),
                "liger": fused and (lambda x, w, target=target: fused(x, w, target)),
            }
            flops = 6.0 * tokens * d * vocabulary
            yield Cell(
                f"linear_ce {d} x {vocabulary}", xw, with_baselines(ours, eager, **others), 0, 1, flops
            )


def chunkwise_of_fla() -> Any:
    """flash-linear-attention's normalized linear attention, its nearest kernel, or None where it is not
    installed."""
    if importlib.util.find_spec("fla") is None:
        return None

    def call(q: Any, k: Any, v: Any) -> Any:
        from fla.ops.linear_attn import chunk_linear_attn  # here, so that a broken install costs one column

        # Its layout is (batch, time, heads, width).
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0]

    return call


def attention_cells(device: str, tokens: int, lengths: tuple[int, ...], heads: int) -> Iterator[Cell]:
    """Linear attention of given features, and with SLA's map inside, against SDPA and fla."""
    for length in lengths:
        shape = (max(1, tokens // length), heads, length, 64)

        def features(shape: tuple[int, ...] = shape) -> list[torch.Tensor]:
            q, k, v = (random(*shape, device=device) for _ in range(3))
            return [q.abs(), k.abs(), v]

        def mapped(q: Any, k: Any, v: Any) -> Any:
            return kernels.linear_attention(q, k, v, feature_map="relu")

        def softmax(q: Any, k: Any, v: Any) -> Any:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        others = {"sdpa": softmax, "fla": chunkwise_of_fla()}
        size = 2.0 * shape[0] * heads * length * 64
        for name, ours in (("linear_attention", kernels.linear_attention), ("linear_attention relu", mapped)):
            providers = {"ours": ours, "eager": on_torch(ours)}
            providers |= {other: call for other, call in others.items() if call is not None}
            yield Cell(f"{name} T={length}", features, providers, 4 * size, 8 * size)


def absent_providers() -> list[str]:
    """The optional packages whose columns stay empty."""
    named = {"liger": "liger_kernel", "fla": "fla"}
    return [name for name, package in named.items() if importlib.util.find_spec(package) is None]


def step_cells(device: str, elements: int) -> Iterator[Cell]:
    def master() -> list[torch.Tensor]:
        return [torch.randn(elements, device=device).abs() for _ in range(4)]

    def ours(p: Any, g: Any, m: Any, v: Any) -> None:
        kernels.adamw_(p, g, m, v, step=1, lr=1e-3)

    def eager(p: Any, g: Any, m: Any, v: Any) -> None:
        m.lerp_(g, 0.1)
        v.mul_(0.999).addcmul_(g, g, value=1e-3)
        p.addcdiv_(m / 0.1, (v / 1e-3).sqrt_().add_(1e-8), value=-1e-3)

    yield Cell("adamw fp32", master, with_baselines(ours, eager), 28.0 * elements)
    param = torch.empty(elements, dtype=torch.bfloat16, device=device)

    def small() -> list[torch.Tensor]:
        return [
            random(elements, device=device),
            random(elements, device=device),
            *kernels.quantized_moments(param),
        ]

    def eight(p: Any, g: Any, *states: Any) -> None:
        kernels.adamw_(p, g, *states[:2], step=1, lr=1e-3, scales=states[2:])

    yield Cell("adamw 8-bit", small, {"ours": eight, "eager": on_torch(eight)}, 10.0 * elements)
    side = 1 << ((elements.bit_length() - 1) // 2)
    tables = [table for signed in (True, False) for table in codebook(8, signed, torch.device(device))]

    def blocks() -> list[torch.Tensor]:
        weight, grad = random(side, side, device=device), random(side, side, device=device)
        return [weight, grad, *(part for _ in range(2) for part in quantized_zeros(weight, 8)), *tables]

    def mapped(*given: Any) -> None:
        kernels.adamw_blockwise_(*given, block=256, step=1, lr=1e-3)

    providers = {"ours": mapped, "eager": on_torch(mapped)}
    yield Cell(f"adamw 8-bit blocks {side}", blocks, providers, 10.0 * side**2)

    def matrix() -> list[torch.Tensor]:
        return [random(side, side, device=device)]

    flops = 2.0 * side**3
    providers = {"ours": kernels.symmetric_product, "eager": lambda x: x @ x.t()}
    yield Cell(f"symmetric_product {side}", matrix, providers, 0, 0, flops)


def timed(call: Callable[[], Any], device: str) -> Callable[[], float]:
    """A function that runs `call` once and returns its seconds: a replay of its CUDA graph, or plain on the
    CPU."""
    if device == "cpu":
        call()

        def plain() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return plain
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return replay


def measure(cell: Cell, device: str, repeats: int) -> dict[str, Any]:
    """Microseconds per call of every provider, and the peak memory of one forward and backward of it."""
    first = cell.operands()
    one = sum(t.numel() * t.element_size() for t in first)
    # Matrix-bound cells and the smoke run need no cold cache.
    count = 1 if device == "cpu" or cell.flops else max(4, min(64, 4 * L2_BYTES // one + 1))
    sets = [first, *(cell.operands() for _ in range(count - 1))]
    gradient = cell.backward_bytes > 0
    runs: dict[str, Callable[[], float]] = {}
    row: dict[str, Any] = {"failed": {}, "peak_mb": {}}
    for name, function in cell.providers.items():

        def forward(function: Any = function) -> None:
            with torch.no_grad():
                for operands in sets:
                    function(*operands)

        def both(function: Any = function) -> None:
            for operands in sets:
                leaves = [t.detach().requires_grad_() for t in operands]
                outputs = function(*leaves)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])

        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                (both if gradient else forward)()
                row["peak_mb"][name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            runs[f"{name} fwd"] = timed(forward, device)
            if gradient:
                runs[f"{name} fwd+bwd"] = timed(both, device)
        except Exception as error:
            # One provider that refuses a shape or a capture must not cost the whole table; the table says so.
            row["failed"][name] = f"{type(error).__name__}: {str(error)[:200]}"
            if device == "cuda":
                torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            samples[name].append(run() / count * 1e6)
    row["us"] = {name: statistics.median(values) for name, values in samples.items()}
    row["spread"] = {name: (max(v) - min(v)) / statistics.median(v) for name, v in samples.items()}
    return row | {"bytes": [cell.forward_bytes, cell.backward_bytes], "flops": cell.flops}


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a device copy of 512 MB."""
    source = torch.randn((512 << 20) // 4 if device == "cuda" else 1 << 16, device=device)
    target = torch.empty_like(source)
    run = timed(lambda: target.copy_(source), device)
    return 2 * source.numel() * 4 / statistics.median(run() for _ in range(9))


def render(record: dict[str, Any] | None) -> str:
    """The measured tables of docs/kernels.md."""
    if record is None:
        return (
            "Not yet measured on a GPU. `python benchmarks/kernels.py` on one writes the JSON of this table."
        )
    copy = record["copy_bytes_per_second"]
    others = ["eager", "compile", "torch fused", "liger", "sdpa", "fla"]
    columns = [f"{name} (not installed)" if name in record["absent"] else name for name in others]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"{record['device']}, {record['date']}, {versions}, `{record['command']}`.",
        f"Copy: {copy / 1e12:.2f} TB/s. Microseconds; in brackets the share of the copy rate.",
        "",
        "| operator | pass | ours | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(others),
    ]
    for name, row in record["results"].items():
        for label, needed in (("fwd", row["bytes"][0]), ("bwd", row["bytes"][1])):
            cells = []
            for provider in ("ours", *others):
                forward, both = row["us"].get(f"{provider} fwd"), row["us"].get(f"{provider} fwd+bwd")
                us = forward if label == "fwd" else both - forward if both and forward else None
                share = f" ({needed / us * 1e6 / copy:.0%})" if us and needed > 1 else ""
                cells.append("-" if us is None else f"{us:.0f}{share}")
            if cells[0] != "-":
                lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    if record["left_out"]:
        lines += ["", f"Not begun within the budget: {', '.join(record['left_out'])}."]
    return "\n".join(lines)


def write_page() -> None:
    record = json.loads(RESULTS.read_text()) if RESULTS.is_file() else None
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n{render(record)}\n{MARKS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cells whose name contains this text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    add_budget(parser)
    options = parser.parse_args()
    if options.render:
        write_page()
        return 0
    if not options.smoke and not torch.cuda.is_available():
        print("benchmarks/kernels.py measures a GPU and there is none; nothing was measured or written")
        return 0
    device = "cpu" if options.smoke else "cuda"
    tokens, widths = (64, (64,)) if options.smoke else (TOKENS, (768, 1024, 2048, 4096, 8192))
    few, vocabularies = (widths, (128,)) if options.smoke else ((1024, 4096), (32000, 128256))
    lengths = (64,) if options.smoke else (2048, 8192, 65536)
    cells = [
        *norm_cells(device, tokens, widths),
        *pointwise_cells(device, tokens, widths if options.smoke else (1024, 2048, 4096)),
        *loss_cells(device, tokens, few, vocabularies),
        *attention_cells(device, tokens, lengths, 1 if options.smoke else 16),
        *step_cells(device, 1 << 12 if options.smoke else 1 << 28),
    ]
    if absent_providers():
        print(f"not installed, so without a column: {', '.join(absent_providers())}", flush=True)
    if options.smoke:
        # No compiler is promised on a CPU machine.
        for cell in cells:
            cell.providers.pop("compile", None)
    results: dict[str, Any] = {}
    budget = Budget(options.budget, device)
    for cell in cells:
        if options.only in cell.name and budget.allows(cell.name):
            results[cell.name] = measure(cell, device, options.repeats)
            print(cell.name, results[cell.name]["us"], results[cell.name]["failed"], flush=True)
    budget.report()
    if options.smoke:
        return 1 if any(row["failed"] for row in results.values()) else 0
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "what": "kernel time by CUDA graph over rotating operands, median of replays, providers interleaved",
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "tokens": tokens,
        "absent": absent_providers(),
        "left_out": budget.left_out,
        "copy_bytes_per_second": copy_rate(device),
        "results": results,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
