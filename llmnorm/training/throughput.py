"""How fast the run goes: tokens per second, model FLOPs utilization, memory.

    MFU = tokens_per_second * flops_per_token / (processes * peak FLOPs per second of one device)

with flops_per_token = 6 N_matmul + causal attention (the look-up of the embedding excluded, the head
included, no recomputation counted), and the vendor's dense bf16 peak. A device that is not in the table,
and fp32 runs, have no MFU.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

# Dense bf16 tensor-core peak in FLOPs per second, by a part of the device's name; the first match counts.
PEAK_FLOPS = (
    ("B300", 2.5e15),
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 150e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("MI355X", 2.5e15),
    ("MI325X", 1.307e15),
    ("MI300X", 1.307e15),
    ("MI250X", 383e12),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOPs per second that one device could do at best, or None where that is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


class Throughput:
    """Time between updates, and the numbers derived from it."""

    def __init__(self, device: torch.device, precision: str, world_size: int, flops_per_token: float) -> None:
        self.device = device
        self.flops_per_token = flops_per_token
        peak = peak_flops(device, precision)
        self.peak = None if peak is None else peak * world_size
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begin to count; called again after anything that is not training."""
        self._last = time.perf_counter()

    def measure(self, tokens: int) -> dict[str, float]:
        """Numbers of the update that ends now and had `tokens` valid tokens over all processes."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = tokens / seconds
        numbers = {"tokens_per_second": rate, "seconds": seconds, "memory_gib": peak_memory_gib(self.device)}
        if self.peak is not None:
            numbers["mfu"] = rate * self.flops_per_token / self.peak
        return numbers

    def explain(self) -> str:
        """One line that says what MFU means here, printed at the start."""
        if self.peak is None:
            return "MFU is not shown: no bf16 peak is known for this device and precision"
        return (
            f"MFU = tokens/s x {self.flops_per_token:.4g} FLOPs per token (6 N_matmul + causal attention, no "
            f"recomputation) / {self.peak:.4g} FLOPs/s (dense bf16 peak, all devices)"
        )


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on the accelerator, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
