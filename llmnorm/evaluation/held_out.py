"""Held-out text, from files or a `TokenDataset`, to a perplexity that says what it is of.

A perplexity means little without its tokens, bytes, words, context, stride, tokenizer and text, so those
travel with it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from llmnorm.data.dataset import MANIFEST, TokenDataset
from llmnorm.data.documents import Piece, measure
from llmnorm.data.encoding import encode_pieces
from llmnorm.data.files import KINDS, TextFile
from llmnorm.data.sources import resolve_sources
from llmnorm.data.tokenizer import tokenizer_fingerprint, vocabulary_size
from llmnorm.errors import UserError
from llmnorm.evaluation.perplexity import PerplexityResult, exp, perplexity

DOCUMENTS_PER_CALL = 256
METRICS = ("loss", "perplexity", "tokens", "word_perplexity", "bits_per_byte")
EVALUATION_KEY = re.compile(rf"eval/(?:(?P<name>.+)/)?(?P<metric>{'|'.join(METRICS)})")


@dataclass(frozen=True)
class HeldOutText:
    """One stream of tokens, read like a `TokenDataset`, and the measures of the text behind it."""

    tokens: np.ndarray
    num_bytes: int
    num_words: int
    num_documents: int
    tokenizer_hash: str
    data_hash: str

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop].astype(np.int64)


def read_held_out(
    path: str | Path,
    tokenizer: Any,
    *,
    text_field: str = "text",
    add_special_tokens: bool = False,
    append_eos: bool = False,
) -> HeldOutText | TokenDataset:
    """The text at `path` as one stream of tokens; a folder that `prepare` wrote is opened as it is.

    path: a file (.txt is one document; .jsonl, compressed or not, and .parquet hold one each line or row; any
        other ending is read as .txt), a glob, or hf:dataset.
    add_special_tokens: let the tokenizer add its own (BOS, EOS) to each document. append_eos: EOS after each,
        as in training. Without either, documents follow each other with no token between them.
    Raises UserError for what cannot be read or tokenized.
    """
    if (Path(path) / MANIFEST).is_file():
        dataset = TokenDataset.open(path)
        dataset.verify(tokenizer, vocabulary_size(tokenizer))
        return dataset
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError("--append-eos: the tokenizer has no EOS token; leave the option out.")
    sources = _sources(path)
    eos = [tokenizer.eos_token_id] if append_eos else []
    arrays: list[np.ndarray] = []
    num_bytes = num_words = num_documents = 0
    documents = (pieces for source in sources for pieces in _documents(source, text_field))
    while some := list(itertools.islice(documents, DOCUMENTS_PER_CALL)):
        arrays += [
            np.array([*ids, *eos], dtype=np.uint32) for ids in _encode(tokenizer, some, add_special_tokens)
        ]
        measures = [measure(piece) for pieces in some for piece in pieces]
        num_bytes += sum(found.bytes for found in measures)
        num_words += sum(found.words for found in measures)
        num_documents += len(some)
    hashes = [source.content_hash() for source in sources]
    return HeldOutText(
        tokens=np.concatenate(arrays) if arrays else np.empty(0, dtype=np.uint32),
        num_bytes=num_bytes,
        num_words=num_words,
        num_documents=num_documents,
        tokenizer_hash=_fingerprint(tokenizer),
        data_hash=hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )


def read_rows(
    path: str | Path, tokenizer: Any, context_length: int, text_field: str = "text"
) -> list[list[int]]:
    """Each document with its special tokens, truncated to `context_length`: the rows of the GaLore papers."""
    texts = (
        "".join(piece.text for piece in pieces)
        for s in _sources(path)
        for pieces in _documents(s, text_field)
    )
    return [tokenizer(text, truncation=True, max_length=context_length)["input_ids"] for text in texts]


def evaluate_dataset(
    model: nn.Module, dataset: HeldOutText | TokenDataset, **options: Any
) -> PerplexityResult:
    """`perplexity` of a text, with its words, bytes and hashes beside the number.

    options: those of `perplexity`. Words and bytes describe the whole text, so they are left out when
    `max_tokens` cuts it short.
    """
    result = perplexity(model, dataset, **options)
    if isinstance(dataset, TokenDataset):
        tokenizer_hash = dataset.manifest["tokenizer_hash"]
        data_hash = hashlib.sha256(dataset.document_digests.tobytes()).hexdigest()
    else:
        tokenizer_hash, data_hash = dataset.tokenizer_hash, dataset.data_hash
    whole = result.tokens == dataset.num_tokens - 1
    return replace(
        result,
        words=dataset.num_words if whole else None,
        bytes=dataset.num_bytes if whole else None,
        tokenizer_hash=tokenizer_hash,
        data_hash=data_hash,
    )


def evaluate_datasets(
    model: nn.Module, datasets: Mapping[str, Any], **options: Any
) -> dict[str, PerplexityResult]:
    """`evaluate_dataset` for each of several named validation sets."""
    return {name: evaluate_dataset(model, dataset, **options) for name, dataset in datasets.items()}


def evaluation_metrics(results: Mapping[str, PerplexityResult]) -> dict[str, float | int]:
    """The evaluation row of metrics.jsonl: `eval/loss`, `eval/perplexity`, `eval/tokens` and the like.

    With several sets those three are pooled over all tokens, and each set has its own `eval/<name>/...`.
    """
    nll_sum = sum(result.nll_sum for result in results.values())
    tokens = sum(result.tokens for result in results.values())
    row: dict[str, float | int] = {
        "eval/loss": nll_sum / tokens,
        "eval/perplexity": exp(nll_sum / tokens),
        "eval/tokens": tokens,
    }
    for name, result in results.items():
        prefix = "eval" if len(results) == 1 else f"eval/{name}"
        row |= {
            f"{prefix}/{key}": value
            for key, value in result.to_dict().items()
            if key in ("loss", "perplexity", "tokens", "word_perplexity", "bits_per_byte")
            and value is not None
        }
    return row


def held_out_numbers(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The reverse of `evaluation_metrics`: validation set -> metric -> value, of what is finite.

    A single set is called "validation"; the pooled numbers beside several are "all sets".
    """
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        match = EVALUATION_KEY.fullmatch(key)
        if match and isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(match["name"] or "", {})[match["metric"]] = value
    if "" in found:
        found["all sets" if len(found) > 1 else "validation"] = found.pop("")
    return found


def _sources(path: str | Path) -> Sequence[Any]:
    file = Path(path).expanduser()
    if file.is_file() and file.stat().st_size and not any(file.name.endswith(ending) for ending in KINDS):
        return [TextFile(file)]
    return resolve_sources(str(path), split="validation")


def _documents(source: Any, text_field: str) -> Iterator[list[Piece]]:
    """The pieces of each document that has text."""
    pieces: list[Piece] = []
    for chunk in source.chunks(text_field):
        for piece in chunk.pieces():
            pieces.append(piece)
            if piece.closes:
                if any(part.text for part in pieces):
                    yield pieces
                pieces = []


def _encode(tokenizer: Any, documents: list[list[Piece]], add_special_tokens: bool) -> list[list[int]]:
    """The ids of each document; a long one is encoded in parts, unless special tokens go around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or add_special_tokens:
        texts = ["".join(piece.text for piece in pieces) for pieces in documents]
        return tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    parts = iter(encode_pieces(backend, [piece for pieces in documents for piece in pieces]))
    return [[token for _ in pieces for token in next(parts)] for pieces in documents]


def _fingerprint(tokenizer: Any) -> str:
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return tokenizer_fingerprint(tokenizer)
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
