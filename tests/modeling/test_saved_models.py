"""Checkpoints: round trips, loading where llmnorm is absent, never loading as something else in silence."""

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
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from llmnorm.export.code import relative_imports
from llmnorm.modeling import LlmNormForCausalLM, LlmNormModel

ModelMaker = Callable[..., LlmNormForCausalLM]


@pytest.mark.parametrize("tied", [False, True])
def test_o15_round_trip(
    make_model: ModelMaker, tokens: Tensor, tmp_path: Path, row: dict[str, Any], tied: bool
) -> None:
    model = make_model(**row, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded, report = LlmNormForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.norm == row["norm"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlmNormForCausalLM
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LlmNormModel
    expected = model.model(tokens).last_hidden_state
    assert torch.equal(base(tokens).last_hidden_state, expected)


def test_bf16_round_trip_keeps_fp32_frequencies(
    make_model: ModelMaker, tokens: Tensor, tmp_path: Path
) -> None:
    model = make_model()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for one in (model, loaded):
        assert torch.equal(one.model.rotary_emb.inv_freq, frequencies)
        assert torch.equal(one.model.rotary_emb.original_inv_freq, frequencies)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


ELSEWHERE = """
import sys

# Absent, as find_spec sees it too: a CUDA build of torch asks whether triton is there.
sys.modules.update(dict.fromkeys(("llmnorm", "llmnorm_kernels", "triton")))
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = torch.load(folder + "/expected.pt", weights_only=True)
    tokens = expected["tokens"]
    assert "transformers_modules" in type(model).__module__, type(model)
    assert torch.equal(model(tokens).logits, expected["logits"])
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model.lm_head(base(tokens).last_hidden_state), expected["logits"])
    for use_cache in (True, False):
        text = model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0)
        assert torch.equal(text, expected["text"]), (use_cache, text)
    model.train()
    model.set_activation_checkpointing("selective")
    model(tokens, labels=tokens, use_cache=False).loss.backward()
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & {"llmnorm", "llmnorm_kernels", "triton"}
print("loaded", len(sys.argv) - 1)
"""


def test_loads_where_llmnorm_is_absent(make_model: ModelMaker, tokens: Tensor, tmp_path: Path) -> None:
    folders = []
    hybrid = {"attention": {"pattern": ["nalaformer", "sla", "softmax"]}}
    for name, changes in {
        "mix_ln": {"norm": "mix_ln"},
        "layernorm_scaling": {"norm": "layernorm_scaling"},
        "hybrid": hybrid,
        "prepbn": {"norm": "prepbn", "norm_options": {"interpolation_steps": 14}},
    }.items():
        model = make_model(**changes)
        folder = tmp_path / name
        model.save_pretrained(folder)
        text = model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
        expected = {"tokens": tokens, "logits": model(tokens).logits.detach(), "text": text}
        torch.save(expected, folder / "expected.pt")
        folders.append(str(folder))
    auto_map = json.loads((tmp_path / "mix_ln" / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "loaded 4" in done.stdout


def test_files_import_torch_transformers_each_other_and_guarded_kernels() -> None:
    folder = Path(sys.modules["llmnorm.modeling.norms"].__file__ or "").parent
    for file in folder.glob("*.py"):
        if file.name != "__init__.py":  # it does not travel
            relative_imports(file)  # raises for an import that an export cannot serve
        guarded = file.name == "fused.py"
        assert ("import llmnorm_kernels" in file.read_text()) == guarded, file


def test_o5_o19_a_plain_llama_refuses_another_norm(
    make_model: ModelMaker, tmp_path: Path, row: dict[str, Any]
) -> None:
    """LNS has Llama's very keys and shapes, so nothing else would stop it from losing its factors."""
    model = make_model(**row)
    model.save_pretrained(tmp_path)
    assert model.config.is_llama == (row == {"norm": "pre_rmsnorm"})  # `recentered` is none
    if not model.config.is_llama:
        with pytest.raises(Exception, match="not a Llama: norm="):
            LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_plain_llama_loads_pre_rmsnorm(make_model: ModelMaker, tokens: Tensor, tmp_path: Path) -> None:
    model = make_model(norm="pre_rmsnorm")
    model.save_pretrained(tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(llama(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
