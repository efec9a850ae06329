"""What is exported: a live model, or a run's newest checkpoint with all that the run knows about it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmnorm.config import RunConfig, yaml_dialect
from llmnorm.errors import UserError
from llmnorm.evaluation import read_metrics
from llmnorm.evaluation.precision import unwrap
from llmnorm.export.effective_weights import with_effective_weights
from llmnorm.export.init_from import initial_weights
from llmnorm.int8 import Int8Weight
from llmnorm.modeling import LlmNormForCausalLM


@dataclass
class ExportSource:
    """A whole model of ours, unsharded, and what is known of its training."""

    model: LlmNormForCausalLM
    name: str
    tokenizer: Any | None = None
    training_config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


def export_source(
    run_dir_or_model: str | Path | nn.Module,
    tokenizer: Any | None = None,
    training_config: RunConfig | Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> ExportSource:
    """Gather what is exported; arguments that are given win over what a run directory holds.

    Raises UserError for a folder without a checkpoint, a model of another class, or a model sharded over
    processes.
    """
    config = training_config.to_dict() if isinstance(training_config, RunConfig) else training_config
    if isinstance(run_dir_or_model, nn.Module):
        return ExportSource(
            _whole(run_dir_or_model), "model", tokenizer, dict(config or {}), dict(metrics or {})
        )
    folder = Path(run_dir_or_model).expanduser()
    model = load_model(folder)
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    for file in (run_dir / "config.yaml", run_dir / "training_config.yaml"):  # of a run, of an export
        if config is None and file.exists():
            config = yaml_dialect.read(file)[0]
    if metrics is None and (run_dir / "metrics.jsonl").exists():
        metrics = final_metrics(read_metrics(run_dir / "metrics.jsonl"))
    if metrics is None and (run_dir / "metrics.json").exists():
        metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
    if tokenizer is None:
        tokenizer = _tokenizer_of(run_dir, config or {})
    return ExportSource(model, run_dir.resolve().name, tokenizer, dict(config or {}), dict(metrics or {}))


def load_model(folder: str | Path) -> LlmNormForCausalLM:
    """The model of a run's newest intact checkpoint, of one step_N, or of an export; CPU, eval mode.

    It has the dtype its weights are saved in, and the matrices that a `weight_parametrization` makes of them.
    """
    weights = initial_weights(str(folder))
    with torch.device("meta"):
        model = LlmNormForCausalLM(weights.config)
    dtypes = weights.source.dtypes()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, torch.float32))
    model.to_empty(device="cpu")
    model.tie_weights()
    for module in model.modules():
        rebuild = getattr(module, "rebuild_buffers", None)
        if callable(rebuild):
            rebuild()
    weights.copy_into(model)
    return with_effective_weights(model.eval())


def final_metrics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last finite value of every number in the rows of a metrics.jsonl, and the last step."""
    last: dict[str, Any] = {}
    for row in rows:
        last |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    return last


def _whole(model: nn.Module) -> LlmNormForCausalLM:
    model = unwrap(model)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, LlmNormForCausalLM):
        raise UserError(
            f"export_checkpoint takes an LlmNormForCausalLM or a run directory, got {type(model).__name__}; "
            "a stock transformers model is exported by its own save_pretrained."
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UserError(
            "export_checkpoint cannot export a model that is sharded over processes; save a checkpoint and "
            "give the run directory instead."
        )
    return with_effective_weights(_plain_weights(model))


def _plain_weights(model: LlmNormForCausalLM) -> LlmNormForCausalLM:
    """`model`, or a copy of it with the values of its INT8 weights."""
    if not any(isinstance(parameter, Int8Weight) for parameter in model.parameters()):
        return model
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, Int8Weight):
                setattr(module, name, nn.Parameter(parameter.detach().decoded()))  # type: ignore[attr-defined]
    return plain


def _tokenizer_of(run_dir: Path, config: Mapping[str, Any]) -> Any:
    """The tokenizer of a run: kept with it, in its earlier export, or named in its config."""
    from transformers import AutoTokenizer

    named = (config.get("data") or {}).get("tokenizer")
    places = [run_dir / "tokenizer", run_dir / "export", run_dir]
    for place in places:
        if (place / "tokenizer_config.json").exists():
            return AutoTokenizer.from_pretrained(place)
    if isinstance(named, str):
        try:
            return AutoTokenizer.from_pretrained(named)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the tokenizer {named!r} of {run_dir} cannot be loaded; give its folder with --tokenizer."
            ) from error
    raise UserError(
        f"{run_dir} does not keep its tokenizer (looked in {', '.join(str(place) for place in places)}); "
        "give its folder with --tokenizer."
    )
