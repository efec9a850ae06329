"""Perplexity, counted so that nothing but the model can change it.

    loss = (1/M) * sum_m -ln p(x_m | x_window(m) < m)        perplexity = exp(loss)
    word perplexity = exp(nll_sum / words)                   bits per byte = nll_sum / (ln 2 * bytes)

The token stream x_0 ... x_{N-1} is cut into windows of `context_length` inputs whose targets are shifted by
one. Window k starts at k * stride; the first scores all its targets, each later one the targets no window
before it reached, so that every token but x_0 is scored exactly once (M = N - 1). Without a stride the
windows are disjoint. The last window may be shorter; no token is added. Sums are fp64 and the model runs in
fp32, so the number does not depend on the batch size or the process count (1e-6 relative: fp32 matrix
products round differently for different shapes).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F

from llmnorm.errors import UserError
from llmnorm.evaluation.gathering import forward_is_collective
from llmnorm.evaluation.precision import compute_dtype, device_of, inference, unwrap

IGNORED = -100
LOGITS_PER_CHUNK = 2**24  # the cross entropy upcasts this many logits at a time: 64 MiB in fp32


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was computed on.

    nll_sum (nats) and tokens (predicted tokens) are exact under every convention; loss is nll_sum / tokens
    unless `convention` says otherwise. words and bytes describe the text the tokens came from, where there is
    one.
    """

    nll_sum: float
    tokens: int
    loss: float
    context_length: int
    stride: int | None = None
    convention: str = "exact"
    dtype: str = "float32"
    words: int | None = None
    bytes: int | None = None
    tokenizer_hash: str | None = None
    data_hash: str | None = None

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nll_sum / words), words as in text.split(): the WikiText convention, for any tokenizer."""
        return exp(self.nll_sum / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        """nll_sum / (ln 2 * bytes), over the UTF-8 bytes of the whole text, for any tokenizer."""
        return self.nll_sum / (math.log(2) * self.bytes) if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Every field and every derived number, ready for JSON (a number that is not finite becomes null)."""
        numbers = {
            **asdict(self),
            "perplexity": self.perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
        }
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in numbers.items()
        }


class TokenStream(Protocol):
    """What `perplexity` reads from: a `TokenDataset`, a `HeldOutText`, or an array inside `_ArrayStream`."""

    @property
    def num_tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class Window(NamedTuple):
    """Inputs x[start:stop], targets x[start+1:stop+1], of which the last `scored` count."""

    start: int
    stop: int
    scored: int


def windows(num_tokens: int, context_length: int, stride: int) -> Iterator[Window]:
    """The windows over a stream of `num_tokens`, each with the targets that no earlier window scored."""
    scored_up_to = 0  # x_0 has no context, so it is never a target
    start = 0
    while scored_up_to < num_tokens - 1:
        stop = min(start + context_length, num_tokens - 1)
        yield Window(start, stop, stop - scored_up_to)
        scored_up_to = stop
        start += stride


def perplexity(
    model: nn.Module,
    token_ids: Sequence[int] | np.ndarray | torch.Tensor | TokenStream,
    context_length: int = 256,
    stride: int | None = None,
    batch_size: int = 8,
    *,
    max_tokens: int | None = None,
    float32: bool = True,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a Hugging Face causal language model on one stream of tokens (see the top of this file).

    token_ids: [N] integers, or anything with `num_tokens` and `read(start, stop)`.
    stride: 1 ... context_length; None for disjoint windows.
    batch_size: windows per forward pass. It changes only speed and memory: the logits of one batch,
        [batch_size, context_length, vocab_size], are the largest tensor.
    max_tokens: score only the first so many targets.
    float32: False measures in the model's own precision and the surrounding autocast instead.
    rank, world_size: this process's share of the batches; every process must call, and all get the result.
    progress: called with (batches done, batches of this process).
    The model comes back in the modes and dtypes it was in.

    Raises UserError for a stream shorter than 2 tokens, a token id beyond the vocabulary, a stride or
    context_length out of range.
    """
    stream = as_stream(token_ids)
    num_tokens = stream.num_tokens if max_tokens is None else min(stream.num_tokens, max_tokens + 1)
    _check(model, num_tokens, context_length, stride, batch_size)
    step = context_length if stride is None else stride
    vocab_size = model_vocab_size(model)

    batches = _batches(list(windows(num_tokens, context_length, step)), batch_size)
    mine = batches[rank::world_size]
    with inference(model, float32) as module:
        device = device_of(module)
        dtype = compute_dtype(module, float32)
        nll_sum = torch.zeros((), dtype=torch.float64, device=device)
        for done, batch in enumerate(mine, start=1):
            inputs, targets = _tensors(stream, batch, vocab_size)
            logits = module(input_ids=inputs.to(device), use_cache=False).logits
            scored = max(window.scored for window in batch)  # only this tail of the logits is upcast
            nll_sum += summed_cross_entropy(logits[:, -scored:], targets[:, -scored:].to(device))
            del logits
            if progress is not None:
                progress(done, len(mine))
        if forward_is_collective(unwrap(model)) and len(mine) < len(batches[::world_size]):
            # A forward of a sharded model is collective: the process with one batch fewer joins the last.
            inputs, _ = _tensors(stream, batches[0], vocab_size)
            module(input_ids=inputs.to(device), use_cache=False)
        if world_size > 1:
            distributed.all_reduce(nll_sum)
        total = float(nll_sum)
    tokens = num_tokens - 1
    return PerplexityResult(
        nll_sum=total,
        tokens=tokens,
        loss=total / tokens,
        context_length=context_length,
        stride=stride,
        dtype=dtype,
    )


class _ArrayStream:
    def __init__(self, token_ids: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.detach().cpu().numpy()
        self.array = np.asarray(token_ids)
        if self.array.ndim == 2 and self.array.shape[0] == 1:
            self.array = self.array[0]
        if self.array.ndim != 1 or (self.array.size and not np.issubdtype(self.array.dtype, np.integer)):
            raise UserError(
                f"token_ids must be one stream of integers of shape [N], got shape {list(self.array.shape)} "
                f"of {self.array.dtype}; join the documents into one stream first."
            )

    @property
    def num_tokens(self) -> int:
        return int(self.array.size)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop].astype(np.int64)


def as_stream(token_ids: Any) -> TokenStream:
    return token_ids if hasattr(token_ids, "read") else _ArrayStream(token_ids)


def _batches(all_windows: list[Window], batch_size: int) -> list[list[Window]]:
    """Batches of equally long windows: the last, shorter one goes alone, so that nothing is padded."""
    batches: list[list[Window]] = []
    for window in all_windows:
        fits = (
            batches
            and len(batches[-1]) < batch_size
            and batches[-1][0].stop - batches[-1][0].start == window.stop - window.start
        )
        if fits:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


def _tensors(
    stream: TokenStream, batch: list[Window], vocab_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [B, T] and targets [B, T] of a batch, targets scored by another window replaced by IGNORED."""
    rows = np.stack([stream.read(window.start, window.stop + 1) for window in batch])
    if vocab_size is not None and not (rows.min() >= 0 and rows.max() < vocab_size):
        raise UserError(
            f"token id {int(rows.max() if rows.max() >= vocab_size else rows.min())} is outside the model's "
            f"vocabulary of {vocab_size}; evaluate with the tokenizer the model was trained with."
        )
    tokens = torch.from_numpy(rows)
    targets = tokens[:, 1:].clone()
    for row, window in zip(targets, batch, strict=True):
        row[: row.numel() - window.scored] = IGNORED
    return tokens[:, :-1], targets


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """sum_i -ln softmax(logits_i)[target_i] over targets that are not IGNORED: fp32 terms, fp64 sum.

    logits [B, T, V] of any floating dtype, targets [B, T] int64. The upcast is made a chunk of rows at a
    time.
    """
    flat_logits, flat_targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    rows = max(1, LOGITS_PER_CHUNK // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for chunk, target in zip(flat_logits.split(rows), flat_targets.split(rows), strict=True):
        total += F.cross_entropy(chunk.float(), target, reduction="none", ignore_index=IGNORED).double().sum()
    return total


def model_vocab_size(model: nn.Module) -> int | None:
    """Rows of the model's input embedding, or None for a model that does not tell."""
    config = getattr(model, "config", None) or getattr(getattr(model, "module", None), "config", None)
    return getattr(config, "vocab_size", None)


def _check(
    model: nn.Module, num_tokens: int, context_length: int, stride: int | None, batch_size: int
) -> None:
    if num_tokens < 2:
        raise UserError(
            f"perplexity needs at least 2 tokens (the first is only context), got {num_tokens}; give a "
            "longer text."
        )
    if context_length < 1:
        raise UserError(f"context_length={context_length} must be at least 1.")
    if stride is not None and not 1 <= stride <= context_length:
        raise UserError(
            f"stride={stride} must be between 1 and context_length={context_length}: a larger one would "
            "leave tokens unscored."
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    config = getattr(model, "config", None) or getattr(getattr(model, "module", None), "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or context_length <= limit:
        return
    if getattr(config, "rope_parameters", None) is None:
        raise UserError(
            f"context_length={context_length} exceeds the {limit} positions the model has embeddings for "
            f"(max_position_embeddings); use a context_length of at most {limit}."
        )
    warnings.warn(
        f"context_length={context_length} exceeds max_position_embeddings={limit}: RoPE extrapolates beyond "
        "what the model was built for, and its perplexity usually suffers.",
        stacklevel=3,
    )


def exp(value: float) -> float:
    """e^value, infinite where a float cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
