"""Validation text taken out of the training text, the same each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llmnorm.data.documents import Piece, join_digests, measure
from llmnorm.data.sources import InlineText, Source
from llmnorm.errors import UserError


def held_out_documents(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out: those with the smallest text hashes, round(fraction * n) of them.

    digests: uint64 [n], n >= 2. Returns bool [n] with at least one document on each side. The choice
    depends on texts alone, so that it changes little as files are added, and copies of a document stay on
    one side (unless all are copies).
    """
    assert len(digests) > 1, "one document is split by split_document"
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


def only_document(sources: Sequence[Source], text_field: str) -> bytes | None:
    """The text of the only document there is, in UTF-8; None if there are more.

    Raises `UserError` if there is none.
    """
    document: list[bytes] = []
    closed = False
    for source in sources:
        for piece in _pieces(source, text_field):
            if closed:
                return None
            document.append(piece.text.encode())
            closed = piece.closes
    if not closed:
        raise UserError("data.train_files hold no text: all documents are empty; give files that hold text")
    return b"".join(document)


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
