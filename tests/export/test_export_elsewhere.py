"""Exports of every kind, loaded in a process in which neither llmnorm nor Triton can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmnorm.export import export_checkpoint

NORMS: list[tuple[str, Any, dict[str, Any]]] = [
    ("pre_ln", "pre_ln", {}),
    ("pre_rmsnorm", "pre_rmsnorm", {}),
    ("post_ln", "post_ln", {}),
    ("post_rmsnorm", "post_rmsnorm", {}),
    ("mix_ln", "mix_ln", {"norm_options": {"post_fraction": 0.5}}),
    ("layernorm_scaling", "layernorm_scaling", {}),
    ("tied", "mix_ln", {"tie_word_embeddings": True}),
    ("listed", ["post_rmsnorm", "pre_rmsnorm", "layernorm_scaling", "pre_rmsnorm"], {}),
    ("biases", "layernorm_scaling", {"attention_bias": True, "mlp_bias": True}),
    ("bf16", "mix_ln", {}),
]

STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("llmnorm", "llmnorm_kernels", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

root = Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]
results = {}
for folder in sorted(path for path in root.iterdir() if (path / "config.json").exists()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    results[f"{folder.name}/words"] = torch.tensor(tokenizer("Friends, Romans")["input_ids"])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 299}
    with torch.no_grad():
        results[f"{folder.name}/logits"] = model(ids).logits
        for cache in (True, False):
            results[f"{folder.name}/generate-{cache}"] = model.generate(ids, use_cache=cache, **options)
base = AutoModel.from_pretrained(root / "mix_ln", trust_remote_code=True)
with torch.no_grad():
    results["mix_ln/hidden"] = base(ids).last_hidden_state.contiguous()
assert "llmnorm" not in sys.modules and "triton" not in sys.modules
save_file(results, root / "results.safetensors")
"""


@pytest.fixture(scope="module")
def elsewhere(
    tmp_path_factory: pytest.TempPathFactory, make_model: Callable, tokenizer: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor]:
    """The live models, and what a stranger's process computed from their exports."""
    root = tmp_path_factory.mktemp("exports")
    ids = torch.randint(3, 299, (2, 12), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, root / "ids.safetensors")
    models = {}
    for name, norm, keys in NORMS:
        models[name] = make_model(norm, eos_token_id=2, **keys)
        if name == "bf16":
            models[name].bfloat16()
        export_checkpoint(models[name], root / name, tokenizer=tokenizer)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(root / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", STRANGER, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return models, load_file(root / "results.safetensors"), ids


@pytest.mark.parametrize("name", [name for name, _, _ in NORMS])
def test_the_same_logits_and_the_same_text(name: str, elsewhere: tuple) -> None:
    models, results, ids = elsewhere
    model = models[name]
    with torch.no_grad():
        expected = model(ids).logits
    assert results[f"{name}/logits"].dtype == expected.dtype
    # The same code on the same processor; threads may differ. bf16: one rounding, 2^-8, of a logit of a few
    # units.
    tolerance = 0.05 if name == "bf16" else 1e-5
    torch.testing.assert_close(results[f"{name}/logits"], expected, rtol=tolerance, atol=tolerance)

    cached, uncached = results[f"{name}/generate-True"], results[f"{name}/generate-False"]
    assert cached.shape == (2, 24) and int(cached.max()) < 300
    if name == "bf16":  # near ties may break either way
        return
    assert torch.equal(cached, uncached)
    live = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=299)
    assert torch.equal(cached, live)


def test_auto_model_is_the_model_below_the_head(elsewhere: tuple) -> None:
    models, results, ids = elsewhere
    with torch.no_grad():
        expected = models["mix_ln"].model(ids).last_hidden_state
    torch.testing.assert_close(results["mix_ln/hidden"], expected, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_travels(elsewhere: tuple, tokenizer: Any) -> None:
    _, results, _ = elsewhere
    assert results["mix_ln/words"].tolist() == tokenizer("Friends, Romans")["input_ids"]


def test_config_tells_the_truth(elsewhere: tuple, tmp_path: Path, make_model: Callable) -> None:
    export_checkpoint(make_model("mix_ln"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["norm"]) == ("llmnorm", "mix_ln")
    assert config["norm_options"] == {"norm_type": "rmsnorm", "num_post_layers": 1}
    assert config["architectures"] == ["LlmNormForCausalLM"] and config["dtype"] == "float32"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_llmnorm.LlmNormConfig",
        "AutoModel": "modeling_llmnorm.LlmNormModel",
        "AutoModelForCausalLM": "modeling_llmnorm.LlmNormForCausalLM",
    }
    assert config["initializer_range"] == 0.02, "defaults are written too"
