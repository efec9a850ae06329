"""`llmnorm check`: what it passes, and that each check fails on the mistake it is there for."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmnorm.cli import main
from llmnorm.errors import UserError
from llmnorm.modeling.plugin_norms import CLASSES
from llmnorm.plugins import LOADED, MARK
from llmnorm.training import plugin_check
from llmnorm.training.plugin_check import NORM_CHECKS, Part, check_plugin, format_outcomes, parts_of

EXAMPLES = Path(__file__).parents[2] / "configs" / "plugins"

NORM = """
import torch
from torch import nn


class Rms(nn.Module):
    def __init__(self, hidden_size, eps):
        super().__init__()
        self.eps = eps
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x):
        wide = x.float()
        wide = wide * (MEAN(wide * wide) + self.eps).rsqrt()
        return (wide * self.weight).to(x.dtype)
"""
ROW = "(wide * wide).mean(-1, keepdim=True)"
MISTAKES = {
    "dtype": (
        "(wide * self.weight).to(x.dtype)",
        "wide * self.weight",
        "torch.bfloat16 becomes .* torch.float32",
    ),
    "causality": (
        ROW,
        "(wide * wide).mean((1, 2), keepdim=True)",
        "training mode the logits before position 1 ",
    ),
    "export": (
        "(wide * self.weight)",
        "(wide * self.weight * (2 if __name__.startswith('llmnorm') else 1))",
        "does not compute what the live model computes",
    ),
    "resume": (
        "wide = x.float()",
        "wide = x.float() + (0 if self.calls < 3 else 1); self.calls += self.training",
        "differs after two resumed updates",
    ),
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    LOADED.clear()
    CLASSES.clear()
    for name in [name for name, module in sys.modules.items() if hasattr(module, MARK)]:
        del sys.modules[name]


@pytest.fixture
def norm(tmp_path: Path) -> Callable[[str, str], Part]:
    def make(old: str = "", new: str = "") -> Part:
        text = NORM.replace("MEAN(wide * wide)", ROW)
        assert old in text
        (tmp_path / "rms_plugin.py").write_text(text.replace(old, new))
        (part,) = parts_of(str(tmp_path / "rms_plugin.py"), {})
        return part

    return make


def outcome(part: Part, name: str) -> tuple[str, str]:
    found = plugin_check._run(part, name, NORM_CHECKS[name])
    return found.result, found.reason


def test_a_sound_norm_passes(norm: Callable) -> None:
    part = norm()
    assert {name: outcome(part, name) for name in NORM_CHECKS} == dict.fromkeys(NORM_CHECKS, ("pass", ""))


@pytest.mark.parametrize("check", sorted(MISTAKES))
def test_each_check_fails_on_its_mistake(norm: Callable, check: str) -> None:
    """Among them a leaky norm, whose statistics are taken over the whole sequence: it must fail causality."""
    old, new, reason = MISTAKES[check]
    result, said = outcome(norm(old, new), check)
    assert result == "FAIL"
    assert re.search(reason, said), said


def test_the_command_prints_a_table_and_exits_by_it(
    norm: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(plugin_check, "check_pairs", lambda part: [])
    leaky = norm(ROW, "(wide * wide).mean((1, 2), keepdim=True)")
    with pytest.raises(SystemExit) as stopped:
        main(["check", f"{leaky.file}:Rms"])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines] == [
        ["dtype", "pass"],
        ["causality", "FAIL"],
        ["export", "pass"],
        ["resume", "pass"],
    ]
    main(["check", norm().file])
    for words, message in (
        (["check", f"{leaky.file}:Layer"], "has no norm or optimizer Layer; it has Rms"),
        (["check", leaky.file, "--options", "{size: 3}"], "norm_options.size is not an option"),
        (["check", leaky.file, "--options", "3"], "--options 3 is no mapping"),
        (["check", "absent.py"], "absent.py cannot be read"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


WHOLE = '''
import torch
from torch.optim import Optimizer


class UnitUpdate(Optimizer):
    """w <- w - lr g / ||g||: beyond a shard."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad / (p.grad.norm() + 1e-8), alpha=-group["lr"])
'''


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_make_the_updates_of_one_or_refuse(tmp_path: Path) -> None:
    (tmp_path / "unit_update.py").write_text(WHOLE)
    outcomes = check_plugin(str(tmp_path / "unit_update.py"))
    assert [(o.check, o.result) for o in outcomes] == [
        ("resume", "pass"),
        ("ddp", "pass"),
        ("fsdp2", "refused"),
    ], format_outcomes(outcomes)
    assert "unit_update.UnitUpdate looks beyond the rows of a shard" in outcomes[-1].reason


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("file", ["partial_rms.py", "sign_descent.py"])
def test_the_examples_pass_everything(file: str) -> None:
    outcomes = check_plugin(str(EXAMPLES / file))
    assert {o.result for o in outcomes} == {"pass"}, format_outcomes(outcomes)
    assert {"ddp", "fsdp2", "resume"} <= {o.check for o in outcomes}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_norm_over_the_batch_fails_two_processes(norm: Callable) -> None:
    part = norm(ROW, "(wide * wide).mean((0, 2), keepdim=True)")
    outcomes = plugin_check.check_pairs(part)
    assert [(o.check, o.result) for o in outcomes] == [("ddp", "FAIL"), ("fsdp2", "FAIL")]
    with pytest.raises(UserError, match=r"neither an nn.Module nor a torch.optim.Optimizer"):
        check_plugin(__file__)
