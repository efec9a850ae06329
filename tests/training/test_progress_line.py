"""The progress line: everything a person watches, one plain line per report where there is no terminal."""

import io

import pytest
import torch

from llmnorm.training import throughput
from llmnorm.training.progress import ProgressLine
from llmnorm.training.throughput import Throughput

ROW = {
    "step": 10,
    "loss": 3.25,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.0,
    "seconds": 2.0,
    "memory_gib": 1.5,
    "mfu": 0.412,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_everything():
    stream = io.StringIO()
    ProgressLine(100, stream=stream).update(ROW)
    assert stream.getvalue() == (
        "step 10/100  loss 3.2500  lr 1.00e-03  grad norm 0.5000  12.3k tokens/s  MFU 41.2%  1.5 GiB  "
        "ETA 0:03:00\n"
    )


def test_without_a_known_peak_there_is_no_mfu_and_a_skipped_update_is_named():
    stream = io.StringIO()
    row = {**ROW, "loss": None, "skipped": True}
    del row["mfu"]
    ProgressLine(100, stream=stream).update(row)
    assert "MFU" not in stream.getvalue()
    assert "loss not finite" in stream.getvalue() and stream.getvalue().endswith("update skipped\n")


def test_plain_lines_come_every_log_every_steps_and_at_the_end():
    stream = io.StringIO()
    line = ProgressLine(11, log_every=4, stream=stream)
    for step in range(1, 12):
        line.update({**ROW, "step": step})
    assert [text.split()[1] for text in stream.getvalue().splitlines()] == ["4/11", "8/11", "11/11"]


def test_a_terminal_gets_a_live_line_and_notes_above_it():
    stream = Terminal()
    line = ProgressLine(100, stream=stream)
    line.update(ROW)
    line.note("step 10: validation loss 3.2")
    line.close()
    assert "loss 3.2500" in stream.getvalue() and "validation loss 3.2" in stream.getvalue()


def test_other_processes_are_silent():
    stream = io.StringIO()
    line = ProgressLine(100, enabled=False, stream=stream)
    line.update(ROW)
    line.note("note")
    assert stream.getvalue() == ""


def test_mfu_is_tokens_per_second_times_flops_over_all_peaks(monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 1e12)
    meter = Throughput(torch.device("cpu"), "bf16", world_size=4, flops_per_token=2e6)
    numbers = meter.measure(tokens=1_000_000)
    assert numbers["tokens_per_second"] == 500_000.0
    assert numbers["mfu"] == pytest.approx(500_000 * 2e6 / 4e12)
    assert "2e+06 FLOPs per token" in meter.explain() and "4e+12" in meter.explain()


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16_pure", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312e12),
        ("NVIDIA A40", "bf16", 150e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("AMD Instinct MI300X", "bf16", 1.307e15),
        ("NVIDIA H200", "fp32", None),
        ("Some GPU", "bf16", None),
    ],
)
def test_peaks_are_the_vendors_dense_bf16_numbers(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput.peak_flops(torch.device("cuda"), precision) == peak


def test_a_cpu_has_no_peak():
    assert throughput.peak_flops(torch.device("cpu"), "bf16") is None
