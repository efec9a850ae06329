"""Text to token ids, in parallel and in order.

A document's tokens are `tokenizer.encode(text, add_special_tokens=False)` followed by EOS.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from llmnorm.data.documents import Chunk, Piece, measure
from llmnorm.data.worker import Child

# The columns of an encoded chunk's table, one row for each piece. `tokens` counts the EOS of a closing piece.
TOKENS, BYTES, WORDS, DIGEST, CLOSES = range(5)
THREADS_PER_PROCESS = 8


class Encoded(NamedTuple):
    """tokens: ids of all pieces, EOS included, [num_tokens]. table: uint64 [5, num_pieces], see `TOKENS`...

    empty: documents without text, which are left out.
    """

    tokens: np.ndarray
    table: np.ndarray
    empty: int


def encoding_tokenizer(tokenizer_json: str) -> Tokenizer:
    """A tokenizer of its own, free of truncation and padding that its first owner may have left set."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[list[int]]:
    """The ids of each piece, without special tokens.

    A part of a document is encoded together with the text around it, and the tokens that begin in the part
    are kept: those of the whole document, as long as no word is longer than that surrounding text.
    """
    whole = [piece.text for piece in pieces if not (piece.before or piece.after)]
    encodings = iter(tokenizer.encode_batch_fast(whole, add_special_tokens=False))
    return [
        _encode_part(tokenizer, piece) if piece.before or piece.after else next(encodings).ids
        for piece in pieces
    ]


def _encode_part(tokenizer: Tokenizer, piece: Piece) -> list[int]:
    # encode_batch, because encode holds Python's lock and so stops the other threads.
    (encoding,) = tokenizer.encode_batch([piece.before + piece.text + piece.after], add_special_tokens=False)

    def first_token_from(character: int) -> int:
        def begins_at(token: int) -> int:
            return encoding.token_to_chars(token)[0]  # type: ignore[index]  # None only for special tokens

        return bisect_left(range(len(encoding)), character, key=begins_at)

    start = first_token_from(len(piece.before)) if piece.before else 0
    stop = first_token_from(len(piece.before) + len(piece.text)) if piece.after else len(encoding)
    return encoding.ids[start:stop]


class Encoder:
    """Encodes chunks: the handler of a tokenizing process.

    tokenizer_json: `tokenizers.Tokenizer.to_str()`. dtype: of the ids.
    """

    def __init__(self, tokenizer_json: str, eos_token_id: int, dtype: str) -> None:
        self._tokenizer = encoding_tokenizer(tokenizer_json)
        self._eos_token_id = eos_token_id
        self._dtype = np.dtype(dtype)

    def __call__(self, chunk: Chunk) -> Encoded:
        found = list(chunk.pieces())
        pieces = [piece for piece in found if piece.text]
        tokens = array("I")
        table = np.zeros((5, len(pieces)), np.uint64)
        for i, (piece, ids) in enumerate(zip(pieces, encode_pieces(self._tokenizer, pieces), strict=True)):
            tokens.extend(ids)
            if piece.closes:
                tokens.append(self._eos_token_id)
            table[:, i] = len(ids) + piece.closes, *measure(piece), piece.closes
        ids_of_chunk = np.frombuffer(tokens, np.uint32).astype(self._dtype)
        return Encoded(ids_of_chunk, table, len(found) - len(pieces))


class EncoderPool:
    """Encoders in `workers` threads, `THREADS_PER_PROCESS` to a process. Use as a context manager.

    Threads of one process share the tokenizer in the processor's cache, and encode without Python's lock;
    what they do in Python is so little that a few of them fill a process.
    """

    def __init__(self, tokenizer_json: str, eos_token_id: int, dtype: str, workers: int) -> None:
        self._setup = (tokenizer_json, eos_token_id, dtype)
        self._processes = -(-workers // THREADS_PER_PROCESS)
        self._threads = -(-workers // self._processes)
        self._children: list[Child] = []

    def encode(self, chunks: Iterable[tuple[Any, Chunk]]) -> Iterator[tuple[Any, Encoded]]:
        """Encode (label, chunk) pairs in parallel and yield (label, encoded) in the order they came.

        Each thread has at most one chunk waiting beside the one it works on, so that reading waits for
        encoding. Raises `UserError` for text that is not as it should be.
        """
        held = 4 * self._processes * self._threads
        running: deque[tuple[Any, Future[Encoded]]] = deque()
        for label, chunk in chunks:
            while running and (running[0][1].done() or len(running) >= held or self._free() is None):
                first, future = running.popleft()
                yield first, future.result()
            child = self._free()
            assert child is not None, "with nothing running there is a free process"
            running.append((label, child.submit(chunk)))
        for label, future in running:
            yield label, future.result()

    def _free(self) -> Child | None:
        """A process for a chunk: one with an idle thread, else a new one, else one where it can wait."""
        child = min(self._children, key=lambda child: child.outstanding, default=None)
        if (child is None or child.outstanding >= self._threads) and len(self._children) < self._processes:
            handler = "llmnorm.data.encoding:Encoder"
            child = Child(handler, *self._setup, threads=self._threads, parallel=False)
            self._children.append(child)
        assert child is not None
        return child if child.outstanding < 2 * self._threads else None

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self._children:
            child.close()
