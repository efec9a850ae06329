"""An export is done when it loads from its folder and computes what the live model computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llmnorm.evaluation.loading import no_progress_bar
from llmnorm.evaluation.precision import device_of, inference, unwrap

# Both sides run in fp32. The same code on the same device differs by nothing; folded weights and another
# device round differently, by about 1e-6 of the largest logit for a few dozen layers.
TOLERANCE = 1e-4
PROBE = (2, 48)


class ExportMismatch(RuntimeError):
    """The exported repository does not compute what the live model computes; it was not published."""


def verify_export(
    model: nn.Module, folder: Path, remote_code: bool, dtype: torch.dtype | None = None
) -> float:
    """Largest difference of the logits of `model` and of the repository in `folder`, over the largest logit.

    Loads the folder as a stranger would: its own code, through its auto_map, or a stock class. Where the
    export is of another dtype, the live weights are rounded to it first. Raises ExportMismatch above
    TOLERANCE.
    """
    exact = dtype is None or all(parameter.dtype == dtype for parameter in model.parameters())
    rounded = model
    if not exact:
        rounded = copy.deepcopy(unwrap(model))
        for parameter in rounded.parameters():  # not the buffers: stock classes keep rotary frequencies there
            parameter.data = parameter.data.to(dtype).float()
    return verify_same(rounded, load_exported(folder, remote_code), f"the repository in {folder.name}")


def verify_same(model: nn.Module, other: PreTrainedModel, what: str) -> float:
    """Largest difference of fp32 logits, over the largest logit; ExportMismatch above TOLERANCE."""
    ids = probe(other.config.vocab_size, other.config.max_position_embeddings)
    ours, theirs = _logits(model, ids), _logits(other, ids)
    difference = float((ours - theirs).abs().max()) / (float(ours.abs().max()) or 1.0)
    if not difference <= TOLERANCE:  # nan is a mismatch too
        raise ExportMismatch(
            f"{what} does not compute what the live model computes: the logits differ by {difference:.2e} of "
            f"the largest one (allowed: {TOLERANCE:.0e}). Nothing was published."
        )
    return difference


def verify_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raise ExportMismatch unless the folder's tokenizer gives the ids of the live one."""
    exported = AutoTokenizer.from_pretrained(folder)
    text = "The quick brown fox: naïve café, 東京 42\n\tend."
    if exported(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise ExportMismatch(
            f"the tokenizer exported to {folder} encodes text differently from the live one."
        )


def load_exported(folder: Path, remote_code: bool) -> PreTrainedModel:
    """The model in `folder` in fp32 on the CPU, by the folder's own code.

    llmnorm registers its classes with transformers, which prefers a registered class to the folder's code, so
    the class is fetched by the auto_map entry that AutoModelForCausalLM uses in a process without llmnorm.
    """
    with no_progress_bar():
        if not remote_code:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        auto_map = AutoConfig.from_pretrained(folder, trust_remote_code=False).auto_map
        config_class: Any = get_class_from_dynamic_module(auto_map["AutoConfig"], folder)
        model_class: Any = get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], folder)
        return model_class.from_pretrained(
            folder, config=config_class.from_pretrained(folder), dtype=torch.float32
        )


def probe(vocab_size: int, max_positions: int) -> Tensor:
    """Token ids [2, T], the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (PROBE[0], min(PROBE[1], max_positions)), generator=generator)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """fp64 logits on the CPU, computed in fp32."""
    with inference(model) as module:
        return module(input_ids=ids.to(device_of(module)), use_cache=False).logits.double().cpu()
