"""Norms that users bring: placements, options, initial values, exports that need nothing of llmnorm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmnorm.errors import UserError
from llmnorm.evaluation.loading import load_causal_lm
from llmnorm.export import NotFoldableError, export_checkpoint, fold_to_stock, load_model
from llmnorm.export.code import plugin_sources
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.plugin_norms import CLASSES
from llmnorm.plugins import LOADED, load_plugin

EXAMPLE = Path(__file__).resolve().parents[2] / "configs" / "plugins" / "partial_rms.py"
PARTIAL = "partial_rms.py:PartialRMS"
IDS = torch.randint(3, 299, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test loads is forgotten after it."""
    loaded, classes, modules = dict(LOADED), dict(CLASSES), set(sys.modules)
    load_plugin(EXAMPLE, "plugins")
    yield
    for kept, now in ((loaded, LOADED), (classes, CLASSES)):
        now.clear()
        now.update(kept)
    for name in set(sys.modules) - modules:
        if not name.startswith(("torch", "transformers")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def make(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return make


HEAD = "import torch\nfrom torch import nn\n\n"
GAIN = HEAD + (
    "class Gain(nn.Module):\n"
    "    def __init__(self, hidden_size, eps, start=1.5):\n"
    "        super().__init__()\n"
    "        self.inner = nn.LayerNorm(hidden_size, eps)\n"
    "        self.gain = nn.Parameter(torch.full((hidden_size,), start))\n\n"
    "    def forward(self, x):\n"
    "        return self.inner(x) * self.gain\n"
)


@torch.no_grad()
@pytest.mark.parametrize(
    ("placement", "built_in"), [("pre", "pre_rmsnorm"), ("post", "post_rmsnorm"), ("sandwich", "sandwich")]
)
def test_placements_are_those_of_the_built_in_rows(
    make_model: Callable, placement: str, built_in: str
) -> None:
    """PartialRMS over all features is RMSNorm, so the two models have the same weights and logits."""
    options = {"placement": placement, "fraction": 1.0}
    model, expected = make_model(PARTIAL, norm_options=options), make_model(built_in)
    assert model.state_dict().keys() == expected.state_dict().keys()
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_plugin_in_a_list_of_norms(make_model: Callable) -> None:
    norms = [PARTIAL, "layernorm_scaling", "post_rmsnorm", PARTIAL]
    model = make_model(norms, norm_options={"fraction": 1.0})
    expected = make_model(["pre_rmsnorm", "layernorm_scaling", "post_rmsnorm", "pre_rmsnorm"])
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)


def test_parameters_start_from_what_the_constructor_makes_them(write: Callable) -> None:
    """Also on the meta device, as training builds models, and for modules inside the plugin."""
    load_plugin(write("gain_norm.py", GAIN), "plugins")
    config = LlmNormConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        norm="gain_norm.py:Gain",
        norm_options={"start": 0.25},
    )
    with torch.device("meta"):
        model = LlmNormForCausalLM(config)
    model.to_empty(device="cpu")
    initialize_weights(model, 0)
    norm = model.model.layers[0].input_layernorm
    assert norm.gain.tolist() == [0.25] * 8 and norm.inner.weight.tolist() == [1.0] * 8
    assert norm.inner.bias.tolist() == [0.0] * 8


STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("llmnorm", "llmnorm_kernels", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = load_file(folder + "/ids.safetensors")["ids"]
with torch.no_grad():
    save_file({"logits": model(ids).logits}, folder + "/logits.safetensors")
"""


def test_an_export_carries_the_file_and_loads_without_llmnorm(
    make_model: Callable, write: Callable, tmp_path: Path
) -> None:
    """Imports of our modeling files, absolute or relative, work there too, and so do other plugins."""
    text = GAIN.replace("import torch\n", "import torch\nfrom llmnorm.modeling.norms import rms_norm\n")
    text = text.replace("from torch import nn\n", "from torch import nn\n\nfrom .gain_parts import double\n")
    text = text.replace("self.inner(x) * self.gain", "double(rms_norm(self.inner(x), self.gain, 1e-6))")
    load_plugin(write("gain_parts.py", "def double(x):\n    return 2 * x\n"), "plugins")
    load_plugin(write("gain_norm.py", text), "plugins")
    model = make_model(["gain_norm.py:Gain", PARTIAL] * 2, norm_options={"placement": "sandwich"})
    folder = export_checkpoint(model, tmp_path / "out")
    assert "from .norms import rms_norm" in (folder / "gain_norm.py").read_text()
    assert (folder / "partial_rms.py").read_text() == EXAMPLE.read_text()
    save_file({"ids": IDS}, folder / "ids.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", STRANGER, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = model(IDS).logits
    theirs = load_file(folder / "logits.safetensors")["logits"]
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_checkpoints_and_exports_load_by_the_copies_they_carry(
    make_model: Callable, make_run: Callable, tmp_path: Path
) -> None:
    model = make_model(PARTIAL, norm_options={"fraction": 0.5})
    folder = export_checkpoint(model, tmp_path / "out")
    CLASSES.clear()
    LOADED.clear()
    for load in (load_model, load_causal_lm):
        torch.testing.assert_close(load(folder)(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["norm"] == PARTIAL
    assert config["norm_options"] == {"fraction": 0.5, "placement": "pre"}


def test_a_plugin_norm_does_not_fold(make_model: Callable) -> None:
    with pytest.raises(
        NotFoldableError, match=r"its norms are partial_rms.py:PartialRMS, and no stock class does"
    ):
        fold_to_stock(make_model(PARTIAL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractoin": 0.5}, "norm_options.fractoin is not an option of norm=.*; did you mean fraction"),
        ({"placement": "before"}, "norm_options.placement='before' must be pre, post, sandwich, reordered"),
        ({"fraction": [1]}, "must be a number, text, true, false or null"),
    ],
)
def test_options_are_those_of_the_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlmNormConfig(norm=PARTIAL, norm_options=options)


def test_values_that_the_class_refuses(make_model: Callable) -> None:
    with pytest.raises(ValueError, match=r"fraction=2.0 must be above 0"):
        make_model(PARTIAL, norm_options={"fraction": 2.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("hidden_size, eps, start=1.5", "width, start=1.5"), "must be constructed from .hidden_size, eps"),
        (("start=1.5", "start"), "norm_options.start is required by norm=gain_norm.py:Gain"),
    ],
)
def test_a_constructor_that_does_not_fit(write: Callable, change: tuple[str, str], message: str) -> None:
    load_plugin(write("gain_norm.py", GAIN.replace(*change)), "plugins")
    with pytest.raises(ValueError, match=message):
        LlmNormConfig(norm="gain_norm.py:Gain")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("torch.full((hidden_size,), start)", "torch.randn(hidden_size)"),
            "gain starts from more than one value",
        ),
        (
            ("nn.Parameter(torch.full((hidden_size,), start))", "nn.Buffer(torch.ones(hidden_size))"),
            "is a buffer",
        ),
    ],
)
def test_values_that_a_model_without_memory_would_lose(
    make_model: Callable, write: Callable, change: tuple[str, str], message: str
) -> None:
    load_plugin(write("gain_norm.py", GAIN.replace(*change)), "plugins")
    with pytest.raises(ValueError, match=message):
        make_model("gain_norm.py:Gain")


def test_files_that_cannot_be_plugins(write: Callable, tmp_path: Path) -> None:
    for name, text, message in (
        ("norms.py", GAIN, "has the name of the module llmnorm.modeling.norms"),
        ("json.py", GAIN, "has the name of the module json"),
        ("my-norm.py", GAIN, "must be named like a module"),
        ("broken.py", "1 / 0\n", "broken.py fails: ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(UserError, match=message):
            load_plugin(write(name, text), "plugins")
    with pytest.raises(UserError, match=r"absent.py cannot be read"):
        load_plugin(tmp_path / "absent.py", "plugins")
    with pytest.raises(ValueError, match=r"partial_rms.py has partial_rms.py:PartialRMS"):
        LlmNormConfig(norm="partial_rms.py:Partial")
    with pytest.raises(
        ValueError, match=r"other.py:Norm is a class that is not loaded; list other.py in plugins"
    ):
        LlmNormConfig(norm="other.py:Norm")
    load_plugin(
        write("needs_numpy.py", GAIN.replace("import torch\n", "import numpy\nimport torch\n")), "plugins"
    )
    with pytest.raises(UserError, match=r"needs_numpy.py:1: imports numpy, which is absent where an export"):
        plugin_sources("needs_numpy.py:Gain")
