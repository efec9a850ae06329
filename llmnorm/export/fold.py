"""Fold a model of ours into a stock transformers class that computes the same function.

The rule is read off the block equation, not off the norm's name: `absorb.py` moves every scale into a weight
and `stock_classes.py` lists the equations that stock classes compute. So pre_rmsnorm is Llama as it is,
layernorm_scaling is Llama with gains divided by sqrt(layer) (The Curse of Depth, arXiv 2502.05795), pre_ln is
StableLM. Folds are computed in fp32 and rounded once to the parameter's dtype.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmnorm.errors import UserError
from llmnorm.evaluation.loading import no_progress_bar
from llmnorm.export.absorb import Absorbed, NotFoldableError, absorb, norm_kinds
from llmnorm.export.effective_weights import with_effective_weights
from llmnorm.export.stock_classes import STOCK_CLASSES, State, StockClass, stock_class_names
from llmnorm.modeling import LlmNormForCausalLM
from llmnorm.modeling.equation import ResidualPlan, Sublayer
from llmnorm.modeling.options import nearest

__all__ = ["NotFoldableError", "fold_to_stock"]


def fold_to_stock(
    model: LlmNormForCausalLM, dtype: torch.dtype | None = None, stock_class: str | None = None
) -> PreTrainedModel:
    """A model of a stock class with the logits of `model`, on the CPU, in eval mode.

    dtype: of the folded weights (default: of the model's). They share nothing with `model`, which stays as it
    is. stock_class: a model_type of STOCK_CLASSES (default: the first that fits). Raises NotFoldableError
    when no stock class, or not this one, computes this function, naming the reason.
    """
    if stock_class is not None and stock_class not in stock_class_names():
        raise UserError(
            f"stock_class={stock_class!r} is not written here; {nearest(stock_class, stock_class_names())}"
        )
    model = with_effective_weights(model)
    if not model.config.is_plain_softmax:
        raise NotFoldableError(
            f"attention={model.config.attention} with attention_options={model.config.attention_options} has "
            "no stock transformers class; export format hf."
        )
    if not model.config.is_llama_mlp:
        raise NotFoldableError(
            f"mlp={model.config.mlp} with mlp_options={model.config.mlp_options} has no stock transformers "
            "class; export format hf."
        )
    if model.config.quantization is not None:
        raise NotFoldableError(
            f"quantization={model.config.quantization} has no stock transformers class; export with "
            "dequantize."
        )
    absorbed = absorb(model)
    row = _choose(absorbed, stock_class)
    config, state = row.convert(absorbed)
    stock = _build(row, config, state, dtype or next(model.parameters()).dtype)
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def _build(row: StockClass, config: PreTrainedConfig, state: State, dtype: torch.dtype) -> PreTrainedModel:
    """The model of these weights; every one of them must have its place."""
    with no_progress_bar():
        loaded: Any = row.model.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    stock, report = loaded
    wrong = {kind: names for kind, names in report.items() if names and kind != "error_msgs"}
    if wrong:
        raise NotFoldableError(
            f"{row.model.__name__} does not take the weights of this model ({wrong}); export format hf."
        )
    return stock


def _choose(absorbed: Absorbed, wanted: str | None) -> StockClass:
    norm, rows = absorbed.config.norm, [row for row in STOCK_CLASSES if wanted in (None, row.name)]
    fitting = [row for row in rows if row.computes(absorbed.plan)]
    reasons = []
    for row in fitting:
        refused = row.refused(absorbed)
        if not refused:
            return row
        reasons.append(f"folds into {row.model.__name__}, but not with {' and '.join(refused)}")
    if reasons:
        raise NotFoldableError(f"norm={norm} {'; it '.join(reasons)}; export format hf.")
    raise NotFoldableError(
        f"norm={norm} folds into {'none of the stock classes' if wanted is None else f'no {wanted}'}: "
        f"{why_not(absorbed.plan, rows)}; export format hf, which carries its own code."
    )


def why_not(plan: ResidualPlan, rows: list[StockClass]) -> str:
    """What of an absorbed plan no row computes."""
    for row in rows:
        if row.computes_layers(plan):
            return _ends(plan, row)
    nobody = (
        "no stock class does that" if len(rows) == len(STOCK_CLASSES) else f"{rows[0].name} does not do that"
    )
    if len(set(plan.layers)) > 1:
        nobody += " in one layer and not in another"
    for number, layer in enumerate(plan.layers, start=1):
        for place, spec in (("attention", layer.attention), ("mlp", layer.mlp)):
            if reason := _peculiarity(spec):
                return f"layer {number}'s {place} sublayer {reason}, and {nobody}"
    kinds = sorted(norm_kinds(plan))
    return f"it mixes {', '.join(kinds)}" if len(kinds) > 1 else f"its norms are {kinds[0]}, and {nobody}"


def _ends(plan: ResidualPlan, row: StockClass) -> str:
    """What of the final norm and the embedding's norm keeps a plan from a row with its layers."""
    wrong, remedy = [], "trains one that folds, where the norm takes it"
    if row.embedding_norm != plan.embedding_norm:
        wrong.append(
            f"{row.name} begins with a norm, which rows of unequal length cannot make up for "
            f"(norm_options.embedding_norm: true {remedy})"
            if plan.embedding_norm is None
            else f"{row.name} normalizes the embedding by {row.embedding_norm}, this model by "
            f"{plan.embedding_norm}"
        )
    if row.final_norm != plan.final_norm:
        wrong.append(
            f"{row.name} ends with the norm of its last sublayer, after which this model has one more "
            f"(norm_options.final_norm: false {remedy})"
            if row.final_norm is None
            else f"{row.name} has a final {row.final_norm}, this model {plan.final_norm or 'none'}"
        )
    return " and ".join(wrong)


def _peculiarity(spec: Sublayer) -> str | None:
    """What a sublayer has beyond x + f(N(x)), in words; the first that holds is the reason."""
    if spec.norm_post is not None:
        return f"normalizes the residual sum by {spec.norm_post}"
    if spec.shortcut != "raw":
        return "adds to the normalized stream"
    if spec.norm_out is not None:
        return f"normalizes its output by {spec.norm_out}"
    if spec.norm_in is None:
        return "does not normalize its input"
    if spec.projection_norm is not None:
        norm = spec.projection_norm
        return f"normalizes its {', '.join(norm.projections)} projections by {norm.kind}"
    return None
