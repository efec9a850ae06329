"""Token shards on disk, as one stream of tokens and one list of documents.

A prepared folder holds `manifest.json`, and for each shard `shard-N.bin` (ids, little-endian uint16 or
uint32) and `shard-N.documents.npy` (uint64 [4, num_documents]: where each document ends in the shard, its
UTF-8 bytes, its words, and 64 bits of the hash of its text). A document never spans two shards, and ends with
EOS.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llmnorm.data.durable import write_durably
from llmnorm.errors import UserError

MANIFEST = "manifest.json"
STAMPS = "stamps.json"
FORMAT_VERSION = 1
ENDS, BYTES, WORDS, DIGESTS = range(4)
OPEN_MAPS = 128


class _Maps:
    """Memory maps of the files in use, the oldest dropped first: each holds one file descriptor."""

    def __init__(self) -> None:
        self._maps: dict[Path, np.ndarray] = {}

    def get(self, path: Path, dtype: str | None) -> np.ndarray:
        if path not in self._maps:
            if len(self._maps) >= OPEN_MAPS:
                del self._maps[next(iter(self._maps))]
            self._maps[path] = (
                np.memmap(path, dtype, mode="r")
                if dtype
                else np.load(path, mmap_mode="r", allow_pickle=False)
            )
        return self._maps[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"_maps": {}}


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs of whole documents, each inside one shard; joined, they are the dataset. Arrays [num_runs].

    shard, document, token: where a run begins. num_documents, num_tokens: how much it holds.
    """

    shard: np.ndarray
    document: np.ndarray
    token: np.ndarray
    num_documents: np.ndarray
    num_tokens: np.ndarray

    @cached_property
    def tokens_before(self) -> np.ndarray:
        """Tokens of the dataset before each run, and in all: [num_runs + 1]."""
        return np.concatenate(([0], np.cumsum(self.num_tokens)))

    @cached_property
    def documents_before(self) -> np.ndarray:
        return np.concatenate(([0], np.cumsum(self.num_documents)))


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Tokenized documents that `prepare` wrote, or some of them (`select`)."""

    folder: Path
    manifest: dict[str, Any]
    _runs: _Runs
    _maps: _Maps = field(default_factory=_Maps, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> TokenDataset:
        """Open a prepared folder. Raises `UserError` if it is not one, or a shard is missing or truncated."""
        folder = Path(folder)
        remedy = f"delete {folder} and start again to have it prepared anew"
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / MANIFEST} cannot be read ({error}); {remedy}") from error
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder} has format version {version}, this program reads {FORMAT_VERSION}; {remedy}"
            )
        for entry in (file for shard in manifest["shards"] for file in shard["files"]):
            path = folder / entry["name"]
            size = path.stat().st_size if path.is_file() else None
            if size != entry["size"]:
                found = "is missing" if size is None else f"holds {size} bytes instead of {entry['size']}"
                raise UserError(f"shard {path} {found}: it was truncated or altered on disk; {remedy}")
        counts = [(shard["documents"], shard["tokens"]) for shard in manifest["shards"]]
        documents, tokens = np.array(counts, np.int64).T
        filled = np.flatnonzero(documents)
        zeros = np.zeros_like(filled)
        return cls(folder, manifest, _Runs(filled, zeros, zeros, documents[filled], tokens[filled]))

    @property
    def num_tokens(self) -> int:
        """Tokens in all, one EOS for each document included."""
        return int(self._runs.tokens_before[-1])

    @property
    def num_documents(self) -> int:
        return int(self._runs.documents_before[-1])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' text."""
        return self.manifest["bytes"] if self._whole else int(self.document_bytes.sum())

    @property
    def num_words(self) -> int:
        """Words of the documents' text: runs of characters that are not whitespace."""
        return self.manifest["words"] if self._whole else int(self.document_words.sum())

    @property
    def eos_token_id(self) -> int:
        return self.manifest["eos_token_id"]

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Where each document begins in the stream of tokens: int64 [num_documents]."""
        starts = []
        for run, shift in enumerate(self._runs.tokens_before[:-1] - self._runs.token):
            starts.append(self._runs.tokens_before[run : run + 1])
            starts.append(self._column(run, ENDS)[:-1].astype(np.int64) + shift)
        return np.concatenate(starts)

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document: int64 [num_documents]."""
        return self._documents(BYTES)

    @cached_property
    def document_words(self) -> np.ndarray:
        return self._documents(WORDS)

    @cached_property
    def document_digests(self) -> np.ndarray:
        """64 bits of the hash of each document's text: uint64 [num_documents]."""
        return self._documents(DIGESTS).view(np.uint64)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream: int64. Raises IndexError outside it."""
        return self.windows(np.array([start]), stop - start)[0]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of `starts` on: int64 [len(starts), length]."""
        if len(starts) and (length < 0 or starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(f"tokens {starts.min()}..{starts.max() + length} of {self.num_tokens}")
        before = self._runs.tokens_before
        windows = np.empty((len(starts), length), np.int64)
        first_runs = np.searchsorted(before, starts, side="right") - 1
        for row, position, run in zip(windows, starts.tolist(), first_runs.tolist(), strict=True):
            filled = 0
            while filled < length:
                offset = position + filled - int(before[run])
                count = min(length - filled, int(self._runs.num_tokens[run]) - offset)
                begin = int(self._runs.token[run]) + offset
                row[filled : filled + count] = self._shard(run)[begin : begin + count]
                filled, run = filled + count, run + 1
        return windows

    def document_spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where documents begin and end in the stream, EOS included: two int64 [len(documents)]."""
        starts, stops = np.empty(len(documents), np.int64), np.empty(len(documents), np.int64)
        runs = np.searchsorted(self._runs.documents_before, documents, side="right") - 1
        for run in np.unique(runs).tolist():
            rows = np.flatnonzero(runs == run)
            ends = self._column(run, ENDS)
            number = documents[rows] - self._runs.documents_before[run]
            before = np.where(number, ends[number - 1].astype(np.int64), self._runs.token[run])
            shift = self._runs.tokens_before[run] - self._runs.token[run]
            starts[rows] = before + shift
            stops[rows] = ends[number].astype(np.int64) + shift
        return starts, stops

    def document_begins(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Which tokens of windows are the first of a document: bool [len(starts), length]."""
        begins = np.zeros((len(starts), length), np.bool_)
        bounds = self._runs.tokens_before
        rows = np.arange(len(starts))
        runs = np.searchsorted(bounds, starts, side="right") - 1
        while len(rows):
            for run in np.unique(runs).tolist():
                these = rows[runs == run]
                inside = these[starts[these] <= bounds[run]]
                begins[inside, bounds[run] - starts[inside]] = True
                ends = self._column(run, ENDS)[:-1]
                shift = bounds[run] - self._runs.token[run]
                # Keys of the array's own type: any other makes searchsorted convert the whole array.
                keys = np.maximum(np.stack((starts[these], starts[these] + length)) - shift, 0)
                low, high = np.searchsorted(ends, keys.astype(ends.dtype))
                counts = high - low
                found = np.arange(counts.sum()) + np.repeat(low - (np.cumsum(counts) - counts), counts)
                row = np.repeat(these, counts)
                begins[row, ends[found].astype(np.int64) + shift - starts[row]] = True
            goes_on = starts[rows] + length > bounds[runs + 1]
            rows, runs = rows[goes_on], runs[goes_on] + 1
        return begins

    def select(self, documents: np.ndarray) -> TokenDataset:
        """The documents where the boolean array [num_documents] is true, in order, without copying tokens."""
        columns: list[np.ndarray] = []
        for run in range(len(self._runs.shard)):
            first = int(self._runs.documents_before[run])
            chosen = documents[first : first + int(self._runs.num_documents[run])]
            edges = np.flatnonzero(np.diff(np.concatenate(([0], chosen, [0]))))
            begin, end = edges[::2], edges[1::2]
            ends = np.concatenate(([self._runs.token[run]], self._column(run, ENDS).astype(np.int64)))
            shard = np.full(len(begin), self._runs.shard[run])
            columns.append(
                np.stack(
                    [
                        shard,
                        begin + self._runs.document[run],
                        ends[begin],
                        end - begin,
                        ends[end] - ends[begin],
                    ]
                )
            )
        return TokenDataset(self.folder, self.manifest, _Runs(*np.concatenate(columns, axis=1)))

    def verify(self, tokenizer: Any, vocab_size: int) -> None:
        """Check that these tokens are the tokenizer's, unaltered, and below `vocab_size`.

        A file whose size and modification time are those of its last check is trusted; others are read and
        hashed. Raises `UserError` naming the tokenizer, or the shard and what is wrong with it.
        """
        from llmnorm.data.tokenizer import tokenizer_fingerprint

        fingerprint = tokenizer_fingerprint(tokenizer)
        if fingerprint != self.manifest["tokenizer_hash"]:
            raise UserError(
                f"{self.folder} was prepared with another tokenizer (its hash is "
                f"{self.manifest['tokenizer_hash'][:12]}, this one's {fingerprint[:12]}); give "
                "data.tokenizer the one it was prepared with, or delete the folder to have it prepared anew"
            )
        stamps = read_stamps(self.folder)
        for shard in self.manifest["shards"]:
            for entry in shard["files"]:
                path = self.folder / entry["name"]
                if stamps.get(entry["name"]) != stamp(path):
                    self._check_content(path, entry["sha256"], vocab_size)
        self.check_vocabulary(vocab_size)
        with suppress(OSError):
            write_stamps(self.folder, self.manifest)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that every token is below `vocab_size`. Raises `UserError` naming the shard that is not."""
        for shard in self.manifest["shards"]:
            if shard["largest_id"] >= vocab_size:
                raise beyond_vocabulary(
                    f"shard {self.folder / shard['files'][0]['name']}", shard["largest_id"], vocab_size
                )

    def _check_content(self, path: Path, sha256: str, vocab_size: int) -> None:
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() == sha256:
                return
        if path.suffix == ".bin":
            largest = int(np.memmap(path, self.manifest["dtype"], mode="r").max())
            if largest >= vocab_size:
                raise beyond_vocabulary(f"shard {path}", largest, vocab_size)
        raise UserError(
            f"shard {path} was altered on disk: its SHA-256 is not the manifest's; delete {self.folder} "
            "and start again to have it prepared anew"
        )

    @property
    def _whole(self) -> bool:
        return self.num_documents == self.manifest["documents"]

    def _shard(self, run: int) -> np.ndarray:
        entry = self.manifest["shards"][int(self._runs.shard[run])]["files"][0]
        return self._maps.get(self.folder / entry["name"], self.manifest["dtype"])

    def _column(self, run: int, column: int) -> np.ndarray:
        entry = self.manifest["shards"][int(self._runs.shard[run])]["files"][1]
        first = int(self._runs.document[run])
        table = self._maps.get(self.folder / entry["name"], None)
        return table[column, first : first + int(self._runs.num_documents[run])]

    def _documents(self, column: int) -> np.ndarray:
        return np.concatenate([self._column(run, column) for run in range(len(self._runs.shard))]).view(
            np.int64
        )


def beyond_vocabulary(place: str, token_id: int, vocab_size: int) -> UserError:
    """The error for a token without a row in the embedding."""
    return UserError(
        f"{place} holds token id {token_id}, beyond the vocabulary of {vocab_size}; set model.vocab_size "
        "above it, or if a prepared file was altered delete its folder to have it prepared anew"
    )


def stamp(path: Path) -> list[int]:
    """Size and modification time, which change with the content."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def read_stamps(folder: Path) -> dict[str, list[int]]:
    try:
        return json.loads((folder / STAMPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_stamps(folder: Path, manifest: dict[str, Any]) -> None:
    """Note that every file of the folder now has the content that the manifest says."""
    names = [entry["name"] for shard in manifest["shards"] for entry in shard["files"]]
    stamps = {name: stamp(folder / name) for name in names}
    if stamps != read_stamps(folder):
        write_durably(folder / STAMPS, json.dumps(stamps).encode())
