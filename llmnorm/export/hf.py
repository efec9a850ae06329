"""Export a model as a Hugging Face repository that anyone can load, with nothing of llmnorm installed.

    config.json  generation_config.json  model*.safetensors  tokenizer files      what transformers reads
    configuration_llmnorm.py  modeling_llmnorm.py  ...                            our code (format hf)
    training_config.yaml  metrics.json  environment.json  README.md               where it comes from

It is written beside its final place, loaded again, compared with the live model, and only then renamed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from llmnorm.checkpoint.format import sync_directory
from llmnorm.config import RunConfig, yaml_dialect
from llmnorm.errors import UserError
from llmnorm.evaluation.certificate import certify
from llmnorm.evaluation.certificate_report import CERTIFICATE, certificate_section, full_certificate
from llmnorm.evaluation.environment import describe_environment
from llmnorm.evaluation.lipschitz_bounds import NoCertificate
from llmnorm.export.card import model_card, with_section
from llmnorm.export.code import copy_modeling_code
from llmnorm.export.dequantize import dequantized
from llmnorm.export.fold import fold_to_stock
from llmnorm.export.fold_statistics import fold_statistics
from llmnorm.export.source import ExportSource, export_source
from llmnorm.export.stock_classes import published_names
from llmnorm.export.verify import verify_export, verify_same, verify_tokenizer
from llmnorm.modeling import LlmNormConfig

FORMATS = ("hf", "stock", "folded")
SHARD_SIZE = "5GB"
MARKER = "environment.json"


def export_checkpoint(
    run_dir_or_model: str | Path | nn.Module,
    output_dir: str | Path,
    format: str = "hf",
    tokenizer: Any | None = None,
    *,
    stock_class: str | None = None,
    dequantize: bool = False,
    training_config: RunConfig | Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
) -> Path:
    """Write a self-contained repository to `output_dir`, once its logits are checked, and return it.

    run_dir_or_model: an LlmNormForCausalLM, a run directory (its newest intact checkpoint), or one of its
        checkpoints/step_N.
    format: hf, our classes with their code; stock, a transformers class of the same function (see fold.py),
        folded, our classes without their norms with running statistics (see fold_statistics.py),
    the
        first that fits unless stock_class names its model_type.
    dequantize: write the weights as their quantized values in a model without quantization, whose activations
        are then whole: the function of `activations: none`.
    tokenizer, training_config, metrics: taken from a run directory unless given.
    dtype: of the exported weights (default: that of the model's first parameter, as transformers loads them).
    name, license, language: for the model card.
    An existing export in `output_dir` is replaced; any other folder with files in it is left alone.

    Raises UserError for bad arguments, NotFoldableError (a UserError) if no stock class fits, ExportMismatch
    if the written repository does not compute what the model computes.
    """
    output_dir = Path(output_dir).expanduser()
    if format not in FORMATS:
        raise UserError(f"format={format!r} is not an export format; known are {', '.join(FORMATS)}.")
    if stock_class is not None and format != "stock":
        raise UserError(f"stock_class={stock_class} does nothing with format={format}; give format stock.")
    check_replaceable(output_dir)
    source = export_source(run_dir_or_model, tokenizer, training_config, metrics)
    if dequantize:
        source.model = dequantized(source.model)
    name = name or (source.name if output_dir.name == "export" else output_dir.name)
    weights = next(source.model.parameters()).dtype if dtype is None else dtype
    exported: PreTrainedModel = source.model
    if format == "stock":
        exported = fold_to_stock(source.model, torch.float32, stock_class)
        verify_same(source.model, exported, f"the {type(exported).__name__} it folds into")
    elif format == "folded":
        exported = fold_statistics(source.model)
        verify_same(source.model, exported, "the model without norms that it folds into")
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as workshop:
            # transformers names the module it makes of the code after the folder, so the name is final.
            folder = Path(workshop) / output_dir.name
            folder.mkdir()
            facts = {"name": name, "license": license, "language": language}
            _write(folder, exported, source, format != "stock", weights, facts)
            verify_export(exported, folder, format != "stock", weights)
            if source.tokenizer is not None:
                verify_tokenizer(source.tokenizer, folder)
            _publish(folder, output_dir, Path(workshop) / "replaced")
    except OSError as error:
        raise UserError(
            f"the export to {output_dir} failed: {error.strerror or error}; nothing was replaced."
        ) from error
    return output_dir


def check_replaceable(output_dir: Path) -> None:
    """Raise UserError unless `output_dir` is absent, empty, or an earlier export of ours."""
    if output_dir.is_file():
        raise UserError(f"output_dir={output_dir} is a file; give a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not is_export(output_dir):
        raise UserError(
            f"output_dir={output_dir} holds files and is not an export, so it is left alone; give a new "
            "folder."
        )


def is_export(folder: Path) -> bool:
    """Whether `export_checkpoint` wrote this folder."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and "llmnorm" in marker and (folder / "config.json").exists()


def _write(
    folder: Path,
    model: PreTrainedModel,
    source: ExportSource,
    remote_code: bool,
    dtype: torch.dtype,
    facts: Mapping[str, Any],
) -> None:
    # Running statistics keep their own dtype: they are fp32 in a bf16 model too.
    buffers = {name for name, _ in model.named_buffers()}
    state = {
        name: tensor.detach().to(tensor.dtype if name in buffers or not tensor.is_floating_point() else dtype)
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if not remote_code:
        state = published_names(model.config.model_type, state)
    save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})

    config = _config(model, source.tokenizer, dtype)
    _write_json(folder / "config.json", config)
    special = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    suppressed = getattr(model.generation_config, "suppress_tokens", None)
    GenerationConfig(**special, suppress_tokens=suppressed).save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    if remote_code:
        copy_modeling_code(folder, source.model.config.norm)
    if source.training_config:
        (folder / "training_config.yaml").write_text(
            yaml_dialect.write(source.training_config), encoding="utf-8"
        )
    if source.metrics:
        _write_json(folder / "metrics.json", source.metrics)
    _write_json(folder / MARKER, describe_environment())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known: dict[str, Any] = {"training_config": source.training_config, "metrics": source.metrics}
    card = model_card(model_config=config, parameters=parameters, remote_code=remote_code, **known, **facts)
    if certificate := _certificate(model, dtype):
        card = with_section(card, certificate_section(certificate))
        _write_json(folder / CERTIFICATE, certificate)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in folder.iterdir():
        shutil.copymode(folder / "README.md", file)  # safetensors makes files that only their owner can read
        with file.open("rb") as written:
            os.fsync(written.fileno())
    sync_directory(folder)


def _certificate(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any] | None:
    """The Lipschitz certificate of a model that is built to have one, of its weights in `dtype`."""
    if getattr(model.config, "architecture", None) != "lipschitz":
        return None
    deployed: Any = model
    if model.dtype != dtype:
        deployed = copy.deepcopy(deployed).to(dtype)
    try:
        return full_certificate(deployed, certify(deployed), attack_steps=0)
    except NoCertificate:
        return None


def _config(model: PreTrainedModel, tokenizer: Any | None, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: every key of the architecture, the tokenizer's special ids, the weights' dtype."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    for key, value in _special_ids(tokenizer).items():
        setattr(config, key, value)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {config.vocab_size} embedding "
            "rows; export with the tokenizer the model was trained with."
        )
    general = {key.name for key in fields(PreTrainedConfig)}
    own = {key: value for key, value in config.to_dict().items() if key not in general}
    saved = {key: value for key, value in config.to_diff_dict().items() if not key.startswith("_")}
    saved.pop("output_attentions", None)
    if not isinstance(config, LlmNormConfig):  # readers older than transformers 5 look for theta here
        saved["rope_theta"] = config.rope_parameters["rope_theta"]
    return {**own, **saved}


def _special_ids(tokenizer: Any | None) -> dict[str, int]:
    if tokenizer is None:
        return {}
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {key: value for key, value in ids.items() if value is not None}


def _publish(folder: Path, output_dir: Path, aside: Path) -> None:
    """Rename `folder` to `output_dir`; an export that was there is whole until the moment it is replaced."""
    if output_dir.exists():
        output_dir.rename(aside)
    try:
        folder.rename(output_dir)
    except OSError:
        if aside.exists():
            aside.rename(output_dir)
        raise
    sync_directory(output_dir.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
