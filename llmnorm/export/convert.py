"""Turn a Pre-LN model into its exact equivalent with a cheaper norm (arXiv 2305.14858).

    pre_rmsnorm     W_o and W_down lose the mean of their outputs, so the stream needs no centering and
                    LayerNorm becomes RMSNorm. A checkpoint keeps AdamW's moments as they are and trains on as
                    if nothing had happened, by the mean-projected step (`optim/mean_projection.py`).
    pre_crmsnorm    gains and shifts go into the matrices that read them, and the stream, of zero mean, gives
                    up its last feature. The same function; its training is another.

The algebra is that of `zero_mean_states.py`. A conversion is computed in fp64, its logits are compared with
the source's, and only then is anything written, beside its final place and renamed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmnorm.checkpoint.reading import open_index
from llmnorm.config import yaml_dialect
from llmnorm.errors import UserError
from llmnorm.evaluation.precision import inference
from llmnorm.export.convert_run import write_run
from llmnorm.export.hf import export_checkpoint
from llmnorm.export.init_from import InitialWeights, initial_weights
from llmnorm.export.source import load_model
from llmnorm.export.verify import ExportMismatch, probe
from llmnorm.export.zero_mean_states import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    State,
    absorb_norms,
    compress,
    recenter_embedding,
    recenter_writers,
)
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, residual_plan
from llmnorm.modeling.mup import output_multiplier

# Largest difference of the logits, over the largest logit, by the dtype they are computed in: some hundred
# roundings of the dtype for a few dozen layers.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4}
# Methods whose update reads the weights, which are other numbers after the conversion.
READ_WEIGHTS = ("adamp", "lamb", "lawn")

NEW_TRAJECTORY = (
    "trained on, this is a model of its own: gains are no longer separate from the matrices they went into, "
    "so AdamW moves them otherwise than before, and no optimizer state was taken over. Pre-LN's own "
    "trajectory could only be kept for norms without trained gains and moments of the full width."
)


@dataclass
class Conversion:
    """What `convert_checkpoint` wrote: a run directory that resumes, or an export."""

    output: Path
    config: LlmNormConfig
    difference: float  # of the logits before and after, over the largest
    resumes: bool
    notes: list[str] = field(default_factory=list)


@dataclass
class Draft:
    """A converted model before it is built: the keys of its config that change, its weights in fp64."""

    keys: dict[str, Any]
    state: State
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(source: str | Path, output_dir: str | Path, to: str) -> Conversion:
    """Write the model of `source` with norm `to` to `output_dir`, which must not exist yet.

    source: a run directory or one of its checkpoints/step_N, an export of ours, or the folder of a stock
        model that `model.init_from` takes, StableLM among them.
    to: pre_rmsnorm or pre_crmsnorm. A checkpoint converted to pre_rmsnorm becomes a run directory that the
        same training goes on from, `python train.py --config OUTPUT/config.yaml`; everything else becomes an
        export, which `model.init_from` takes.
    Raises UserError for a source that is not Pre-LN or cannot be read, an unknown `to`, an output that
    exists; ExportMismatch if the logits differ. Nothing is written then.
    """
    source, output_dir = Path(source).expanduser(), Path(output_dir).expanduser()
    if to not in TARGETS:
        raise UserError(f"to={to!r} is not what a model can be converted to; known are {', '.join(TARGETS)}.")
    if not source.is_dir():
        raise UserError(
            f"source={source}: there is no such folder; give a run directory, one of its checkpoints, or a "
            "model folder."
        )
    if output_dir.exists():
        raise UserError(f"output={output_dir} exists; give a folder that does not, nothing is ever replaced.")
    weights = initial_weights(str(source))
    _check_source(weights.config, source, to)
    if to == "pre_crmsnorm" and not weights.config.is_plain_softmax:
        raise UserError(
            f"{source} has attention={weights.config.attention} with options "
            f"{weights.config.attention_options}; only softmax attention without options is converted to "
            "norm=pre_crmsnorm, as gains must go into every matrix that reads them. Use --to pre_rmsnorm."
        )
    if to == "pre_crmsnorm" and not weights.config.is_llama_mlp:
        raise UserError(
            f"{source} has mlp={weights.config.mlp} with options {weights.config.mlp_options}; only the "
            "gated MLP without options is converted to norm=pre_crmsnorm, as gains must go into every matrix "
            "that reads them. Use --to pre_rmsnorm."
        )
    trained = _has_optimizer_state(weights)
    original = load_model(source)
    draft = TARGETS[to](weights.config, _wide_state(original), trained)
    model, difference = _build(original, draft, weights.config)
    if model.dtype in (torch.bfloat16, torch.float16):
        rounded = logits_difference(original.float(), copy.deepcopy(model).float())
        draft.notes.append(f"rounded to {model.dtype}, as the source is, its logits differ by {rounded:.1e}")
    resumes = trained and to == "pre_rmsnorm"
    if resumes:
        draft.notes += _notes_on_training(weights.folder)
        write_run(weights.folder, output_dir, model)
    else:
        _export(model, source, output_dir)
    return Conversion(output_dir, model.config, difference, resumes, draft.notes)


def _check_source(config: LlmNormConfig, source: Path, to: str) -> None:
    """Pre-LN, or for pre_crmsnorm also what `--to pre_rmsnorm` makes of it."""
    plan = residual_plan(config.norm, config.norm_options, config.num_hidden_layers)
    if plan == residual_plan("pre_ln", {}, config.num_hidden_layers):
        return
    if to == "pre_crmsnorm" and config.is_recentered:
        return
    raise UserError(
        f"{source} has norm={config.norm}, and only Pre-LN has an equivalent with norm={to}: all that "
        "reads its stream goes through LayerNorm, to which its mean does not matter. Give a model with "
        "norm=pre_ln."
    )


def _has_optimizer_state(weights: InitialWeights) -> bool:
    if not (weights.folder / "index.json").exists():
        return False
    return any(name.startswith("optimizer/") for name in open_index(weights.folder).tensors)


def _wide_state(model: LlmNormForCausalLM) -> State:
    return {name: tensor.detach().double() for name, tensor in model.state_dict().items()}


def to_pre_rmsnorm(config: LlmNormConfig, state: State, trained: bool) -> Draft:
    """Plain RMSNorm, Llama's own function, if no norm shifts and none will learn to; else recentered.

    Plain: the embedding is recentered too. A head tied to it is untied, unless the final gain is constant: it
    must not lose what the gain makes of its mean.
    """
    layers = config.num_hidden_layers
    state = recenter_writers(state, layers)
    shifts = [name for name in state if name.endswith("norm.bias")]
    if trained or any(bool(state[name].any()) for name in shifts):
        return Draft({"norm": "pre_rmsnorm", "norm_options": {"recentered": True}}, state)
    state = {name: tensor for name, tensor in state.items() if name not in shifts}
    tied, notes, gain = config.tie_word_embeddings, [], state[f"{FINAL_NORM}.weight"]
    if tied and bool((gain != gain[0]).any()):
        tied = False
        notes.append(
            "the head is untied from the embedding, which alone is recentered (the final gain varies)"
        )
    state = recenter_embedding(state, tied)
    return Draft({"norm": "pre_rmsnorm", "norm_options": {}, "tie_word_embeddings": tied}, state, notes)


def to_pre_crmsnorm(config: LlmNormConfig, state: State, trained: bool) -> Draft:
    """Gains and shifts absorbed, head untied, then compressed.

    A shift becomes a bias of the matrices that read it, the final norm's one of the head.
    """
    layers, notes = config.num_hidden_layers, [NEW_TRAJECTORY]
    if config.tie_word_embeddings:
        notes.append("the head is untied from the embedding: one reads the stream, the other writes to it")
        state = state | {f"{HEAD}.weight": state[EMBEDDING]}
    state = absorb_norms(state, layers)
    if f"{HEAD}.bias" in state:
        # muP scales what the head reads, and so the shift in it.
        state[f"{HEAD}.bias"] = state[f"{HEAD}.bias"] * output_multiplier(config)
    shifted = {name for name in state if name.endswith(".bias") and bool(state[name].any())}
    biases = {
        "attention_bias": any(".self_attn." in name for name in shifted),
        "mlp_bias": any(".mlp." in name for name in shifted),
    }
    state = _with_biases(config, state, **biases)
    head_bias = f"{HEAD}.bias" in shifted
    if not head_bias:
        state.pop(f"{HEAD}.bias", None)
    keys = {
        "norm": "pre_crmsnorm",
        "norm_options": {"head_bias": head_bias},
        "tie_word_embeddings": False,
        **biases,
    }
    return Draft(keys, compress(state, layers), notes)


def _with_biases(config: LlmNormConfig, state: State, attention_bias: bool, mlp_bias: bool) -> State:
    """The biases that a model with these keys has: zeros where there are none, none where all are zero."""
    modules = {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }
    wanted = {"self_attn": attention_bias, "mlp": mlp_bias}
    result = dict(state)
    for layer in range(config.num_hidden_layers):
        for owner, names in modules.items():
            for name in (f"model.layers.{layer}.{owner}.{module}" for module in names):
                if wanted[owner]:
                    result.setdefault(f"{name}.bias", torch.zeros_like(state[f"{name}.weight"][:, 0]))
                else:
                    result.pop(f"{name}.bias", None)
    return result


TARGETS: dict[str, Callable[[LlmNormConfig, State, bool], Draft]] = {
    "pre_rmsnorm": to_pre_rmsnorm,
    "pre_crmsnorm": to_pre_crmsnorm,
}


def _build(
    original: LlmNormForCausalLM, draft: Draft, config: LlmNormConfig
) -> tuple[LlmNormForCausalLM, float]:
    """The converted model in the dtype of the original, its logits compared before it is rounded to it."""
    changed = {
        key: value for key, value in config.to_dict().items() if key not in ("auto_map", "architectures")
    }
    dtype = next(original.parameters()).dtype
    # Any: transformers' annotations of `to` hide torch's from the type checker.
    model: Any = LlmNormForCausalLM(LlmNormConfig.from_dict({**changed, **draft.keys}))
    wide = torch.promote_types(dtype, torch.float32)
    model.to(wide)
    missing, surplus = model.load_state_dict(draft.state, strict=False)
    tied = {f"{HEAD}.weight"} if model.config.tie_word_embeddings else set()
    assert not surplus and set(missing) <= tied, (missing, surplus)
    model.generation_config = copy.deepcopy(original.generation_config)
    model.eval()
    reference: Any = copy.deepcopy(original)
    reference.to(wide)
    difference = logits_difference(reference, model)
    if not difference <= TOLERANCES[wide]:  # nan is a mismatch too
        raise ExportMismatch(
            f"the converted model does not compute what {config.norm} computes: the logits differ by "
            f"{difference:.2e} of the largest one (allowed: {TOLERANCES[wide]:.0e}). Nothing was written."
        )
    return model.to(dtype), difference


def logits_difference(one: LlmNormForCausalLM, other: LlmNormForCausalLM) -> float:
    """Largest difference of the logits on the probe, over the largest logit, in the models' own dtype."""
    ids = probe(one.config.vocab_size, one.config.max_position_embeddings)
    logits: list[Tensor] = []
    for model in (one, other):
        with inference(model, float32=False) as module:
            logits.append(module(input_ids=ids, use_cache=False).logits)
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def _notes_on_training(checkpoint: Path) -> list[str]:
    """What is not claimed of the training that goes on from this checkpoint."""
    config = yaml_dialect.read(checkpoint / "config.yaml")[0]
    name, precision = config["optimizer"].get("name", "adamw"), config["train"].get("precision")
    notes = []
    if name in READ_WEIGHTS:
        notes.append(
            f"optimizer.name={name} reads the weights, which are other numbers now, so it will not move them "
            "exactly as it would have moved the original's"
        )
    if precision == "bf16_pure":
        notes.append(
            "train.precision=bf16_pure rounds weights of zero mean to bf16, so the trajectory is the same up "
            "to that rounding only"
        )
    return notes


def _export(model: LlmNormForCausalLM, source: Path, output_dir: Path) -> None:
    """A Hugging Face repository, with the source's tokenizer if it has one."""
    from llmnorm.evaluation.loading import load_tokenizer

    run = source.parent.parent if source.parent.name == "checkpoints" else source
    places = (run / "tokenizer", run / "export", run)
    found = next((place for place in places if (place / "tokenizer_config.json").exists()), None)
    tokenizer = None if found is None else load_tokenizer(found)
    export_checkpoint(model, output_dir, tokenizer=tokenizer, name=output_dir.name)
