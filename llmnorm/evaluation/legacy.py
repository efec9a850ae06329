"""The perplexity that papers of the GaLore lineage report, bias included, to compare like with like.

With micro-batches of `batch_size` rows on each of P processes, n_p batches on process p and l_{p,b} the mean
loss of its batch b over the shifted targets that are not padding:

    loss = (1/P) * sum_p [ sum_{b=1}^{n_p} l_{p,b} / (n_p + 1) ]

Source: `evaluate_model` of the released training script of GaLore (Zhao et al., "GaLore: Memory-Efficient LLM
Training by Gradient Low-Rank Projection", arXiv 2403.03507), kept by Mix-LN (arXiv 2412.13795), LayerNorm
Scaling (arXiv 2502.05795) and GPAS (arXiv 2506.22049). Its batch counter starts at 1, so every loss is low by
the factor n/(n+1); it averages batch means, so short rows weigh as much as long ones. Both effects depend on
the micro-batch and the process count: for a true perplexity of 26.73 on 10 M tokens it reports 26.25 at
micro-batch 256 and 26.61 at 64.

A row is one document with the tokenizer's special tokens, truncated to the context length; the rest is
dropped. Row i goes to process i mod P, and a process stops once P times the tokens it has seen exceeds
`target_tokens`. The script never meets the end of its stream; here a shorter last batch is a batch like the
others. The papers evaluate bf16 weights; this measures in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed, nn

from llmnorm.errors import UserError
from llmnorm.evaluation.perplexity import IGNORED, PerplexityResult, model_vocab_size, summed_cross_entropy
from llmnorm.evaluation.precision import compute_dtype, device_of, inference

TARGET_TOKENS = 10_000_000


def galore_legacy(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    batch_size: int,
    context_length: int = 256,
    processes: int = 1,
    target_tokens: int = TARGET_TOKENS,
    rank: int = 0,
    world_size: int = 1,
) -> PerplexityResult:
    """Legacy loss and perplexity of `rows` of token ids (see the top of this file).

    processes: the P of the formula, the process count being reproduced; rank and world_size only share the
    work. The result's `loss` and `perplexity` are the biased count, its `nll_sum` and `tokens` the exact one
    over the same rows. Raises UserError when there is nothing to evaluate or a token id is beyond the
    vocabulary.
    """
    if batch_size < 1 or processes < 1:
        raise UserError(f"batch_size={batch_size} and processes={processes} must be at least 1.")
    streams = [
        _batches(
            rows[process::processes], batch_size, context_length, pad_token_id, target_tokens / processes
        )
        for process in range(processes)
    ]
    if not all(streams):
        raise UserError(
            f"{len(rows)} documents are too few for the galore_legacy convention with {processes} processes: "
            "every process needs at least one document of two tokens."
        )
    work = [(process, batch) for process, batches in enumerate(streams) for batch in batches]
    vocab_size = model_vocab_size(model)

    with inference(model) as module:
        device = device_of(module)
        dtype = compute_dtype(module, True)
        batch_means = torch.zeros(processes, dtype=torch.float64, device=device)
        exact = torch.zeros(2, dtype=torch.float64, device=device)
        for process, batch in work[rank::world_size]:
            if vocab_size is not None and int(batch.max()) >= vocab_size:
                raise UserError(
                    f"token id {int(batch.max())} is outside the model's vocabulary of {vocab_size}; "
                    "evaluate with the tokenizer the model was trained with."
                )
            targets = batch[:, 1:].masked_fill(batch[:, 1:] == pad_token_id, IGNORED)
            mask = (batch != pad_token_id).long().to(device)
            logits = module(input_ids=batch.to(device), attention_mask=mask, use_cache=False).logits[:, :-1]
            nll, count = summed_cross_entropy(logits, targets.to(device)), int((targets != IGNORED).sum())
            batch_means[process] += nll / count
            exact += torch.stack([nll, torch.tensor(count, dtype=torch.float64, device=device)])
            del logits
        if world_size > 1:
            distributed.all_reduce(batch_means)
            distributed.all_reduce(exact)
        nll_sum, tokens = exact.tolist()
    loss = sum(
        total / (len(batches) + 1) for total, batches in zip(batch_means.tolist(), streams, strict=True)
    )
    return PerplexityResult(
        nll_sum=nll_sum,
        tokens=int(tokens),
        loss=loss / processes,
        context_length=context_length,
        convention="galore_legacy",
        dtype=dtype,
    )


def _batches(
    rows: Sequence[Sequence[int]], batch_size: int, length: int, pad_token_id: int, target_tokens: float
) -> list[torch.Tensor]:
    """Right-padded batches [batch_size, length] of one process, until it has seen `target_tokens`."""
    batches: list[torch.Tensor] = []
    seen = 0
    for first in range(0, len(rows), batch_size):
        if seen > target_tokens:
            break
        chunk = rows[first : first + batch_size]
        batch = torch.full((len(chunk), length), pad_token_id, dtype=torch.int64)
        for padded, row in zip(batch, chunk, strict=True):
            padded[: len(row[:length])] = torch.tensor(list(row[:length]), dtype=torch.int64)
        if not bool((batch[:, 1:] != pad_token_id).any()):
            raise UserError(
                f"documents {first} to {first + len(chunk) - 1} of a process hold no token to predict, so "
                "their batch mean is undefined (the released script reports nan); remove empty documents or "
                "raise batch_size."
            )
        seen += int((batch != pad_token_id).sum())
        batches.append(batch)
    return batches
