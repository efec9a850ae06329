"""A dataset of the Hugging Face Hub, read from its local cache after one download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmnorm.data.documents import Chunk
from llmnorm.data.files import ROWS_PER_READ, check_column, row_chunks
from llmnorm.errors import UserError

PREFIX = "hf:"


@dataclass(frozen=True)
class HubDataset:
    """`hf:name[:config[:split]]`: one document in each row."""

    dataset: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, spec: str, split: str) -> HubDataset:
        """Read `hf:name[:config[:split]]`; `split` is used where the spec names none."""
        dataset, *rest = spec.removeprefix(PREFIX).split(":")
        if not dataset or len(rest) > 2:
            raise UserError(f"{spec!r} is not a Hub dataset; write hf:organization/name:configuration:split")
        config, chosen = [*rest, "", ""][:2]
        return cls(dataset, config or None, chosen or split)

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.dataset}:{self.config or ''}:{self.split}"

    @property
    def size(self) -> int:
        return sum(Path(file["filename"]).stat().st_size for file in self._table.cache_files)

    @property
    def stamp(self) -> list[int] | None:
        return None

    def content_hash(self) -> str:
        # The cache folder is named after the dataset's revision and build, and its files are never rewritten.
        table = self._table
        builds = sorted({Path(file["filename"]).parent.name for file in table.cache_files})
        identity = [self.name, len(table), table.features.to_dict(), builds or table._fingerprint]
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def chunks(self, text_field: str) -> Iterator[Chunk]:
        table = self._table
        check_column(self.name, text_field, table.column_names, len(table))
        batches = table.select_columns([text_field]).with_format("arrow").iter(ROWS_PER_READ)
        texts = (batch.column(text_field).to_pylist() for batch in batches)
        yield from row_chunks(self.name, text_field, texts, self.size // len(table))

    def stream(self) -> Any:
        """The same rows as a `datasets.IterableDataset`, fetched as they are read."""
        return self._load(streaming=True)

    @cached_property
    def _table(self) -> Any:
        return self._load(streaming=False)

    def _load(self, streaming: bool) -> Any:
        import datasets

        # The base class of the Hub client's transport: httpx's or, from huggingface_hub 2, httpx2's.
        from huggingface_hub.errors import HTTPError

        try:
            return datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=streaming)
        except (OSError, ValueError, RuntimeError, HTTPError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"{self.name} could not be loaded: {reason}. The Hub must be reachable, or the dataset "
                "already in the local cache (HF_HOME); check the name, configuration and split, or "
                "download its files elsewhere and give their paths"
            ) from error
