"""Writing token shards, from the first that is not finished."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmnorm.data.documents import join_digests
from llmnorm.data.durable import sync, sync_folder, write_durably
from llmnorm.data.encoding import BYTES, CLOSES, DIGEST, TOKENS, WORDS, Encoded


class ShardWriter:
    """Appends encoded chunks to shards of `folder`; documents stay whole within a shard.

    shards: the manifest's entries of the finished shards. next: the (unit, chunk) to go on with.
    """

    _tokens: int
    _largest: int
    _empty: int

    def __init__(self, folder: Path, dtype: str, shard_tokens: int) -> None:
        self._folder, self._dtype, self._shard_tokens = folder, dtype, shard_tokens
        self._records = self._finished()
        self._finished_tokens = self.totals()["tokens"]
        self._stream: IO[bytes] | None = None
        self._begin()

    @property
    def next(self) -> tuple[int, int]:
        return tuple(self._records[-1]["next"]) if self._records else (0, 0)

    @property
    def shards(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in record.items() if key != "next"} for record in self._records]

    @property
    def tokens(self) -> int:
        """Tokens so far, those of unfinished shards included."""
        return self._finished_tokens + self._tokens

    def totals(self) -> dict[str, int]:
        """Sums over the finished shards."""
        counts = ("documents", "tokens", "words", "bytes", "empty_documents")
        return {count: sum(record[count] for record in self._records) for count in counts}

    def append(self, encoded: Encoded, next_chunk: tuple[int, int]) -> None:
        """Add a chunk's documents; `next_chunk` is where to go on if the shard ends with it."""
        if self._stream is None:
            self._stream = self._path(".bin.tmp").open("wb")
        data = encoded.tokens.tobytes()
        self._stream.write(data)
        self._hash.update(data)
        self._tokens += len(encoded.tokens)
        self._largest = max(self._largest, int(encoded.tokens.max(initial=0)))
        self._empty += encoded.empty
        self._add_documents(encoded.table)
        if self._tokens >= self._shard_tokens and not self._open:
            self._end(next_chunk)

    def close(self, next_chunk: tuple[int, int]) -> None:
        """End the last shard."""
        if self._stream is not None:
            self._end(next_chunk)

    def remove_records(self) -> None:
        """Forget what only a resumed run needs, once the manifest holds the rest."""
        for record in self._folder.glob("shard-*.json"):
            record.unlink()

    def _begin(self) -> None:
        self._stream = None
        self._hash = hashlib.sha256()
        self._tokens = 0
        self._largest = 0
        self._empty = 0
        self._tables: list[np.ndarray] = []
        self._open: list[np.ndarray] = []  # the pieces so far of a document that goes on in the next chunk

    def _add_documents(self, table: np.ndarray) -> None:
        if not self._open and table[CLOSES].all():
            self._tables.append(table[:CLOSES])
            return
        for piece in table.T:
            self._open.append(piece)
            if piece[CLOSES]:
                document = np.stack(self._open, axis=1).sum(axis=1)[:CLOSES]
                document[DIGEST] = join_digests([int(part[DIGEST]) for part in self._open])
                self._tables.append(document[:, None])
                self._open = []

    def _end(self, next_chunk: tuple[int, int]) -> None:
        assert self._stream is not None and not self._open
        with self._stream:
            sync(self._stream)
        self._path(".bin.tmp").rename(self._path(".bin"))
        table = np.concatenate([np.empty((CLOSES, 0), np.uint64), *self._tables], axis=1)
        table[TOKENS] = np.cumsum(table[TOKENS])
        saved = io.BytesIO()
        np.save(saved, table, allow_pickle=False)
        write_durably(self._path(".documents.npy"), saved.getvalue())
        record = {
            "documents": table.shape[1],
            "tokens": self._tokens,
            "words": int(table[WORDS].sum()),
            "bytes": int(table[BYTES].sum()),
            "empty_documents": self._empty,
            "largest_id": self._largest,
            "files": [
                self._file(".bin", self._hash.hexdigest()),
                self._file(".documents.npy", hashlib.sha256(saved.getvalue()).hexdigest()),
            ],
            "next": next_chunk,
        }
        write_durably(self._path(".json"), json.dumps(record).encode())
        sync_folder(self._folder)
        self._records.append(record)
        self._finished_tokens += self._tokens
        self._begin()

    def _path(self, ending: str) -> Path:
        return self._folder / f"shard-{len(self._records):05d}{ending}"

    def _file(self, ending: str, sha256: str) -> dict[str, Any]:
        path = self._path(ending)
        return {"name": path.name, "size": path.stat().st_size, "sha256": sha256}

    def _finished(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        while (path := self._folder / f"shard-{len(records):05d}.json").is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            files = [(self._folder / file["name"], file["size"]) for file in record["files"]]
            if not all(file.is_file() and file.stat().st_size == size for file, size in files):
                break
            records.append(record)
        return records
