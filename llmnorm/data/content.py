"""Content hashes of source files, remembered by size and modification time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from llmnorm.data.durable import exclusive, write_durably
from llmnorm.data.sources import Source
from llmnorm.errors import UserError

REMEMBERED = "content_hashes.json"
THREADS = 8
# A file written twice within the clock's step can keep its size and time; one this old cannot.
SETTLED_NS = 2_000_000_000


def content_hashes(sources: Sequence[Source], cache_dir: Path) -> list[str]:
    """Hex SHA-256 of each source. What is known from before is kept in `cache_dir`, if that can be written.

    Raises `UserError` for a file that cannot be read.
    """
    memory = cache_dir / REMEMBERED
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with exclusive(cache_dir / (REMEMBERED + ".lock")):
            known = _read(memory)
            hashes, fresh = _hash(sources, known)
            if fresh:
                write_durably(memory, json.dumps({**known, **fresh}).encode())
            return hashes
    except UserError:
        raise
    except OSError:  # a folder of somebody else's: nothing can be remembered there
        return _hash(sources, _read(memory))[0]


def _read(memory: Path) -> dict[str, list[object]]:
    with suppress(OSError, ValueError):
        return json.loads(memory.read_text(encoding="utf-8"))
    return {}


def _hash(
    sources: Sequence[Source], known: dict[str, list[object]]
) -> tuple[list[str], dict[str, list[object]]]:
    now = time.time_ns()
    fresh: dict[str, list[object]] = {}

    def hash_of(source: Source) -> str:
        stamp = source.stamp
        key = os.path.abspath(source.name)  # noqa: PTH100
        if stamp is None:
            return source.content_hash()
        if known.get(key, [])[:2] == stamp:
            return str(known[key][2])
        content = source.content_hash()
        if stamp[1] < now - SETTLED_NS:
            fresh[key] = [*stamp, content]
        return content

    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(hash_of, sources)), fresh
