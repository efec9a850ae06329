"""The compile gate's table belongs to the kernels that are here; the gate itself is `make kernels-gate`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_gate", KERNELS / "gate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_was_built_from_these_kernels(gate: ModuleType) -> None:
    text = gate.TABLE.read_text(encoding="utf-8")
    assert gate.sources() in text, (
        "kernels/GATE.md is that of other sources; run python kernels/gate.py --write, which fails on a spill"
    )


def test_a_change_of_a_kernel_makes_the_table_stale(gate: ModuleType, tmp_path, monkeypatch) -> None:
    (tmp_path / "llmnorm_kernels").mkdir()
    kernel, prose = tmp_path / "llmnorm_kernels/a_kernels.py", tmp_path / "llmnorm_kernels/a.py"
    (tmp_path / "gate_cases.py").write_text("cases")
    kernel.write_text("import triton\n")
    prose.write_text("import torch\n")
    monkeypatch.setattr(gate, "HERE", tmp_path)
    before = gate.sources()
    prose.write_text("import math\n")
    assert gate.sources() == before
    kernel.write_text("import triton  # changed\n")
    assert gate.sources() != before


def test_failures_name_the_build_and_the_rule(gate: ModuleType) -> None:
    good = {"case": "a", "kernel": "k", "aligned": True, "scalars": 1, "spill": 0, "smem": 1024, "ld16": 1}
    assert gate.failures("sm_90", [good]) == []
    for wrong in ({"spill": 8}, {"smem": 1 << 20}, {"ld16": 2}):
        (line,) = gate.failures("sm_90", [good | wrong])
        assert line.startswith("sm_90 a k: ") and str(*wrong.values()) in line
    assert gate.failures("sm_90", [good | {"ld16": 9, "aligned": False}]) == []


@pytest.mark.parametrize("target", ["hip", "sm_80", "sm_90", "sm_100"])
def test_every_pass_of_linear_attention_has_a_shape(target: str) -> None:
    """Up to the widest heads, with chunks that a product takes."""
    pytest.importorskip("triton")
    from llmnorm_kernels.linear_attention import WIDEST_HEAD
    from llmnorm_kernels.linear_attention_launch import choose_shape

    for work in ("attend", "dq", "dk", "dv"):
        for halves in (1, 2):
            for features in range(halves, WIDEST_HEAD + 1, halves):
                shape = choose_shape(target, work, halves, features)
                assert shape.chunk >= 16 and shape.warps in (4, 8) and shape.state <= 8192
    # The spills of the gate on 2026-11-21, each in the row that mends it.
    assert choose_shape("sm_80", "attend", 1, 128).chunk == 16
    assert choose_shape("hip", "dv", 1, 128).warps == 4
    assert choose_shape("sm_90", "attend", 1, 256).warps == 8
    assert choose_shape("sm_100", "dv", 1, 128) != choose_shape("sm_90", "dv", 1, 128)
