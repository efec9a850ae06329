"""The tokenizer of a run: loaded from a folder or the Hub, or trained on the run's own text."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmnorm.data.content import content_hashes
from llmnorm.data.durable import cannot_write, exclusive, give_way, writable_folder
from llmnorm.data.holdout import held_out_by_source
from llmnorm.data.sources import Source, resolve_sources
from llmnorm.data.worker import Child
from llmnorm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger("llmnorm.data")

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
SAMPLE_BYTES = {"bpe": 64 << 20, "unigram": 16 << 20}
SAMPLED_SOURCES = 1024
NO_MAX_LENGTH = int(1e30)


def load_or_train_tokenizer(
    spec: Any,
    train_sources: str | Sequence[str | Source],
    cache_dir: str | Path,
    text_field: str = "text",
    *,
    validation_fraction: float = 0.0,
    leader: bool = True,
) -> PreTrainedTokenizerFast:
    """The tokenizer that `data.tokenizer` names.

    spec: a folder, a Hub name, or {train: bpe|unigram, vocab_size: n} (a mapping or an object with these
        attributes) to train one on `train_sources`, at most `SAMPLE_BYTES` of them, once: it is kept in
        `cache_dir`.
    validation_fraction: the part of the documents that is held out (`held_out_documents`), not trained on.
    leader: whether this process should do the training where several start together; the others wait.

    Raises `UserError` if it cannot be loaded, has no fast version or no EOS token, or cannot be trained.
    """
    if isinstance(spec, str):
        return load_tokenizer(spec)
    kind, vocab_size = (
        spec[k] if isinstance(spec, dict) else getattr(spec, k) for k in ("train", "vocab_size")
    )
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"data.tokenizer.vocab_size={vocab_size} is below {SMALLEST_VOCABULARY}: 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens; raise it"
        )
    cache_dir = Path(cache_dir).expanduser()
    sources = resolve_sources(train_sources)
    identity = [kind, vocab_size, text_field, SAMPLE_BYTES[kind], validation_fraction]
    identity.append(content_hashes(sources, cache_dir))
    name = "tokenizer-" + hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
    folder = cache_dir / name
    if not folder.is_dir():
        writable_folder(cache_dir)
        lock = cache_dir / (name + ".lock")
        if not leader:
            give_way(lock, folder.is_dir)
        with exclusive(lock):
            if not folder.is_dir():
                held_out = (
                    held_out_by_source(sources, text_field, validation_fraction)
                    if validation_fraction
                    else None
                )
                texts = list(sample_text(sources, text_field, SAMPLE_BYTES[kind], held_out))
                _train(kind, vocab_size, texts, folder)
    return load_tokenizer(str(folder))


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or the Hub. Raises `UserError` if that fails or it cannot be trained with."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise UserError(f"data.tokenizer={name!r} is not a folder; check the path, or give a Hub name")
    try:
        if folder.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        else:
            tokenizer = _from_hub(name)
    except Exception as error:  # transformers raises almost any type for a missing or damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"data.tokenizer={name!r} could not be loaded: {reason}. It is neither a folder with a "
            "tokenizer nor one of the Hub that can be reached or is in the local cache (HF_HOME); check "
            "the name, download it elsewhere and give its folder, or train one: "
            "{train: bpe, vocab_size: 32000}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"data.tokenizer={name!r} has no fast version (tokenizer.json), which is needed to prepare text; "
            "convert it, choose another, or train one: {train: bpe, vocab_size: 32000}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"data.tokenizer={name!r} has no EOS token, which ends each document; add one and save it again"
        )
    return tokenizer


def _from_hub(name: str) -> Any:
    from transformers import AutoTokenizer

    # The cache first: every process of a run comes here, and hundreds that ask the Hub at once are refused.
    with suppress(Exception):
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    return AutoTokenizer.from_pretrained(name)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 of what decides the ids: the tokenizer's canonical JSON, without truncation and padding."""
    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    serialized.update(truncation=None, padding=None)
    return hashlib.sha256(json.dumps(serialized, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id, which is more than the number of tokens where ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def sample_text(
    sources: Sequence[Source],
    text_field: str,
    limit: int,
    held_out: Sequence[np.ndarray] | None = None,
) -> Iterator[str]:
    """The same part of the text each time, of at most about `limit` bytes: the beginnings of the sources.

    Each source gives an equal share; what small ones leave over goes to the larger. Of more than
    `SAMPLED_SOURCES` sources, that many, evenly spaced, are read.
    """
    count = min(len(sources), SAMPLED_SOURCES)
    chosen = [i * len(sources) // count for i in range(count)]
    by_size = sorted(chosen, key=lambda i: (sources[i].size, i))
    left = limit
    for position, index in enumerate(by_size):
        share = left // (count - position)
        for text in _beginning(
            sources[index], text_field, share, None if held_out is None else held_out[index]
        ):
            left -= len(text.encode())
            yield text


def _beginning(source: Source, text_field: str, share: int, held_out: np.ndarray | None) -> Iterator[str]:
    document, taken = 0, 0
    for chunk in source.chunks(text_field):
        for piece in chunk.pieces():
            if taken >= share:
                return
            if piece.text and (held_out is None or not held_out[document]):
                text = piece.text[: share - taken]
                taken += len(text.encode())
                yield text
            document += piece.closes and bool(piece.text)


def _train(kind: str, vocab_size: int, texts: list[str], folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    if not texts:
        raise UserError("data.tokenizer: there is no text to train a tokenizer on; all documents are empty")
    child = Child("llmnorm.data.tokenizer_training:Trainer", threads=1, parallel=True)
    try:
        serialized = child.call((kind, vocab_size, list(SPECIAL_TOKENS.values()), texts))
    finally:
        child.close()
    import tokenizers

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(serialized),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=NO_MAX_LENGTH,
        **SPECIAL_TOKENS,
    )
    if len(tokenizer) < vocab_size:
        logger.warning(
            "data.tokenizer.vocab_size=%d: the text supports only %d tokens; the tokenizer has that many",
            vocab_size,
            len(tokenizer),
        )
    unfinished = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    except OSError as error:
        raise cannot_write(folder.parent, error) from error
