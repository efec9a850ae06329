"""Runs with a norm and an optimizer from the user's files."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from llmnorm.checkpoint import newest_checkpoint, read_state
from llmnorm.errors import UserError
from llmnorm.export import load_model
from llmnorm.modeling.plugin_norms import CLASSES
from llmnorm.plugins import LOADED, MARK
from llmnorm.training import train
from llmnorm.training.plan import make_plan

EXAMPLES = Path(__file__).parents[2] / "configs" / "plugins"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    LOADED.clear()
    CLASSES.clear()
    for name in [name for name, module in sys.modules.items() if hasattr(module, MARK)]:
        del sys.modules[name]


@pytest.fixture
def own_config(run_config: Callable, tmp_path: Path) -> Callable:
    """The config of a run with both example files, copied to where a test may change them."""
    for name in ("partial_rms.py", "sign_descent.py"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    parts = {
        "plugins": [str(tmp_path / "sign_descent.py")],
        "model.norm": f"{tmp_path}/partial_rms.py:PartialRMS",
        "model.norm_options": {"fraction": 0.5},
        "optimizer.name": "custom",
        "optimizer.class_path": "sign_descent.SignDescent",
        "optimizer.lr": 1e-3,
        "optimizer.momentum": 0.8,
        "schedule.name": "constant",
        "checkpoint.every": 2,
    }
    return lambda **changes: run_config(**{**parts, **changes})


def test_a_run_records_its_plugins_and_resumes_by_them(
    own_config: Callable, rows: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes = {"train.max_steps": 4, "export.at_end": True}
    whole = train(own_config(**changes, output_dir=str(tmp_path / "whole"))).output_dir
    halves = str(tmp_path / "halves")
    train(own_config(**{**changes, "train.max_steps": 2}, output_dir=halves))
    checkpoint = newest_checkpoint(Path(halves) / "checkpoints")
    for name in ("partial_rms.py", "sign_descent.py"):
        assert (checkpoint / name).read_text() == (tmp_path / name).read_text()
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert read_state(checkpoint)["plugins"][name] == digest
    assert load_model(halves).config.norm_options == {"fraction": 0.5, "placement": "pre"}
    train(own_config(**changes, output_dir=halves))
    assert "has changed" not in capsys.readouterr().out
    keys = ("step", "loss", "grad_norm")
    first, second = ([{key: row[key] for key in keys} for row in rows(run)] for run in (whole, halves))
    assert first == second and len(first) == 4
    assert (whole / "export" / "partial_rms.py").exists()
    assert not (whole / "export" / "sign_descent.py").exists(), "an export does not train"


def test_a_changed_file_is_named_on_resume(
    own_config: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = str(tmp_path / "run")
    train(own_config(**{"train.max_steps": 2}, output_dir=run))
    changed = tmp_path / "partial_rms.py"
    changed.write_text(changed.read_text().replace("self.eps = eps", "self.eps = 2 * eps"))
    capsys.readouterr()
    train(own_config(**{"train.max_steps": 4}, output_dir=run))
    said = " ".join(capsys.readouterr().out.split())
    assert "partial_rms.py has changed since this run was saved (sha256 " in said
    assert "sign_descent.py has changed" not in said


def test_the_plan_knows_plugins_and_mistakes_write_nothing(
    own_config: Callable, run_config: Callable, tmp_path: Path
) -> None:
    plan = make_plan(own_config(**{"model.vocab_size": 320}))
    assert plan.model_config.norm == "partial_rms.py:PartialRMS"
    built_in = make_plan(run_config(**{"model.vocab_size": 320, "model.norm": "pre_rmsnorm"}))
    # Composed by autograd it keeps more than x: x and x / rms in fp32, a slice's squares, two statistics.
    more = (plan.per_token.layers["none"] - built_in.per_token.layers["none"]) / (2 * 2 * 32)
    assert 4 <= more <= 12
    for changes, message in (
        ({"model.norm_options": {"fractoin": 0.5}}, "norm_options.fractoin is not an option"),
        (
            {"model.norm": f"{tmp_path}/partial_rms.py:Partial"},
            "partial_rms.py has partial_rms.py:PartialRMS",
        ),
        ({"model.norm": f"{tmp_path}/absent.py:Norm"}, "absent.py cannot be read"),
        ({"plugins": [str(tmp_path / "absent.py")]}, "absent.py cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            train(own_config(**changes, output_dir=str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()


def test_the_documented_yaml_is_a_run(run_config: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    root = EXAMPLES.parents[1]
    page = (root / "docs" / "plugins.md").read_text(encoding="utf-8")
    written = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    assert set(written) == {"plugins", "model", "optimizer"}
    monkeypatch.chdir(root)
    keys = {f"{s}.{key}": value for s in ("model", "optimizer") for key, value in written[s].items()}
    keys |= {"plugins": written["plugins"], "optimizer.name": "custom", "model.vocab_size": 320}
    plan = make_plan(run_config(**keys))
    assert plan.config.optimizer.method == "sign_descent.SignDescent"
    assert plan.model_config.norm_options == {"fraction": 0.25, "placement": "pre"}
