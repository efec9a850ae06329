"""What export_checkpoint writes, replaces and refuses."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llmnorm.errors import UserError
from llmnorm.export import ExportMismatch, NotFoldableError, export_checkpoint, hf, is_export, load_model
from llmnorm.export.code import relative_imports
from llmnorm.export.verify import load_exported

IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_a_run_exports_its_newest_checkpoint_with_everything_it_knows(
    make_run: Callable, make_model: Callable, tokenizer: Any
) -> None:
    model = make_model("mix_ln")
    run = make_run(model)
    folder = export_checkpoint(run, run / "export")
    assert folder == run / "export" and is_export(folder)
    torch.testing.assert_close(logits(load_exported(folder, True)), logits(model), rtol=1e-5, atol=1e-5)
    assert yaml.safe_load((folder / "training_config.yaml").read_text())["optimizer"]["name"] == "adamw"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["step"], metrics["eval/perplexity"], metrics["tokens"]) == (7, 54.6, 448)
    assert json.loads((folder / "environment.json").read_text())["torch"] == version("torch")
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["suppress_tokens"]) == (2, list(range(300, 320)))

    again = export_checkpoint(folder, run / "copy")  # an export is a source too
    assert json.loads((again / "metrics.json").read_text()) == metrics
    assert (again / "training_config.yaml").read_text() == (folder / "training_config.yaml").read_text()


def test_the_card_is_metadata_the_hub_reads(make_run: Callable, make_model: Callable) -> None:
    from huggingface_hub import ModelCard

    run = make_run(make_model("mix_ln"))
    folder = export_checkpoint(run, run / "export", license="apache-2.0", language="en")
    card = ModelCard.load(folder / "README.md")
    header = card.data.to_dict()
    assert header["library_name"] == "transformers" and header["pipeline_tag"] == "text-generation"
    assert {"llmnorm", "mix_ln", "adamw"} <= set(header["tags"])
    assert (header["license"], header["language"]) == ("apache-2.0", "en")
    (index,) = header["model-index"]
    assert index["name"] == "run"
    values = {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert values == {"loss": 4.0, "perplexity": 54.6}
    assert index["results"][0]["metrics"][0]["args"] == {"context_length": 64}
    assert "trust_remote_code=True" in card.text and "| validation | 4.0000 | 54.6000 |" in card.text
    assert "weighted by tokens (context length 64)" in card.text


def test_the_live_model_is_left_alone(make_model: Callable, tmp_path: Path, tokenizer: Any) -> None:
    model = make_model("mix_ln").train()
    model(IDS, labels=IDS).loss.backward()
    config, gradient = model.config.to_dict(), model.lm_head.weight.grad.clone()
    parameters = {name: (parameter, parameter._version) for name, parameter in model.named_parameters()}
    export_checkpoint(model, tmp_path / "out", tokenizer=tokenizer, dtype=torch.bfloat16)
    assert model.training and model.config.to_dict() == config
    assert torch.equal(model.lm_head.weight.grad, gradient)
    for name, parameter in model.named_parameters():
        assert parameters[name] == (parameter, parameter._version) and parameter.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_dtype_and_shards(
    make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    model = make_model("layernorm_scaling", tie_word_embeddings=tied)
    monkeypatch.setattr(hf, "SHARD_SIZE", 40_000)
    folder = export_checkpoint(model, tmp_path / "out", dtype=torch.bfloat16)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert ("lm_head.weight" in index) is not tied
    for file in set(index.values()):
        assert {tensor.dtype for tensor in load_file(folder / file).values()} == {torch.bfloat16}
        assert stat.S_IMODE((folder / file).stat().st_mode) == stat.S_IMODE(
            (folder / "config.json").stat().st_mode
        )
    loaded = load_model(folder)
    assert loaded.dtype == torch.bfloat16
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_stock_format_is_a_plain_llama(make_model: Callable, tmp_path: Path, tokenizer: Any) -> None:
    model = make_model("layernorm_scaling")
    folder = export_checkpoint(model, tmp_path / "out", format="stock", tokenizer=tokenizer)
    assert not list(folder.glob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config and config["rope_theta"] == 10000.0
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    with pytest.raises(NotFoldableError, match="layer 1's attention sublayer normalizes the residual sum"):
        export_checkpoint(make_model("mix_ln"), tmp_path / "no", format="stock")
    assert not (tmp_path / "no").exists()


def test_an_export_is_replaced_and_anything_else_is_not(make_model: Callable, tmp_path: Path) -> None:
    folder = export_checkpoint(make_model("pre_ln", seed=1), tmp_path / "out")
    (folder / "left-over.txt").write_text("from before")
    model = make_model("mix_ln")
    export_checkpoint(model, folder)
    assert not (folder / "left-over.txt").exists()
    torch.testing.assert_close(logits(load_exported(folder, True)), logits(model), rtol=1e-5, atol=1e-5)

    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files and is not an export"):
        export_checkpoint(model, precious)
    assert (precious / "chapter.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file"):
        export_checkpoint(model, precious / "chapter.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


@pytest.mark.parametrize("norm", ["layernorm_scaling", "mix_ln"])
def test_an_export_that_computes_something_else_is_not_published(
    make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    model = make_model(norm)
    folder = export_checkpoint(model, tmp_path / "out")
    before = (folder / "model.safetensors").read_bytes()

    def lose_the_scale(target: Path, norm: str) -> list[str]:
        from llmnorm.export.code import copy_modeling_code

        names = copy_modeling_code(target, norm)
        code = (target / "placements.py").read_text()
        broken = code.replace("1.0 / math.sqrt(depth)", "1.0").replace("depth <= options", "depth < options")
        assert broken != code
        (target / "placements.py").write_text(broken)
        return names

    monkeypatch.setattr(hf, "copy_modeling_code", lose_the_scale)
    with pytest.raises(ExportMismatch):
        export_checkpoint(make_model(norm, seed=2), folder)
    assert (folder / "model.safetensors").read_bytes() == before, "the earlier export survives"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "and nothing half-made is left"


def test_weights_that_do_not_arrive_are_noticed(
    make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def round_one(state: dict, folder: Path, **options: Any) -> None:
        from huggingface_hub import save_torch_state_dict

        state["model.norm.weight"] = state["model.norm.weight"] * 1.001
        save_torch_state_dict(state, folder, **options)

    monkeypatch.setattr(hf, "save_torch_state_dict", round_one)
    with pytest.raises(ExportMismatch, match=r"differ by 1.00e-03 of the largest one"):
        export_checkpoint(make_model("mix_ln"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_this_models_is_refused(
    make_model: Callable, tmp_path: Path, tokenizer: Any
) -> None:
    small = make_model("pre_ln", vocab_size=256, true_vocab_size=None)
    with pytest.raises(UserError, match="tokenizer has 300 tokens and the model only 256"):
        export_checkpoint(small, tmp_path / "out", tokenizer=tokenizer)


def test_mistakes_are_named(make_model: Callable, make_run: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format='onnx' is not an export format"):
        export_checkpoint(make_model("pre_ln"), tmp_path / "out", format="onnx")
    with pytest.raises(UserError, match="there is no such folder"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="takes an LlmNormForCausalLM or a run directory, got Linear"):
        export_checkpoint(torch.nn.Linear(2, 2), tmp_path / "out")
    run = make_run(make_model("pre_ln"))
    (run / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="does not keep its tokenizer"):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_imports_that_an_export_cannot_serve_are_found(tmp_path: Path) -> None:
    file = tmp_path / "part.py"
    file.write_text("import math\nfrom torch import nn\nfrom .norms import make_norm\n")
    assert relative_imports(file) == ["norms"]
    file.write_text("try:\n    import llmnorm_kernels\nexcept ImportError:\n    llmnorm_kernels = None\n")
    assert relative_imports(file) == []
    for source in ("import llmnorm_kernels", "from llmnorm.errors import UserError", "from . import norms"):
        file.write_text(f"{source}\n")
        with pytest.raises(ImportError, match=r"part.py:1"):
            relative_imports(file)
