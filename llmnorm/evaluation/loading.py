"""Load a causal language model and its tokenizer from any Hugging Face folder, for a measurement."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from llmnorm.errors import UserError

OUR_MODEL_TYPE = "llmnorm"


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide the bar that transformers draws for every weight it loads."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def default_device() -> torch.device:
    """This process's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def check_model_folder(folder: str | Path) -> Path:
    """The folder, if it holds a Hugging Face model; else UserError with what it is and what to give."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"--model {folder}: there is no such folder; give the folder of a Hugging Face model."
        )
    if (folder / "config.json").exists():
        return folder
    if (folder / "export" / "config.json").exists():
        raise UserError(f"--model {folder} is a run directory; give its exported model, {folder / 'export'}.")
    if (folder / "checkpoints").is_dir() or (folder / "index.json").exists():
        raise UserError(
            f"--model {folder} holds training checkpoints; export it first: `llmnorm export {folder} OUTPUT`."
        )
    raise UserError(f"--model {folder} has no config.json, so it is not a Hugging Face model folder.")


def needs_our_code(folder: Path) -> bool:
    """Whether the folder is an export of ours, whose modeling code travels with the weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("model_type") == OUR_MODEL_TYPE


def load_causal_lm(
    folder: str | Path, device: torch.device | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model in `folder`, in fp32 and eval mode, on `device` (default: GPU if there is one).

    Code inside the folder runs only for an export of ours or with trust_remote_code. Raises UserError for a
    folder that holds no causal language model, or whose weights are incomplete (transformers would fill them
    in at random).
    """
    folder = check_model_folder(folder)
    trust = trust_remote_code or needs_our_code(folder)
    if needs_our_code(folder):
        from llmnorm.plugins import load_saved_plugins

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        load_saved_plugins(folder, config.get("norm"))
    try:
        with no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=trust, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(
            f"--model {folder} cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        raise UserError(
            f"--model {folder} lacks weights of {type(model).__name__}: {', '.join(absent[:3])}"
            f"{f' and {len(absent) - 3} more' if len(absent) > 3 else ''}; the checkpoint is incomplete or "
            "of another architecture."
        )
    return model.eval().to(device or default_device())


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`; UserError when there is none."""
    # Without it transformers stops to ask about the code beside our config, which a tokenizer never runs.
    trust = trust_remote_code or ((Path(folder) / "config.json").exists() and needs_our_code(Path(folder)))
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{folder} has no usable tokenizer ({_first_line(error)}); give one with --tokenizer."
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
