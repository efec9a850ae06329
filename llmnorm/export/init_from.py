"""Start from weights that exist: a stock Llama, an export of ours, or a run's checkpoint (`model.init_from`).

Every source is an architecture (an `LlmNormConfig`) and a set of named tensors. The architecture is read
before the model is built; the tensors are copied into it afterwards, each process reading only its own shard.
No file is ever unpickled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from llmnorm.checkpoint import model_tensors, newest_checkpoint
from llmnorm.checkpoint.format import DTYPES, TensorRecord
from llmnorm.checkpoint.layout import Box, local_box, local_tensor
from llmnorm.checkpoint.reading import copy_from_checkpoint, open_index
from llmnorm.errors import UserError
from llmnorm.export.hub import download
from llmnorm.export.stock_classes import SHARED_KEYS
from llmnorm.int8 import SCALE, ZERO, Int8Weight, Parts, block_size
from llmnorm.modeling import LlmNormConfig
from llmnorm.plugins import load_saved_plugins, norms_of

logger = logging.getLogger("llmnorm.export")

HUB = "hub:"
# Keys of the model section that say how to run or to continue, not what function the weights are of.
SPECIAL_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
FREE_KEYS = SPECIAL_IDS | {
    "attn_implementation",
    "init",
    "initializer_range",
    "residual_dtype",
    "attention_dropout",
    "max_position_embeddings",
    "true_vocab_size",
    "weight_constraint",
}
# The model's buffer under `weight_constraint.name: normalize_and_project`.
NORMS_TO_KEEP = "initial_norms"
# Keys of the model section that are no keys of the model.
SECTION_KEYS = {"preset", "paper_exact", "init_from"}


class WeightSource(Protocol):
    """Named tensors on disk."""

    def shapes(self) -> dict[str, list[int]]: ...

    def dtypes(self) -> dict[str, torch.dtype]: ...

    def copy_into(self, targets: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class InitialWeights:
    """The architecture and the tensors that `model.init_from` names; no tensor is read before `copy_into`."""

    name: str
    folder: Path
    config: LlmNormConfig
    source: WeightSource

    def copy_into(self, model: nn.Module) -> None:
        """Copy every tensor into `model`: plain parameters or DTensors, any dtype, no communication.

        Raises UserError, before anything is changed, naming the keys that are missing, left over or of
        another shape.
        """
        targets = {name.removeprefix("model/"): tensor for name, tensor in model_tensors(model).items()}
        shapes = self.source.shapes()
        if self.config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        for name in {*targets} ^ {*shapes}:  # a constraint may begin or end here, with what it remembers
            if name == NORMS_TO_KEEP:
                targets.pop(name, None)
                shapes.pop(name, None)
        missing, surplus = sorted(targets.keys() - shapes.keys()), sorted(shapes.keys() - targets.keys())
        if missing or surplus:
            problems = [f"it lacks {_several(missing)}"] if missing else []
            problems += [f"it has {_several(surplus)}, which this model has not"] if surplus else []
            raise UserError(
                f"model.init_from={self.name}: its weights are not those of this model: "
                f"{'; '.join(problems)}. Give the model section the architecture of the checkpoint (leave "
                "its sizes and norm out to take them over)."
            )
        for name, target in targets.items():
            if shapes[name] != list(target.shape):
                raise UserError(
                    f"model.init_from={self.name}: {name} has shape {shapes[name]} there and "
                    f"{list(target.shape)} in this model; leave the sizes out of the model section to take "
                    "the checkpoint's."
                )
        with torch.no_grad():
            self.source.copy_into(targets)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Warn when the checkpoint's tokenizer, if it has one, gives other ids than `tokenizer`.

        With other ids the embedding rows mean other tokens, and the model starts from worse than nothing.
        """
        if not (self.folder / "tokenizer_config.json").exists():
            return
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(self.folder)
        if theirs.get_vocab() != tokenizer.get_vocab():
            logger.warning(
                "model.init_from=%s was trained with another tokenizer than data.tokenizer: the same ids are "
                "other tokens. Set data.tokenizer to %s unless this is what you want.",
                self.name,
                self.folder,
            )


def initial_weights(spec: str, given: Mapping[str, Any] | None = None) -> InitialWeights:
    """What `model.init_from` names, with its architecture.

    spec: hub:REPO[@REVISION], or a folder: a Llama (or another model with Llama's function) with safetensors,
        an export of ours, a run directory (its newest intact checkpoint) or one of its checkpoints/step_N.
    given: the keys of the model section that the user wrote. Those that say how to run replace the
        checkpoint's; one that contradicts its architecture is a UserError.
    Raises UserError for what cannot be read.
    """
    folder = _resolve(spec)
    is_checkpoint = (folder / "index.json").exists()
    source: WeightSource = CheckpointWeights(folder) if is_checkpoint else SafetensorsWeights(folder)
    saved = (
        _saved_config(spec, folder / "model_config.json") if is_checkpoint else _model_config(spec, folder)
    )
    return InitialWeights(spec, folder, _with_given(spec, saved, given or {}), source)


def _resolve(spec: str) -> Path:
    """The folder that holds the weights: downloaded, a run's newest checkpoint, or the folder itself."""
    if spec.startswith(HUB):
        repo_id, _, revision = spec.removeprefix(HUB).partition("@")
        return download(repo_id, revision or None)
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"model.init_from={spec}: there is no such folder; give a model folder, a run directory, or "
            "hub:OWNER/NAME."
        )
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is None:
            raise UserError(
                f"model.init_from={spec} is a run without a finished checkpoint; let it reach one first."
            )
        return newest
    if not (folder / "index.json").exists() and not (folder / "config.json").exists():
        raise UserError(
            f"model.init_from={spec} has neither config.json (a Hugging Face model) nor checkpoints/ (a run "
            "of ours)."
        )
    return folder


def _saved_config(spec: str, path: Path) -> LlmNormConfig:
    saved = json.loads(path.read_text(encoding="utf-8"))
    if norms_of(saved.get("norm")):
        if spec.startswith(HUB):
            raise UserError(
                f"model.init_from={spec} has norm={saved['norm']}, code that nobody here wrote; download it, "
                "read the file, and give the folder"
            )
        load_saved_plugins(path.parent, saved["norm"])
    return LlmNormConfig.from_dict(saved)


def _model_config(spec: str, folder: Path) -> LlmNormConfig:
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type == LlmNormConfig.model_type:
        return _saved_config(spec, folder / "config.json")
    if model_type not in STOCK:
        raise UserError(
            f"model.init_from={spec} is a {model_type!r} model; weights can be taken over from "
            f"{', '.join(sorted(STOCK))}, and from checkpoints of ours."
        )
    stock = AutoConfig.from_pretrained(folder)
    norm, obstacles = STOCK[model_type](stock)
    for obstacle in obstacles:
        raise UserError(f"model.init_from={spec} has {obstacle}, which a model of ours cannot reproduce.")
    eps = getattr(stock, "layer_norm_eps", None) or stock.rms_norm_eps
    rope = {key: value for key, value in stock.rope_parameters.items() if key != "partial_rotary_factor"}
    return LlmNormConfig(
        **{key: getattr(stock, key) for key in SHARED_KEYS},
        head_dim=getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads,
        rms_norm_eps=eps,
        rope_parameters=rope,
        attention_bias=getattr(stock, "attention_bias", False),
        mlp_bias=getattr(stock, "mlp_bias", False),
        norm=norm,
    )


def _from_llama(stock: Any) -> tuple[str, list[str]]:
    return "pre_rmsnorm", []


def _from_mistral(stock: Any) -> tuple[str, list[str]]:
    window = getattr(stock, "sliding_window", None)
    narrow = window is not None and window < stock.max_position_embeddings
    return "pre_rmsnorm", [f"a sliding window of {window}"] if narrow else []


def _from_stablelm(stock: Any) -> tuple[str, list[str]]:
    partial = stock.rope_parameters.get("partial_rotary_factor", 0.25)
    found = {
        f"partial_rotary_factor={partial}": partial != 1.0,
        "use_qkv_bias=true": stock.use_qkv_bias,
        "qk_layernorm=true": stock.qk_layernorm,
        "use_parallel_residual=true": stock.use_parallel_residual,
    }
    return "pre_ln", [obstacle for obstacle, present in found.items() if present]


# model_type of a stock class -> (our norm, what it has that we cannot reproduce); parameter names are the
# same.
STOCK: dict[str, Callable[[Any], tuple[str, list[str]]]] = {
    "llama": _from_llama,
    "mistral": _from_mistral,
    "stablelm": _from_stablelm,
}


def _with_given(spec: str, saved: LlmNormConfig, given: Mapping[str, Any]) -> LlmNormConfig:
    """The checkpoint's config under the keys the user wrote, which must not change its function."""
    # null leaves a key to the checkpoint, except where it says that the tokenizer has no such token.
    stated = {key: value for key, value in given.items() if value is not None or key in SPECIAL_IDS}
    wanted = {key: value for key, value in stated.items() if key not in SECTION_KEYS}
    if "rope_theta" in wanted:
        theta = wanted.pop("rope_theta")
        wanted.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": theta})
    base = {
        key: value
        for key, value in saved.to_dict().items()
        if key not in ("auto_map", "architectures", "dtype")
    }
    if "norm" in wanted and "norm_options" not in wanted and wanted["norm"] == saved.norm:
        wanted["norm_options"] = saved.norm_options
    try:
        config = LlmNormConfig.from_dict({**base, **wanted})
    except ValueError as error:
        raise UserError(
            f"model.init_from={spec}: the model section does not fit the checkpoint: {error}"
        ) from error
    if "attn_implementation" in wanted:
        config._attn_implementation = wanted["attn_implementation"]
    for key in sorted(wanted.keys() - FREE_KEYS):
        ours, theirs = getattr(config, key), getattr(saved, key)
        if ours != theirs:
            raise UserError(
                f"model.{key}={ours} contradicts the {key}={theirs} of model.init_from={spec}; remove the "
                "key to take the checkpoint's, or train from scratch."
            )
    return config


class SafetensorsWeights:
    """The tensors of a Hugging Face model folder, one file or several."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            names = {"model.safetensors"}
        self.files = [folder / name for name in sorted(names)]
        for file in self.files:
            if not file.exists():
                raise UserError(
                    f"{file} is missing: {folder} holds no complete set of safetensors; weights in other "
                    "formats (pytorch_model.bin) are pickles, which are never opened. Convert them to "
                    "safetensors first."
                )

    def shapes(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        # Buffers that old versions of transformers saved; they are computed, not learned.
        return {name: shape for name, shape in found.items() if not name.endswith("rotary_emb.inv_freq")}

    def dtypes(self) -> dict[str, torch.dtype]:
        found: dict[str, torch.dtype] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: DTYPES[tensors.get_slice(name).get_dtype()] for name in tensors.keys()}  # noqa: SIM118
        return found

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        for file in self.files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    box = local_box(targets[name]) if name in targets else None
                    if box is not None and not box.is_empty:
                        rows = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
                        local_tensor(targets[name]).copy_(tensors.get_slice(name)[rows])


class CheckpointWeights:
    """The model's tensors in a checkpoint of ours, saved by any number of processes."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.index = open_index(checkpoint)

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(record.shape) for name, record in self._weights().items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the values: codes of INT8 weights stand for numbers of their zero points' dtype."""
        tensors = self.index.tensors
        return {
            name: DTYPES[tensors.get(f"model/{name}{ZERO}", record).dtype]
            for name, record in self._weights().items()
        }

    def copy_into(self, targets: Mapping[str, Tensor]) -> None:
        int8 = {name for name in targets if f"model/{name}{SCALE}" in self.index.tensors}
        plain = {f"model/{name}": tensor for name, tensor in targets.items() if name not in int8}
        copy_from_checkpoint(self.checkpoint, self.index, plain)
        for name in sorted(int8):
            box = local_box(targets[name])
            if box is not None:
                weight = self._decoded(f"model/{name}")
                whole = Box((0,) * weight.ndim, tuple(weight.shape))
                local_tensor(targets[name]).copy_(weight[box.slices(whole)])

    def _weights(self) -> dict[str, TensorRecord]:
        return {
            name.removeprefix("model/"): record
            for name, record in self.index.tensors.items()
            if name.startswith("model/") and not name.endswith((SCALE, ZERO))
        }

    def _decoded(self, name: str) -> Tensor:
        records = [self.index.tensors[name + part] for part in ("", SCALE, ZERO)]
        parts = Parts(*(torch.empty(record.shape, dtype=DTYPES[record.dtype]) for record in records))
        into = dict(zip((name, name + SCALE, name + ZERO), parts, strict=True))
        copy_from_checkpoint(self.checkpoint, self.index, into)
        return Int8Weight(parts, block_size(parts)).decoded()


def _several(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
