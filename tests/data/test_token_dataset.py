"""A prepared set reads as one stream and as documents, whole or in part, and names what was done to it."""

from __future__ import annotations

import json
import os
import pickle
import random

import numpy as np
import pytest
from data_cases import naive_tokens

from llmnorm.data import TokenDataset
from llmnorm.data import dataset as dataset_module
from llmnorm.data.dataset import STAMPS
from llmnorm.errors import UserError


@pytest.fixture(params=["whole", "part"])
def case(request, tokenizer, documents, dataset):
    """A dataset and its documents' tokens: everything, or about half of the documents in short runs."""
    chosen = np.ones(len(documents), np.bool_)
    if request.param == "part":
        chosen = np.random.default_rng(0).random(len(documents)) < 0.5
        dataset = dataset.select(chosen)
    return dataset, [
        naive_tokens(tokenizer, [text]) for text, keep in zip(documents, chosen, strict=True) if keep
    ]


def test_is_the_stream_of_its_documents(case):
    dataset, documents = case
    stream = np.concatenate(documents)
    lengths = np.array([len(document) for document in documents])
    ends = np.cumsum(lengths)
    assert (dataset.num_tokens, dataset.num_documents) == (len(stream), len(documents))
    assert np.array_equal(dataset.document_starts, ends - lengths)
    starts, stops = dataset.document_spans(np.arange(len(documents))[::-1].copy())
    assert np.array_equal(starts, (ends - lengths)[::-1]) and np.array_equal(stops, ends[::-1])
    generator = random.Random(0)
    for _ in range(200):
        start = generator.randint(0, len(stream))
        stop = generator.randint(start, min(len(stream), start + 20_000))
        assert np.array_equal(dataset.read(start, stop), stream[start:stop])
    assert dataset.read(0, 5).dtype == np.int64
    for outside in ((-1, 3), (len(stream) - 2, len(stream) + 1)):
        with pytest.raises(IndexError):
            dataset.read(*outside)


@pytest.mark.parametrize("length", [2, 100, 9000])
def test_windows_tell_where_documents_begin(case, length):
    dataset, documents = case
    stream = np.concatenate(documents)
    begins = np.zeros(len(stream), np.bool_)
    begins[np.cumsum([0] + [len(document) for document in documents[:-1]])] = True
    starts = np.random.default_rng(1).integers(0, len(stream) - length + 1, 60)
    starts[:2] = 0, len(stream) - length
    windows = starts[:, None] + np.arange(length)
    assert np.array_equal(dataset.windows(starts, length), stream[windows])
    assert np.array_equal(dataset.document_begins(starts, length), begins[windows])


def test_a_selection_keeps_counts_and_can_be_narrowed(documents, dataset):
    chosen = np.arange(len(documents)) % 3 == 0
    part, rest = dataset.select(chosen), dataset.select(~chosen)
    assert part.num_tokens + rest.num_tokens == dataset.num_tokens
    assert part.num_bytes == sum(len(text.encode()) for text in documents[::3])
    assert part.num_words == sum(len(text.split()) for text in documents[::3])
    assert np.array_equal(part.document_digests, dataset.document_digests[::3])
    narrowed = part.select(np.arange(part.num_documents) % 2 == 1)
    assert np.array_equal(narrowed.document_bytes, dataset.document_bytes[3::6])
    expected = [
        dataset.read(*span) for span in zip(*dataset.document_spans(np.arange(3, 200, 6)), strict=True)
    ]
    assert np.array_equal(narrowed.read(0, narrowed.num_tokens), np.concatenate(expected))


def test_few_files_are_held_open(dataset, monkeypatch):
    monkeypatch.setattr(dataset_module, "OPEN_MAPS", 3)
    stream = dataset.read(0, dataset.num_tokens)
    starts = np.random.default_rng(0).integers(0, len(stream) - 10, 100)
    assert np.array_equal(dataset.windows(starts, 10), stream[starts[:, None] + np.arange(10)])
    assert len(dataset._maps._maps) == 3


def test_travels_to_another_process_without_its_tokens(dataset):
    stream = dataset.read(0, dataset.num_tokens)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < stream.nbytes / 20
    assert np.array_equal(pickle.loads(pickled).read(0, len(stream)), stream)


def shard_path(dataset: TokenDataset, number: int = 1):
    return dataset.folder / dataset.manifest["shards"][number]["files"][0]["name"]


def test_a_truncated_or_missing_shard_is_named_when_it_is_opened(dataset):
    path = shard_path(dataset)
    size = path.stat().st_size
    os.truncate(path, size - 2)
    with pytest.raises(
        UserError, match=rf"shard .*{path.name} holds {size - 2} bytes instead of {size}.*delete"
    ):
        TokenDataset.open(dataset.folder)
    path.unlink()
    with pytest.raises(UserError, match=rf"shard .*{path.name} is missing"):
        TokenDataset.open(dataset.folder)


def test_a_damaged_or_foreign_manifest_is_named(dataset, tmp_path):
    manifest = dataset.folder / "manifest.json"
    manifest.write_text(json.dumps({**dataset.manifest, "format_version": 99}))
    with pytest.raises(UserError, match=r"has format version 99, this program reads 1"):
        TokenDataset.open(dataset.folder)
    manifest.write_text(manifest.read_text()[:-50])
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        TokenDataset.open(dataset.folder)
    with pytest.raises(UserError, match=r"manifest.json cannot be read"):
        TokenDataset.open(tmp_path / "nothing")


def test_another_tokenizer_is_refused(tokenizer, dataset):
    dataset.verify(tokenizer, 400)
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    other.add_tokens(["zounds"])
    with pytest.raises(
        UserError, match=r"was prepared with another tokenizer \(its hash is .*data.tokenizer"
    ):
        dataset.verify(other, 401)


def test_an_id_beyond_the_vocabulary_is_named(tokenizer, dataset):
    ids = np.memmap(shard_path(dataset), "<u2", mode="r+")
    ids[7] = 60_000
    ids.flush()
    with pytest.raises(
        UserError, match=r"shard-00001.bin holds token id 60000, beyond the vocabulary of 400"
    ):
        TokenDataset.open(dataset.folder).verify(tokenizer, 400)


def test_a_vocabulary_smaller_than_the_text_needs_is_refused(tokenizer, dataset):
    largest = max(shard["largest_id"] for shard in dataset.manifest["shards"])
    dataset.verify(tokenizer, largest + 1)
    with pytest.raises(
        UserError, match=rf"holds token id {largest}, beyond the vocabulary of {largest}; set model"
    ):
        dataset.verify(tokenizer, largest)


@pytest.mark.parametrize("file", [0, 1])
def test_altered_content_is_named(tokenizer, dataset, file):
    path = dataset.folder / dataset.manifest["shards"][1]["files"][file]["name"]
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"shard .*{path.name} was altered on disk"):
        TokenDataset.open(dataset.folder).verify(tokenizer, 400)


def test_files_are_hashed_again_only_where_their_times_say_so(tokenizer, dataset, monkeypatch):
    checked = []
    check = TokenDataset._check_content

    def spy(self, path, sha256, vocab_size):
        checked.append(path.name)
        check(self, path, sha256, vocab_size)

    monkeypatch.setattr(TokenDataset, "_check_content", spy)
    dataset.verify(tokenizer, 400)
    assert checked == []
    os.utime(shard_path(dataset))
    dataset.verify(tokenizer, 400)
    dataset.verify(tokenizer, 400)
    assert checked == ["shard-00001.bin"]
    (dataset.folder / STAMPS).unlink()  # as after a copy
    dataset.verify(tokenizer, 400)
    dataset.verify(tokenizer, 400)
    assert len(checked) == 1 + 2 * len(dataset.manifest["shards"])
