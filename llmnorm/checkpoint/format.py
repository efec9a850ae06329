"""The files of one checkpoint: safetensors shards, and an index that says what is where.

    step_1000/
      shard-00000-of-00002.safetensors   what rank 0 wrote: one entry per tensor it holds a block of
      index.json                         tensor -> global shape, dtype, blocks; file -> size, sha256
      state.json, config.yaml, ...       text

Every byte that is read back is plain data: nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmnorm.errors import UserError

FORMAT = 1
INDEX_NAME = "index.json"
STATE_NAME = "state.json"
# Hashing and writing release the interpreter lock for one chunk at a time. A chunk of some milliseconds keeps
# the lock's hand-overs rare beside the training thread and the copy in the page cache small.
CHUNK_BYTES = 8 << 20

# safetensors' names of the data types (https://github.com/huggingface/safetensors, `Dtype`).
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Block:
    """Where one block of a tensor lies: entry `key` of `file` holds `[offset, offset + shape)`."""

    file: str
    key: str
    offset: list[int]
    shape: list[int]


@dataclass
class TensorRecord:
    """One logical tensor. `placements` and `device` tell how the run that saved it held it."""

    shape: list[int]
    dtype: str
    device: str
    placements: list[str] | None
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class FileRecord:
    size: int
    sha256: str


@dataclass
class Index:
    step: int
    tensors: dict[str, TensorRecord]
    files: dict[str, FileRecord] = field(default_factory=dict)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def index_to_text(index: Index) -> str:
    """JSON, one line per tensor and file, with a checksum, so that an altered index is noticed too."""
    body = {
        "format": FORMAT,
        "step": index.step,
        "tensors": {
            name: {**vars(record), "blocks": [vars(block) for block in record.blocks]}
            for name, record in index.tensors.items()
        },
        "files": {name: vars(record) for name, record in index.files.items()},
    }
    # By hand, because json's own indentation holds the interpreter lock for many milliseconds.
    return _lines({**body, "sha256": _checksum(body)}, depth=2)


def _lines(value: Any, depth: int) -> str:
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    return (
        "{\n"
        + ",\n".join(f"{json.dumps(key)}: {_lines(item, depth - 1)}" for key, item in value.items())
        + "\n}"
    )


class DamagedIndex(Exception):
    """The index of a checkpoint is missing or is not what was written."""


def read_index(checkpoint: Path) -> Index:
    """The index of a checkpoint directory.

    Raises DamagedIndex if it is missing, truncated or altered, and UserError if a later version of this
    program wrote it.
    """
    try:
        body = json.loads((checkpoint / INDEX_NAME).read_text(encoding="utf-8"))
        checksum = body.pop("sha256")
    except (OSError, NotADirectoryError) as error:
        raise DamagedIndex(f"{INDEX_NAME} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedIndex(f"{INDEX_NAME} is truncated or altered (not a complete index)") from error
    if checksum != _checksum(body):
        raise DamagedIndex(f"{INDEX_NAME} is altered (its content does not match its checksum)")
    if body["format"] != FORMAT:
        raise UserError(
            f"{checkpoint / INDEX_NAME} has format {body['format']}, and this version of llmnorm "
            f"reads format {FORMAT}; use the version that wrote it, or set output_dir to a new folder"
        )
    tensors = {
        name: TensorRecord(**{**record, "blocks": [Block(**block) for block in record["blocks"]]})
        for name, record in body["tensors"].items()
    }
    files = {name: FileRecord(**record) for name, record in body["files"].items()}
    return Index(body["step"], tensors, files)


def file_damage(path: Path, record: FileRecord) -> str | None:
    """Why the file is not what was written, or None where every byte is."""
    try:
        size = path.stat().st_size
        if size < record.size:
            return f"{path.name} is truncated ({size} of {record.size} bytes)"
        if size > record.size:
            return f"{path.name} is altered ({size} bytes instead of {record.size})"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return (
        None if digest == record.sha256 else f"{path.name} is altered (its sha256 does not match the index)"
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write the pieces to a new file and flush it to the disk, hashing on the way: no byte is read back."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("xb", buffering=0) as file:
            for piece in pieces:
                for start in range(0, len(piece), CHUNK_BYTES):
                    rest = memoryview(piece)[start : start + CHUNK_BYTES]
                    digest.update(rest)
                    size += len(rest)
                    while rest:
                        rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError as error:  # a failed write() does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileRecord(size, digest.hexdigest())


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write local tensors (any device, any layout in memory) as a new safetensors file. Raises OSError."""
    # Wide types first, so that every tensor starts at a multiple of its element size in the memory map.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))

    def pieces() -> Iterable[bytes | memoryview]:
        yield _header(ordered)
        for tensor in ordered.values():
            yield _bytes_of(tensor)

    return _write(path, pieces())


def write_text(path: Path, text: str) -> FileRecord:
    return _write(path, [text.encode()])


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power failure; a file's own fsync does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
