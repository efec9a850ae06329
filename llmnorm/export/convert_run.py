"""Write a converted checkpoint as a run directory of its own, from which training goes on."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch

from llmnorm.checkpoint import CheckpointStore, load_full, model_tensors, read_state
from llmnorm.checkpoint.format import sync_directory
from llmnorm.config import RunConfig, yaml_dialect
from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormForCausalLM


def write_run(checkpoint: Path, output_dir: Path, model: LlmNormForCausalLM) -> None:
    """A run directory with one checkpoint, of `model` and of everything else that `checkpoint` holds.

    Optimizer and random state, position, guards and schedule are taken over as they are; config.yaml names
    the new norm and the new folder. Raises UserError where `checkpoint` is not a run's or the disk fails.
    """
    config = converted_config(checkpoint, output_dir, model)
    state = read_state(checkpoint)
    tensors = {name: tensor for name, tensor in load_full(checkpoint, "").items() if not _is_weight(name)}
    model_config = model.config.to_dict()
    # A run of its own: a tracker must not go on with the original's curve.
    state |= {"model_config": model_config, "run_id": uuid.uuid4().hex[:12]}
    files = {"config.yaml": config.to_yaml(), "model_config.json": json.dumps(model_config, indent=2) + "\n"}
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as workshop:
            folder = Path(workshop) / output_dir.name
            folder.mkdir()
            store = CheckpointStore(folder / "checkpoints", asynchronous=False)
            with torch.no_grad():
                store.save(state["step"], {**tensors, **model_tensors(model)}, state, files)
            (folder / "config.yaml").write_text(files["config.yaml"], encoding="utf-8")
            _copy_beside(checkpoint.parent.parent, folder)
            sync_directory(folder)
            folder.rename(output_dir)
            sync_directory(output_dir.parent)
    except OSError as error:
        raise UserError(
            f"the conversion to {output_dir} failed: {error.strerror or error}; nothing was written."
        ) from error


def converted_config(checkpoint: Path, output_dir: Path, model: LlmNormForCausalLM) -> RunConfig:
    """The run's config with the new norm and folder."""
    file = checkpoint / "config.yaml"
    if not file.exists():
        raise UserError(
            f"{checkpoint} has no config.yaml, so it is no checkpoint that training can go on from; convert "
            "an export of it, `llmnorm export`, for its weights alone."
        )
    values: dict[str, Any] = yaml_dialect.read(file)[0]
    values["output_dir"] = str(output_dir)
    values["model"] |= {"norm": model.config.norm, "norm_options": dict(model.config.norm_options)}
    return RunConfig.model_validate(values)


def _is_weight(name: str) -> bool:
    return name.startswith("model/")


def _copy_beside(run: Path, folder: Path) -> None:
    """The run's tokenizer and its metrics so far, which the resumed run cuts to its step and goes on with."""
    if (run / "tokenizer").is_dir():
        shutil.copytree(run / "tokenizer", folder / "tokenizer")
    if (run / "metrics.jsonl").exists():
        shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
