"""The compile gate: every kernel, as its launcher ships it, built for four GPUs on a machine that has none.

    python kernels/gate.py [--targets sm_90 ...] [--jobs N] [--only TEXT] [--write]

A stub driver takes the place of the GPU: the real launchers run on CPU tensors (`gate_cases.py`), Triton
compiles what they launch for the target, nothing is executed. A build fails if it spills registers, wants
more shared memory than the target has, or, for aligned operands, loads global memory 16 bits at a time.
`--write` renews kernels/GATE.md, so that a change of registers shows in review; a test compares the hash that
it holds with the sources. Compiled binaries are cached by Triton and their readings beside them, both by a
hash of the source.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = HERE / "GATE.md"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


HEAD = """# Compile gate

Registers per thread / shared memory of every kernel as shipped, built without a GPU by `make kernels-gate`.
No build spills to memory; none loads 16 bits at a time but those of unaligned operands ("odd", "shifted"), of
odd-width gains ("padded"), of the one logit that a cross entropy picks from each row, of the last chunk of a
tensor ("adamw many") and of the 16 x 16 values or gradients of the widest features ("attention 256x128",
"attention relu_split 128").
"""


def sources() -> str:
    """What the table was built from: a hash of the files that define or launch Triton kernels, and of the
    cases."""
    digest = hashlib.sha256()
    for path in (HERE / "gate_cases.py", *sorted((HERE / "llmnorm_kernels").glob("*.py"))):
        text = path.read_text(encoding="utf-8")
        if path.parent == HERE or "import triton" in text:
            digest.update(f"{path.name}\n{text}\n".encode())
    return f"Sources: {digest.hexdigest()[:16]}"


def cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmnorm" / "gate-readings"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class StubDriver:
    """What Triton asks of a driver, answered without a device; one target per process, because kernels are
    cached per device."""

    def __init__(self, target: Any) -> None:
        import torch

        self.target = target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0
        self.get_current_target = lambda: target
        self.get_device_interface = lambda: torch.cuda
        self.utils = type(
            "Utils",
            (),
            {
                "get_device_properties": staticmethod(
                    lambda device: {"max_shared_mem": 1 << 30, "multiprocessor_count": 132}
                ),
                "load_binary": staticmethod(lambda *args: (1, 1, 0, 0, 1024)),
                "unload_module": staticmethod(lambda module: None),
            },
        )
        self.launcher_cls = lambda source, metadata: lambda *args: None


def nvidia_usage(compiled: Any) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    reading = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    # A stack frame is how ptxas spills; 16-bit global loads are eight times the instructions of 128-bit ones.
    return {
        "regs": reading["REG"],
        "spill": reading["STACK"],
        "ld16": compiled.asm["sass"].count("LDG.E.U16"),
    }


def amd_usage(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def read(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        assert match is not None, key
        return int(match.group(1))

    # Scalar registers spill into lanes of vector registers; only what reaches memory counts, as on NVIDIA.
    return {"regs": read("vgpr_count"), "spill": read("private_segment_fixed_size"), "ld16": 0}


def usage(compiled: Any, target: str) -> dict[str, int]:
    """Registers, spilled bytes, 16-bit loads and shared memory of one binary."""
    memo = cache_folder() / f"{compiled.hash}.json"
    if memo.is_file():
        return json.loads(memo.read_text())
    reading = amd_usage(compiled) if target.startswith("gfx") else nvidia_usage(compiled)
    reading["smem"] = compiled.metadata.shared
    # Written aside and renamed: workers of two gates may share the folder.
    part = memo.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(reading))
    part.replace(memo)
    return reading


def build(target: str, only: str) -> list[dict[str, Any]]:
    """Compile the cases whose name contains `only` for one target, in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    driver.set_active(StubDriver(GPUTarget(*TARGETS[target])))
    sys.path.insert(0, str(HERE))
    from gate_cases import cases

    launched: list[CompiledKernel] = []
    run = triton.runtime.JITFunction.run

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = run(self, *args, **kwargs)
        launched.append(compiled)
        return compiled

    triton.runtime.JITFunction.run = record
    rows = []
    for case in cases():
        if only not in case.name or target in case.skip:
            continue
        launched.clear()
        case.launch()
        assert launched, f"{case.name} launched nothing"
        seen = set()
        for compiled in launched:
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                reading = usage(compiled, target)
                reading["warps"] = compiled.metadata.num_warps
                rows.append(
                    {
                        "case": case.name,
                        "kernel": compiled.name,
                        "aligned": case.aligned,
                        "scalars": case.scalars,
                        **reading,
                    }
                )
    return rows


def failures(target: str, rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for row in rows:
        name = f"{target} {row['case']} {row['kernel']}"
        if row["spill"]:
            found.append(f"{name}: spills ({row['spill']}); use more warps or a smaller tile")
        if row["smem"] > SHARED_MEMORY[target]:
            found.append(
                f"{name}: {row['smem']} bytes of shared memory, at most {SHARED_MEMORY[target]}; cut stages"
            )
        if row["aligned"] and row["ld16"] > row["scalars"]:
            found.append(f"{name}: {row['ld16']} 16-bit loads of aligned operands; check masks and strides")
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """One line per case and kernel: registers / shared memory per target."""
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for target, rows in results.items():
        for row in rows:
            marks = "".join(f" **{mark} {row[mark]}**" for mark in ("spill",) if row[mark])
            marks += f" ({row['ld16']} ld16)" if row["ld16"] else ""
            text = f"{row['regs']} / {row['smem'] / 1024:.3g}K{marks}"
            cells.setdefault((row["case"], row["kernel"], row["warps"]), {})[target] = text
    lines = [f"| case | kernel | warps | {' | '.join(results)} |", "|---|---|---|" + "---|" * len(results)]
    for (case, kernel, warps), columns in cells.items():
        lines.append(
            f"| {case} | `{kernel}` | {warps} | "
            + " | ".join(columns.get(target, "-") for target in results)
            + " |"
        )
    return "\n".join(lines)


def run_worker(target: str, only: str) -> tuple[str, list[dict[str, Any]]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # The default of multiply-add fusion changes in Triton 3.10; the gate reads what ships.
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [sys.executable, __file__, "--worker", target, "--only", only, "--answer", answer.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"gate: the build for {target} broke\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        return target, json.loads(Path(answer.name).read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--only", default="", help="build only the cases whose name contains this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets built at once")
    parser.add_argument("--write", action="store_true", help="renew kernels/GATE.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        Path(options.answer).write_text(json.dumps(build(options.worker, options.only)))
        return 0
    import torch
    import triton

    started, built_from = time.monotonic(), sources()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(pool.map(lambda target: run_worker(target, options.only), options.targets))
    seconds = time.monotonic() - started
    text = table(results)
    print(text)
    wrong = [line for target, rows in results.items() for line in failures(target, rows)]
    count = sum(map(len, results.values()))
    print(f"\n{count} builds for {', '.join(results)} in {seconds:.0f} s, {len(wrong)} failures")
    for line in wrong:
        print("FAIL", line)
    if options.write:
        if options.only or len(results) != len(TARGETS) or wrong:
            raise SystemExit("gate: --write needs every case and target, and no failure")
        versions = f"Triton {triton.__version__}, torch {torch.__version__.partition('+')[0]}"
        TABLE.write_text(f"{HEAD}{versions}. {built_from}.\n\n{text}\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
