"""Kinds of text files, each read as chunks of documents: .txt, .jsonl (compressed or not), .parquet."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import mmap
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmnorm.data.documents import BYTE_ORDER_MARK, CHUNK_BYTES, Chunk, JsonLines, Rows, text_parts
from llmnorm.errors import UserError

ROWS_PER_READ = 256


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong when a file is opened, read or decompressed into a `UserError` naming it."""
    import zstandard

    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(
            f"{path} cannot be decompressed: {error}; it is truncated or damaged, fetch it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class File:
    """A file named by path; its kind decides how documents are found in it."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def stamp(self) -> list[int] | None:
        status = self.path.stat()
        return [status.st_size, status.st_mtime_ns]

    def content_hash(self) -> str:
        with readable(self.path), self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


class TextFile(File):
    """A .txt file: one document. A byte order mark at its start is not part of it."""

    def chunks(self, text_field: str) -> Iterator[Chunk]:
        with (
            readable(self.path),
            self.path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            start = len(BYTE_ORDER_MARK) if data[: len(BYTE_ORDER_MARK)] == BYTE_ORDER_MARK else 0
            if start == len(data):
                raise UserError(f"{self.name} is empty; leave it out of the glob")
            yield from text_parts(data, self.name, start, len(data))


def _open_zstd(stream: IO[bytes]) -> IO[bytes]:
    import zstandard

    # Files made in parallel or joined with cat hold several frames; by default only the first is read.
    return zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)


DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


class JsonLinesFile(File):
    """A .jsonl file, compressed or not: one document in each line that is not blank."""

    def chunks(self, text_field: str) -> Iterator[Chunk]:
        line, offset, read, documents = 1, 0, 0, 0
        with readable(self.path), self.path.open("rb") as disk:
            decompress = DECOMPRESSORS.get(self.path.suffix)
            stream = io.BufferedReader(decompress(disk)) if decompress else disk
            while lines := stream.readlines(CHUNK_BYTES):
                size = sum(map(len, lines))
                documents += sum(1 for text in lines if text.strip())
                if line == 1:
                    lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
                yield JsonLines(self.name, line, offset, lines, text_field, disk.tell() - read)
                line, offset, read = line + len(lines), offset + size, disk.tell()
        if not documents:
            raise UserError(f"{self.name} holds no documents: every line is blank; leave it out of the glob")


class ParquetFile(File):
    """A .parquet file: one document in each row."""

    def chunks(self, text_field: str) -> Iterator[Chunk]:
        import pyarrow
        import pyarrow.parquet

        with readable(self.path):
            try:
                with pyarrow.parquet.ParquetFile(self.path) as table:
                    check_column(self.name, text_field, table.schema_arrow.names, table.metadata.num_rows)
                    batches = table.iter_batches(ROWS_PER_READ, columns=[text_field])
                    texts = (batch[0].to_pylist() for batch in batches)
                    row_bytes = self.size // table.metadata.num_rows
                    yield from row_chunks(self.name, text_field, texts, row_bytes)
            except pyarrow.ArrowException as error:
                raise UserError(f"{self.name} is not a readable parquet file: {error}") from error


def check_column(name: str, text_field: str, columns: Sequence[str], num_rows: int) -> None:
    """Raise `UserError` for a table without rows, or without the column that should hold the text."""
    if text_field not in columns:
        raise UserError(
            f"{name} has no column {text_field!r} (its columns are {', '.join(columns)}); set "
            "data.text_field to the column that holds the text"
        )
    if not num_rows:
        raise UserError(f"{name} holds no rows; leave it out")


def row_chunks(
    name: str, text_field: str, batches: Iterator[list[str | None]], row_bytes: int
) -> Iterator[Chunk]:
    """Join the rows of small batches into chunks of about `CHUNK_BYTES`; `row_bytes` on disk, on average."""
    texts: list[str | None] = []
    first, size = 0, 0
    for batch in batches:
        for text in batch:
            texts.append(text)
            size += len(text) if isinstance(text, str) else 0
            if size >= CHUNK_BYTES:
                yield Rows(name, first, texts, text_field, row_bytes * len(texts))
                first, texts, size = first + len(texts), [], 0
    if texts:
        yield Rows(name, first, texts, text_field, row_bytes * len(texts))


KINDS: dict[str, type[TextFile | JsonLinesFile | ParquetFile]] = {
    ".txt": TextFile,
    ".parquet": ParquetFile,
    **{kind + packed: JsonLinesFile for kind in (".jsonl", ".json") for packed in ("", *DECOMPRESSORS)},
}


def open_file(path: Path) -> TextFile | JsonLinesFile | ParquetFile:
    """The reader for a file, by its ending. Raises `UserError` for an unknown ending or an empty file."""
    endings = [ending for ending in KINDS if path.name.endswith(ending)]
    if not endings:
        raise UserError(f"{path} is of an unknown kind; text files end in {', '.join(sorted(KINDS))}")
    with readable(path):
        if not path.stat().st_size:
            raise UserError(f"{path} is empty; leave it out of the glob")
    return KINDS[max(endings, key=len)](path)
