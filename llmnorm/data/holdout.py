"""Validation text taken out of the training text, the same each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llmnorm.data.documents import Piece, join_digests, measure
from llmnorm.data.sources import InlineText, Source
from llmnorm.errors import UserError

FEW_BYTES = 1 << 30


def held_out_documents(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out: those with the smallest text hashes, round(fraction * n) of them.

    digests: uint64 [n], n >= 2. Returns bool [n] with at least one document on each side. The choice
    depends on texts alone, so that it changes little as files are added, and copies of a document stay on
    one side (unless all are copies).
    """
    assert len(digests) > 1, "few documents are split by split_documents"
    wanted = min(max(round(fraction * len(digests)), 1), len(digests) - 1)
    order = np.argsort(digests, kind="stable")
    chosen = digests <= digests[order[wanted - 1]]
    if chosen.all():
        chosen = np.zeros(len(digests), np.bool_)
        chosen[order[:wanted]] = True
    return chosen


def held_out_by_source(sources: Sequence[Source], text_field: str, fraction: float) -> list[np.ndarray]:
    """Which documents of each source are held out; reads all text once without tokenizing it."""
    digests = [_digests(source, text_field) for source in sources]
    chosen = held_out_documents(np.concatenate(digests), fraction)
    return np.split(chosen, np.cumsum([len(part) for part in digests])[:-1])


def few_documents(sources: Sequence[Source], text_field: str, fraction: float) -> list[bytes] | None:
    """The texts of the documents, in UTF-8, where there are fewer than 1 / fraction; None if there are more.

    A single document is always few; several that hold more than `FEW_BYTES` are not, as they would all be in
    memory. Reading stops as soon as that is known. Raises `UserError` if there is no document.
    """
    documents: list[bytes] = []
    parts: list[bytes] = []
    size = 0
    for source in sources:
        for piece in _pieces(source, text_field):
            if documents and ((len(documents) + 1) * fraction >= 1.0 or size > FEW_BYTES):
                return None
            parts.append(piece.text.encode())
            size += len(parts[-1])
            if piece.closes:
                documents.append(b"".join(parts))
                parts = []
    if not documents:
        raise UserError("data.train_files hold no text: all documents are empty; give files that hold text")
    return documents


def split_documents(texts: Sequence[bytes], fraction: float) -> tuple[list[Source], list[Source]]:
    """Heads and tails of documents, each cut as by `split_document`.

    Of several, one too short for a tail of its own stays whole; no tails at all if that is true of each.
    """
    heads: list[Source] = []
    tails: list[Source] = []
    for text in texts:
        if len(texts) > 1 and round(fraction * len(text)) < 1:
            heads.append(InlineText("training text", text))
            continue
        head, tail = split_document(text, fraction)
        heads.append(head)
        tails.append(tail)
    return heads, tails


def split_document(text: bytes, fraction: float) -> tuple[InlineText, InlineText]:
    """Cut a document in two: a head, and about the last `fraction` of its bytes.

    The tail begins with a line if one begins near, else with a character.
    """
    cut = min(max(len(text) - round(fraction * len(text)), 1), len(text) - 1)
    newline = text.find(b"\n", cut - 1, cut + (len(text) - cut) // 10 + 1)
    if 0 <= newline < len(text) - 1:
        cut = newline + 1
    while cut < len(text) - 1 and text[cut] & 0xC0 == 0x80:
        cut += 1
    return InlineText("training text", text[:cut]), InlineText("held-out text", text[cut:])


def _digests(source: Source, text_field: str) -> np.ndarray:
    parts: list[int] = []
    found: list[int] = []
    for piece in _pieces(source, text_field):
        parts.append(measure(piece).digest)
        if piece.closes:
            found.append(join_digests(parts))
            parts = []
    return np.array(found, np.uint64)


def _pieces(source: Source, text_field: str) -> Iterator[Piece]:
    for chunk in source.chunks(text_field):
        for piece in chunk.pieces():
            if piece.text:
                yield piece
