"""Small texts, tokenizers and configs for the data tests."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_cases import SHAKESPEARE, write_jsonl

from llmnorm.data import TokenDataset, load_or_train_tokenizer, prepare


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tokenizer(cache: Path) -> Any:
    """Byte-level BPE of 400 tokens, trained on the smaller sample."""
    sample = str(SHAKESPEARE / "validation.txt")
    return load_or_train_tokenizer({"train": "bpe", "vocab_size": 400}, sample, cache)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """200 documents of 1 to 400 words, with digits, accents, emoji and odd spaces."""
    words = (SHAKESPEARE / "validation.txt").read_text(encoding="utf-8").split(" ")[:8000]
    words += ["42", "1999,", "naïve", "日本語", "🙂", "\t", "\u00a0x", "", "\r\n"] * 20
    generator = random.Random(0)
    return [" ".join(generator.choices(words, k=generator.randint(1, 400))) for _ in range(200)]


def cut_small(patch: pytest.MonkeyPatch) -> None:
    for module in ("files", "sources"):
        patch.setattr(f"llmnorm.data.{module}.CHUNK_BYTES", 20_000)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of about 20 kB, so that small texts are cut and shared out as large ones are."""
    cut_small(monkeypatch)


@pytest.fixture(scope="session")
def prepared_folder(tokenizer: Any, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "documents.jsonl", documents)
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        return prepare(str(source), tokenizer, folder, workers=1, progress=False, shard_tokens=5000).folder


@pytest.fixture
def dataset(prepared_folder: Path, tmp_path: Path) -> TokenDataset:
    """The documents in several shards, in a folder of the test's own."""
    folder = tmp_path / "dataset"
    shutil.copytree(prepared_folder, folder)
    return TokenDataset.open(folder)


@pytest.fixture
def data_config(cache: Path, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """A `data` section with its defaults, changed by keyword."""

    def make(**changes: Any) -> SimpleNamespace:
        defaults: dict[str, Any] = {
            "validation_files": None,
            "validation_fraction": 0.0,
            "text_field": "text",
            "resampling": None,
            "tokenizer": {"train": "bpe", "vocab_size": 400},
            "sequence_length": 32,
            "recipe": "packed",
            "document_masking": False,
            "prepared_dir": str(tmp_path / "prepared"),
            "prepare_workers": 1,
            "num_workers": 0,
            "streaming": False,
        }
        return SimpleNamespace(**{**defaults, **changes})

    return make
