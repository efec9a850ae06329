"""Fold norms with running statistics into the matrices behind them: a model of ours without norms.

In eval mode PowerNorm, Unified Norm and PRepBN are z = a * x + b, one number and one shift per feature, so

    W z = (W diag(a)) x + W b

The norms before attention go into W_q, W_k and W_v, those before the MLP into W_gate and W_up, which get a
bias each. The head has none, so the final norm stays as y = a * x + b without statistics. Nothing in the
result reduces over a token's features. Folds are computed in fp64 and rounded once.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from llmnorm.export.absorb import NotFoldableError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM
from llmnorm.modeling.batch_statistics import BatchStatisticsNorm
from llmnorm.modeling.equation import NORM_NAMES, Sublayer
from llmnorm.modeling.norms import STATISTICS_NORMS
from llmnorm.modeling.residual import residual_plan

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@torch.no_grad()
def fold_statistics(model: LlmNormForCausalLM) -> LlmNormForCausalLM:
    """The model without norms that has the eval-mode logits of `model`, on the CPU, in eval mode.

    Its config says norm: none with `final_affine`, attention_bias and mlp_bias; its weights have the dtypes
    of the model's and share nothing with them. Raises NotFoldableError, with the reason, for a model with
    another norm, one whose PRepBN is still on its way, or PowerNorm with `token_rms`.
    """
    _check(model)
    state = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}."
        for name, readers in READERS.items():
            a, b = _coefficients(getattr(layer, name), f"{prefix}{name}")
            for reader in readers:
                _absorb(state, prefix + reader, a, b)
        for writer in WRITERS:
            weight = state[f"{prefix}{writer}.weight"]
            state.setdefault(f"{prefix}{writer}.bias", weight.new_zeros(len(weight)))
    a, b = _coefficients(model.model.norm, "model.norm")
    dtype = state["model.norm.weight"].dtype
    folded = LlmNormForCausalLM(_config(model.config))
    state |= {"model.norm.weight": a.to(dtype), "model.norm.bias": b.to(dtype)}
    for name, parameter in folded.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(state[name].dtype)
    wanted = folded.state_dict().keys()
    folded.load_state_dict({name: value for name, value in state.items() if name in wanted})
    folded.generation_config = copy.deepcopy(model.generation_config)
    return folded.eval()


def _config(config: LlmNormConfig) -> LlmNormConfig:
    saved = config.to_dict()
    for key in ("auto_map", "architectures", "dtype"):
        saved.pop(key, None)
    options = {"own_init": False, "final_affine": True}
    changes = {"norm": "none", "norm_options": options, "attention_bias": True, "mlp_bias": True}
    return LlmNormConfig.from_dict({**saved, **changes})


def _absorb(state: dict[str, Tensor], reader: str, a: Tensor, b: Tensor) -> None:
    """W <- W diag(a), bias <- bias + W b."""
    weight = state[f"{reader}.weight"]
    bias = state.get(f"{reader}.bias", weight.new_zeros(len(weight)))
    state[f"{reader}.bias"] = (bias.double() + weight.double() @ b).to(bias.dtype)
    state[f"{reader}.weight"] = (weight.double() * a).to(weight.dtype)


def _coefficients(norm: BatchStatisticsNorm, name: str) -> tuple[Tensor, Tensor]:
    try:
        wide = copy.deepcopy(norm).cpu().double()
        return wide.coefficients()
    except ValueError as error:
        raise NotFoldableError(f"{name} does not fold: {error}; export format hf.") from error


def _check(model: LlmNormForCausalLM) -> None:
    config = model.config
    refuse = (
        f"norm={config.norm} with attention={config.attention} does not fold into a model without norms: "
    )
    if not config.is_plain_softmax:
        raise NotFoldableError(f"{refuse}only softmax attention does; export format hf.")
    plan = residual_plan(config.norm, config.norm_options, config.num_hidden_layers)
    for number, layer in enumerate(plan.layers, start=1):
        for place, sublayer in (("attention", layer.attention), ("mlp", layer.mlp)):
            if not _is_static(sublayer):
                raise NotFoldableError(
                    f"{refuse}layer {number} is not x + f(N(x)) at its {NORM_NAMES[place]['norm_in']}, with "
                    f"N one of {', '.join(STATISTICS_NORMS)}; export format hf."
                )
    if plan.final_norm not in STATISTICS_NORMS or plan.embedding_norm is not None:
        raise NotFoldableError(f"{refuse}its final norm is {plan.final_norm}; export format hf.")


def _is_static(sublayer: Sublayer) -> bool:
    plain = Sublayer(norm_in=sublayer.norm_in, norm_settings=sublayer.norm_settings)
    return sublayer.norm_in in STATISTICS_NORMS and sublayer == plain
