"""What a trained model does layer by layer: `diagnose(model, token_ids)`.

The definitions stand where they are computed: `stream_statistics`, `attention_statistics`, `layer_effects`,
`gain_drift`. The token stream is cut into full windows of `context_length`; the last, shorter one is left
out, so that no number mixes lengths. The model runs in fp32 and eval mode and is left as it was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmnorm.errors import UserError
from llmnorm.evaluation.attention_statistics import AttentionStatistics
from llmnorm.evaluation.gain_drift import gain_drift
from llmnorm.evaluation.layer_effects import GradientStatistics, find_blocks, layer_removal
from llmnorm.evaluation.perplexity import as_stream, model_vocab_size
from llmnorm.evaluation.precision import device_of, inference
from llmnorm.evaluation.report import read_metrics
from llmnorm.evaluation.stream_statistics import StreamStatistics, growth
from llmnorm.modeling import attention_health

UPDATE_RATIO = "diagnostics/update_ratio"  # in a run's metrics.jsonl
Progress = Callable[[str, int, int], None]


def diagnose(
    model: Any,
    token_ids: Any,
    context_length: int = 256,
    *,
    batch_size: int = 8,
    max_tokens: int = 2**18,
    gradient_batches: int = 16,
    removal: bool = True,
    removal_tokens: int = 2**16,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every quantity of docs/diagnostics.md but the update-to-weight ratio, as plain JSON types.

    token_ids: [N] integers, or anything with `num_tokens` and `read(start, stop)`.
    max_tokens: streams and attention are measured on the first so many; gradient_batches: batches that the
    gradient norms are averaged over (fewer where the text is shorter). removal_tokens: the loss without each
    layer is measured on the first so many, num_hidden_layers + 1 times over.
    Layers are listed first to last; what is measured between layers has one entry more, the first for the
    embedding. Numbers that are not finite become null.

    Raises UserError for a text shorter than one window, a context beyond max_position_embeddings, a token
    beyond the vocabulary, a model whose layers cannot be told, or a count below 1.
    """
    stream = as_stream(token_ids)
    blocks = find_blocks(model)
    counts = {"batch_size": batch_size, "max_tokens": max_tokens, "gradient_batches": gradient_batches}
    check_windows(
        model,
        stream.num_tokens,
        context_length,
        **counts,
        **({"removal_tokens": removal_tokens} if removal else {}),
    )
    step = progress or (lambda what, done, of: None)
    windows = max(1, min(stream.num_tokens - 1, max_tokens) // context_length)
    starts = [first * context_length for first in range(windows)]
    batches = [starts[first : first + batch_size] for first in range(0, windows, batch_size)]

    with inference(model) as module:
        blocks = find_blocks(module)
        device = device_of(module)
        streams = StreamStatistics(len(blocks), device, config=module.config)
        attention = AttentionStatistics(len(blocks), module.config.num_attention_heads, device)  # type: ignore[union-attr, arg-type]

        def rows_of(batch: list[int]) -> torch.Tensor:
            return _rows(module, stream, batch, context_length)[:, :-1].to(device)

        for number, batch in enumerate(batches, start=1):
            with streams.watching(blocks), attention.watching(module):
                module(input_ids=rows_of(batch), use_cache=False, logits_to_keep=1)
            step("streams and attention", number, len(batches))
        gradients = GradientStatistics(module, blocks)
        full = [batch for batch in batches if len(batch) == len(batches[0])][:gradient_batches]
        for number, batch in enumerate(full, start=1):
            rows = _rows(module, stream, batch, context_length).to(device)
            gradients.add(rows[:, :-1], rows[:, 1:])
            step("gradients", number, len(full))
        measured = streams.result()
        numbers = {
            "num_layers": len(blocks),
            "context_length": context_length,
            **measured,
            "variance_growth": growth(measured["stream_variance"][1:]),
            **attention.result(attention_names(blocks)),
            **gradients.result(),
            **gain_drift(module, blocks),
            **linear_attention_health(module, rows_of(batches[0]), len(blocks)),
        }
        if removal:
            options = {
                "context_length": context_length,
                "batch_size": batch_size,
                "max_tokens": removal_tokens,
            }
            numbers |= layer_removal(module, blocks, stream, **options)
    return finite(numbers)


def linear_attention_health(
    model: nn.Module, input_ids: torch.Tensor, num_layers: int
) -> dict[str, list[float | None]]:
    """`attention_health` on one batch: name -> a number for each layer, null where it has none; {} where no
    layer is linear.
    """
    health = attention_health(model, input_ids)
    names = dict.fromkeys(name for numbers in health.values() for name in numbers)
    return {name: [health.get(layer, {}).get(name) for layer in range(num_layers)] for name in names}


def check_windows(model: nn.Module, num_tokens: int, context_length: int, **counts: int) -> None:
    """Raise UserError unless one full window of `context_length` fits the text and the model."""
    for name, count in {"context_length": context_length, **counts}.items():
        if count < 1:
            raise UserError(f"{name}={count} must be at least 1.")
    if num_tokens < context_length + 1:
        raise UserError(
            f"the text holds {num_tokens} tokens, fewer than one window of context_length={context_length} "
            f"and its last target ({context_length + 1}); give a longer text or a shorter context."
        )
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and context_length > limit:
        raise UserError(
            f"context_length={context_length} exceeds the model's max_position_embeddings={limit}, beyond "
            f"which no layer was trained; use a context_length of at most {limit}."
        )


def attention_names(blocks: list[nn.Module]) -> list[str]:
    """What computes attention in each block, by name; "the layer" where it has no child for it."""
    names = []
    for block in blocks:
        child = getattr(block, "self_attn", None) or getattr(block, "attn", None)
        other = getattr(child, "normalizer", None)  # softmax's relatives are functions of their own
        names.append("the layer" if child is None else getattr(other, "__name__", type(child).__name__))
    return names


def recorded_update_ratio(run_dir: Path | None) -> dict[str, Any]:
    """Each layer's update-to-weight ratio at the last diagnosed step of a run, or null with the reason.

    An exported model has no optimizer, so nothing but the run's own record can tell how far a step moves it.
    """
    reason = "a model has no optimizer; train with diagnostics.every and name the run directory with --run"
    if run_dir is not None and (run_dir / "metrics.jsonl").exists():
        rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row.get(UPDATE_RATIO)]
        if rows:
            return {"update_ratio": rows[-1][UPDATE_RATIO], "update_ratio_step": rows[-1]["step"]}
        reason = f"{run_dir.name}/metrics.jsonl has no {UPDATE_RATIO}; train with diagnostics.every"
    return {"update_ratio": None, "update_ratio_unavailable": reason}


def finite(value: Any) -> Any:
    """The same JSON value with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(model: nn.Module, stream: Any, starts: list[int], context_length: int) -> torch.Tensor:
    """[len(starts), context_length + 1] tokens, each known to the model."""
    rows = torch.stack([torch.as_tensor(stream.read(start, start + context_length + 1)) for start in starts])
    vocab_size = model_vocab_size(model)
    if vocab_size is not None and not (rows.min() >= 0 and rows.max() < vocab_size):
        raise UserError(
            f"the text has token ids from {int(rows.min())} to {int(rows.max())} and the model a vocabulary "
            f"of {vocab_size}; use the tokenizer the model was trained with."
        )
    return rows.long()
