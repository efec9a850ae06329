"""Text to token shards: once, in parallel, and from where it stopped if it was interrupted.

The folder is named after its content: the hashes of the source files and of the tokenizer, the text field
and the format. Work happens in `<name>.partial`, which is renamed when it is complete, so that a folder
with the final name is always whole. A shard counts as finished once its record is written; after a kill,
finished shards are kept and reading goes on with the source of the last one. The bytes do not depend on the
number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

import llmnorm
from llmnorm.data.content import content_hashes
from llmnorm.data.dataset import FORMAT_VERSION, MANIFEST, TokenDataset, write_stamps
from llmnorm.data.documents import Chunk
from llmnorm.data.durable import (
    cannot_write,
    exclusive,
    give_way,
    sync_folder,
    writable_folder,
    write_durably,
)
from llmnorm.data.encoding import EncoderPool
from llmnorm.data.progress import Progress
from llmnorm.data.shards import ShardWriter
from llmnorm.data.sources import Source, Unit, plan_units, resolve_sources
from llmnorm.data.tokenizer import tokenizer_fingerprint, vocabulary_size
from llmnorm.data.worker import available_cpus
from llmnorm.errors import UserError

SHARD_TOKENS = 1 << 24


def prepare(
    sources: str | Sequence[str | Source],
    tokenizer: Any,
    prepared_dir: str | Path,
    *,
    text_field: str = "text",
    workers: int | None = None,
    progress: bool = True,
    split: str = "train",
    leader: bool = True,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenDataset:
    """Tokenize `sources` into a folder of `prepared_dir`, or open that folder if it is there.

    sources: globs, folders and Hub datasets (`resolve_sources`); `split` is for Hub datasets that name none.
    tokenizer: a fast tokenizer with an EOS token. Each document becomes its ids without special tokens,
    then EOS.
    workers: documents that are tokenized at a time; None for one per CPU this process may use.
    leader: whether this process should do the work where several start together; the others wait for it.
    shard_tokens: a shard ends with the chunk of text (about 1 MiB) that brings it to this many tokens.

    Raises `UserError` for sources that cannot be read as text and for a folder that cannot be written.
    """
    found = resolve_sources(sources, split)
    root = Path(prepared_dir).expanduser()
    source_hash = hashlib.sha256("\n".join(content_hashes(found, root)).encode()).hexdigest()
    header = {
        "format_version": FORMAT_VERSION,
        "tokenizer_hash": tokenizer_fingerprint(tokenizer),
        "source_hash": source_hash,
        "text_field": text_field,
        "eos_token_id": tokenizer.eos_token_id,
        "shard_tokens": shard_tokens,
    }
    folder = root / hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:32]
    if not folder.is_dir():
        writable_folder(root)
        lock = folder.with_name(folder.name + ".lock")
        if not leader:
            give_way(lock, folder.is_dir)
        with exclusive(lock):
            if not folder.is_dir():
                _tokenize(
                    found,
                    tokenizer,
                    folder,
                    header,
                    workers or available_cpus(),
                    progress and leader,
                )
    return TokenDataset.open(folder)


def _tokenize(
    sources: Sequence[Source],
    tokenizer: Any,
    folder: Path,
    header: dict[str, Any],
    workers: int,
    progress: bool,
) -> None:
    vocab_size = vocabulary_size(tokenizer)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    units = plan_units(sources)
    sizes = [unit.size for unit in units]
    partial = writable_folder(folder.with_name(folder.name + ".partial"))
    try:
        writer = ShardWriter(partial, dtype, header["shard_tokens"])
        pool = EncoderPool(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id, dtype, workers)
        read = sum(sizes[: writer.next[0]])
        with pool, Progress("tokenizing", sum(sizes), shown=progress) as bar:
            chunks = _chunks_from(writer.next, units, header["text_field"])
            for (unit, position, disk_bytes), encoded in pool.encode(chunks):
                writer.append(encoded, (unit, position + 1))
                read += disk_bytes
                bar.update(read, writer.tokens)
        writer.close((len(units), 0))
        if not writer.totals()["documents"]:
            raise UserError(f"{sources[0].name}: all documents are empty; give files that hold text")
        manifest = {
            **header,
            "dtype": dtype,
            "vocab_size": vocab_size,
            "sources": len(sources),
            **writer.totals(),
            "versions": {"llmnorm": llmnorm.__version__, "tokenizers": tokenizers.__version__},
            "shards": writer.shards,
        }
        write_durably(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        write_stamps(partial, manifest)
        writer.remove_records()
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise cannot_write(folder.parent, error) from error


def _chunks_from(
    start: tuple[int, int], units: Sequence[Unit], text_field: str
) -> Iterator[tuple[tuple[int, int, int], Chunk]]:
    """((unit, position, bytes on disk), chunk) from (unit, position) `start` on."""
    for number in range(start[0], len(units)):
        for position, chunk in enumerate(units[number].chunks(text_field)):
            if (number, position) >= start:
                yield (number, position, chunk.disk_bytes), chunk
