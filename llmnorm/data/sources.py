"""Where text comes from: globs over files and datasets on the Hub, in an order no file system decides."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmnorm.data import hub
from llmnorm.data.documents import CHUNK_BYTES, Chunk, TextGroup, TextPart, text_parts
from llmnorm.data.files import TextFile, open_file
from llmnorm.errors import UserError

UNIT_BYTES = 1 << 26


class Source(Protocol):
    """One file or Hub dataset."""

    @property
    def name(self) -> str:
        """What an error calls it."""

    @property
    def size(self) -> int:
        """Bytes on disk, to share work out and to show progress."""

    @property
    def stamp(self) -> list[int] | None:
        """Size and modification time, which tell unchanged content without reading it; None if unknown."""

    def content_hash(self) -> str:
        """Hex SHA-256 of the content."""

    def chunks(self, text_field: str) -> Iterator[Chunk]:
        """The documents in order; the same chunks each time. Raises `UserError` for what cannot be read."""


@dataclass(frozen=True)
class InlineText:
    """A document, or a part of one, held in memory."""

    name: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def stamp(self) -> list[int] | None:
        return None

    def content_hash(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def chunks(self, text_field: str) -> Iterator[Chunk]:
        yield from text_parts(self.data, self.name, 0, len(self.data))


def resolve_sources(sources: str | Sequence[str | Source], split: str = "train") -> list[Source]:
    """The files behind globs, sorted by path and each once, then the Hub datasets in the order given.

    `**` matches any number of folders; a folder stands for every file in it. `split` is the split of a Hub
    dataset that names none. Sources that are resolved already pass through.
    Raises `UserError` if a pattern matches nothing, a file is empty, or its kind is unknown.
    """
    given = [sources] if isinstance(sources, str) else list(sources)
    patterns = [source for source in given if isinstance(source, str)]
    paths = {path for pattern in patterns if not pattern.startswith(hub.PREFIX) for path in _matches(pattern)}
    return [
        *(source for source in given if not isinstance(source, str)),
        *(open_file(path) for path in sorted(paths, key=Path.as_posix)),
        *(hub.HubDataset.parse(spec, split) for spec in patterns if spec.startswith(hub.PREFIX)),
    ]


def _matches(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        expanded = expanded / "**" / "*"
    if expanded.is_file():  # a file may be called `notes[1].txt`, which as a pattern is another name
        return [expanded]
    # Path.glob takes no absolute pattern, so that it cannot read what users write.
    found = map(Path, glob.glob(str(expanded), recursive=True))  # noqa: PTH207
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise UserError(
            f"data files {pattern!r} match nothing (seen from {Path.cwd()}); check the path, and quote the "
            "pattern in the shell so that ** reaches llmnorm"
        )
    return files


@dataclass(frozen=True)
class Unit:
    """What interrupted work is taken up at, without reading the units before: a source, or a run of .txt."""

    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        return sum(source.size for source in self.sources)

    def chunks(self, text_field: str) -> Iterator[Chunk]:
        """The sources' chunks, with small .txt documents joined to about `CHUNK_BYTES`.

        A part of a long document that goes on stands alone, so that a shard can end before the document.
        """
        group: list[TextPart] = []
        for source in self.sources:
            for chunk in source.chunks(text_field):
                if not isinstance(chunk, TextPart):
                    yield chunk
                    continue
                if group and not chunk.closes:
                    yield TextGroup(group)
                    group = []
                group.append(chunk)
                if not chunk.closes or sum(part.disk_bytes for part in group) >= CHUNK_BYTES:
                    yield TextGroup(group)
                    group = []
        if group:
            yield TextGroup(group)


def plan_units(sources: Sequence[Source]) -> list[Unit]:
    """Group neighboring .txt files up to `UNIT_BYTES`; every other source stands alone."""
    units: list[Unit] = []
    group: list[Source] = []
    for source in sources:
        is_text = isinstance(source, TextFile)
        if group and (not is_text or sum(member.size for member in group) >= UNIT_BYTES):
            units.append(Unit(tuple(group)))
            group = []
        if is_text:
            group.append(source)
        else:
            units.append(Unit((source,)))
    if group:
        units.append(Unit(tuple(group)))
    return units
