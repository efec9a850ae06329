"""Downstream tasks through EleutherAI's lm-evaluation-harness (the optional extra `llmnorm[eval]`)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmnorm.errors import UserError
from llmnorm.evaluation.loading import check_model_folder, needs_our_code

BASE_SUITE = (
    "wikitext",
    "lambada_openai",
    "hellaswag",
    "piqa",
    "arc_easy",
    "arc_challenge",
    "winogrande",
    "openbookqa",
    "sciq",
    "boolq",
)


def run_harness(
    folder: str | Path,
    tasks: Sequence[str] = BASE_SUITE,
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    limit: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """{"results": {task: {metric: value}}, "versions": ..., "n-shot": ...} for the model in `folder`.

    tasks: names the harness knows, or of YAML files below `include_path` (which may read local data, so
    nothing is downloaded). limit: only the first so many examples of each task, for a trial. dtype: in which
    to load the model. Raises UserError when the harness is not installed or a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "lm-evaluation-harness is not installed; install the extra: pip install 'llmnorm[eval]' "
            "(or pip install 'lm-eval[hf]')."
        )
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = check_model_folder(folder)
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path}: there is no such folder of task files.")
    manager = None
    if include_path is not None:
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or _unknown(manager, tasks):  # its own files take seconds to index
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = ", ".join(_unknown(manager, tasks))
    if unknown or not tasks:
        raise UserError(
            f"--tasks: {unknown or 'none given'}; the harness knows no such task. `lm-eval ls tasks` "
            "lists its own; yours are YAML files below --include-path."
        )
    output = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(folder),
            "trust_remote_code": trust_remote_code or needs_our_code(folder),
            "dtype": dtype,
        },
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        limit=limit,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        task_manager=manager,
        log_samples=False,
    )
    kept = {
        key: output[key]
        for key in ("results", "groups", "versions", "n-shot", "higher_is_better")
        if key in output
    }
    return json.loads(json.dumps({**kept, "model": str(folder), "limit": limit}, default=str))


def _unknown(manager: Any, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]
