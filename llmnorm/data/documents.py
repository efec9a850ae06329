"""Chunks of source text as they are read, and the document pieces inside them.

A chunk is what travels to a tokenizing process: bytes and names, parsed only there. It yields pieces. A piece
is a whole document, or a part of one longer than `PIECE_BYTES`; a part carries the text on both sides of it,
so that its tokens are those of the whole document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import NamedTuple, Protocol

from llmnorm.errors import UserError

CHUNK_BYTES = 1 << 20
PIECE_BYTES = 1 << 21
CONTEXT_BYTES = 1 << 12
CUT_SEARCH_BYTES = 1 << 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Piece(NamedTuple):
    """Text of one document, or a part of it.

    before, after: the document's text around this part, for the tokenizer to see (empty for a whole
    document). closes: whether the document ends here.
    """

    before: str
    text: str
    after: str
    closes: bool


class Measure(NamedTuple):
    """UTF-8 bytes and whitespace-separated words of a text, and 64 bits of the BLAKE2b hash of its bytes."""

    bytes: int
    words: int
    digest: int


def measure(piece: Piece) -> Measure:
    """Count a piece so that the sums over a document's pieces are the document's counts.

    A word is a maximal run of characters that are not whitespace (`str.split`); one that began in the piece
    before is not counted again.
    """
    encoded = piece.text.encode()
    continued = piece.before[-1:].strip() != "" and piece.text[:1].strip() != ""
    return Measure(
        bytes=len(encoded),
        words=len(piece.text.split()) - continued,
        digest=int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little"),
    )


def join_digests(digests: Sequence[int]) -> int:
    """The digest of a document from those of its pieces; a single piece is its document."""
    if len(digests) == 1:
        return digests[0]
    joined = b"".join(digest.to_bytes(8, "little") for digest in digests)
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little")


class Chunk(Protocol):
    """A run of documents, or a part of one, from one or several source files."""

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk that this chunk was read from, to show progress."""

    def pieces(self) -> Iterator[Piece]:
        """The pieces in reading order; a document without text gives a piece with an empty text.

        Raises `UserError` naming the file and the line, row or byte offset of what is wrong.
        """


def decode(data: bytes, path: str, offset: int) -> str:
    """UTF-8 bytes found at `offset` of a file, as text. Raises `UserError` naming file and byte offset."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start} "
            "cannot be decoded; convert the file (iconv -f latin1 -t utf-8) or leave it out of the glob"
        ) from None


@dataclass(frozen=True)
class TextPart:
    """A whole .txt document, or a part of one, with the bytes around it."""

    path: str
    offset: int
    before: bytes
    text: bytes
    after: bytes
    closes: bool

    @property
    def disk_bytes(self) -> int:
        return len(self.text)

    def pieces(self) -> Iterator[Piece]:
        nul = self.text.find(b"\0")
        if nul >= 0:
            raise UserError(
                f"{self.path} is a binary file: NUL byte at offset {self.offset + nul}; text files are UTF-8 "
                "without NUL bytes, so leave it out of the glob"
            )
        yield Piece(
            decode(self.before, self.path, self.offset - len(self.before)),
            decode(self.text, self.path, self.offset),
            decode(self.after, self.path, self.offset + len(self.text)),
            self.closes,
        )


def text_parts(data: bytes | mmap, path: str, start: int, stop: int) -> Iterator[TextPart]:
    """Cut the document `data[start:stop]` (bytes or a memory map) into parts of at most about `PIECE_BYTES`.

    Cuts fall after a line's end where there is one near, else between two characters.
    """

    def boundary(index: int) -> int:
        while index < stop and data[index] & 0xC0 == 0x80:
            index += 1
        return index

    position = start
    while position < stop:
        end = min(position + PIECE_BYTES, stop)
        if end < stop:
            newline = data.rfind(b"\n", max(position, end - CUT_SEARCH_BYTES), end)
            end = newline + 1 if newline >= 0 else boundary(end)
        left = boundary(max(start, position - CONTEXT_BYTES))
        right = boundary(min(stop, end + CONTEXT_BYTES))
        yield TextPart(path, position, data[left:position], data[position:end], data[end:right], end == stop)
        position = end


def text_pieces(text: str, path: str) -> Iterator[Piece]:
    """A document that is already text, cut like a file if it is long."""
    if len(text) <= PIECE_BYTES // 4:
        yield Piece("", text, "", True)
        return
    data = text.encode()
    for part in text_parts(data, path, 0, len(data)):
        yield Piece(part.before.decode(), part.text.decode(), part.after.decode(), part.closes)


@dataclass(frozen=True)
class TextGroup:
    """Several small .txt documents in one chunk."""

    parts: list[TextPart]

    @property
    def disk_bytes(self) -> int:
        return sum(part.disk_bytes for part in self.parts)

    def pieces(self) -> Iterator[Piece]:
        for part in self.parts:
            yield from part.pieces()


@dataclass(frozen=True)
class JsonLines:
    """Consecutive lines of a JSON-lines file, unparsed; blank lines are skipped."""

    path: str
    first_line: int
    offset: int
    lines: list[bytes]
    text_field: str
    disk_bytes: int

    def pieces(self) -> Iterator[Piece]:
        offset = self.offset
        for number, line in enumerate(self.lines, self.first_line):
            if line.strip():
                yield from text_pieces(self._text(line, number, offset), f"{self.path}:{number}")
            offset += len(line)

    def _text(self, line: bytes, number: int, offset: int) -> str:
        where = f"{self.path}:{number}"
        decoded = decode(line, self.path, offset)
        try:
            record = json.loads(decoded)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where} is not valid JSON: {error.msg} at column {error.colno}; each line must be one JSON "
                f'object such as {{"{self.text_field}": "..."}}'
            ) from None
        if not isinstance(record, dict) or self.text_field not in record:
            found = f"its keys are {', '.join(record)}" if isinstance(record, dict) else "it is not an object"
            raise UserError(
                f"{where} has no field {self.text_field!r} ({found}); set data.text_field to the key that "
                "holds the text"
            )
        return checked_text(record[self.text_field], where, self.text_field)


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a table (parquet, Hub dataset)."""

    path: str
    first_row: int
    texts: list[str | None]
    text_field: str
    disk_bytes: int

    def pieces(self) -> Iterator[Piece]:
        for row, text in enumerate(self.texts, self.first_row):
            where = f"{self.path}, row {row}"
            yield from text_pieces(checked_text(text, where, self.text_field), where)


def checked_text(value: object, where: str, text_field: str) -> str:
    """`value` if it is text that UTF-8 can hold. Raises `UserError` naming its place."""
    if not isinstance(value, str):
        raise UserError(
            f"{where}: field {text_field!r} holds {type(value).__name__}, not text; set data.text_field to a "
            "text field or repair the row"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {text_field!r} holds half of a surrogate pair at character {error.start}, "
            "which is not text that UTF-8 can hold; repair the row"
        ) from None
    return value
