"""From a config's data section to tokenizer, samples and validation sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_cases import SHAKESPEARE, naive_tokens, write_jsonl

from llmnorm.data import StreamingSamples, TrainingSamples, prepare_data, training_loader
from llmnorm.data.content import REMEMBERED, content_hashes
from llmnorm.data.holdout import held_out_documents, split_document, split_documents
from llmnorm.data.sources import InlineText, resolve_sources
from llmnorm.errors import UserError

TRAIN, VALIDATION = (str(SHAKESPEARE / f"{name}.txt") for name in ("train", "validation"))
SHARED = Path(__file__).parents[3] / "shared" / "data"


def texts_of(data, dataset) -> list[str]:
    starts, stops = dataset.document_spans(np.arange(dataset.num_documents))
    return [data.tokenizer.decode(dataset.read(a, b - 1)) for a, b in zip(starts, stops, strict=True)]


def test_text_files_become_training_and_validation_data(data_config):
    data = prepare_data(data_config(train_files=VALIDATION, validation_files=VALIDATION), 7, progress=False)
    assert isinstance(data.samples, TrainingSamples)
    assert (data.samples.seed, data.samples.sequence_length) == (7, 32)
    assert data.samples.pad_token_id == data.tokenizer.pad_token_id == 0
    assert list(data.validation) == ["validation"]
    assert texts_of(data, data.train) == [Path(VALIDATION).read_text(encoding="utf-8")]
    loader = training_loader(data.samples, start=0, global_batch_size=4, micro_batch_size=4, num_workers=0)
    assert next(loader).micro_batches[0]["input_ids"].shape == (4, 32)


def test_several_validation_sets_by_name(data_config, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    write_jsonl(tmp_path / "b.jsonl", ["three"])
    files = {"first": str(tmp_path / "a.jsonl"), "second": [str(tmp_path / "b.jsonl")]}
    data = prepare_data(data_config(train_files=VALIDATION, validation_files=files), 0, progress=False)
    assert {name: texts_of(data, part) for name, part in data.validation.items()} == {
        "first": ["one", "two"],
        "second": ["three"],
    }


def test_documents_are_held_out_the_same_each_time(data_config, documents, tmp_path):
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    config = data_config(train_files=str(source), validation_fraction=0.1)
    data = prepare_data(config, 0, progress=False)
    train, held_out = texts_of(data, data.train), texts_of(data, data.validation["validation"])
    assert len(held_out) == 20
    assert sorted(train + held_out) == sorted(documents) and not set(train) & set(held_out)
    assert data.validation["validation"].num_bytes == sum(len(text.encode()) for text in held_out)
    # Another seed, order and file name: the same documents.
    other = write_jsonl(tmp_path / "other.jsonl", documents[::-1])
    again = prepare_data(data_config(train_files=str(other), validation_fraction=0.1), 1, progress=False)
    assert texts_of(again, again.validation["validation"]) == held_out[::-1]


def test_held_out_documents_stay_as_the_text_grows():
    digests = np.random.default_rng(0).integers(0, 1 << 63, 1000).astype(np.uint64)
    before = held_out_documents(digests[:900], 0.1)
    after = held_out_documents(digests, 0.1)
    assert before.sum() == 90 and after.sum() == 100
    assert (before & ~after[:900]).sum() < 20  # a new random choice would exchange 81 of 90
    copies = np.repeat(digests[:10], 3)
    assert all(len(set(group)) == 1 for group in held_out_documents(copies, 0.1).reshape(10, 3))
    for n, fraction, count in ((2, 0.01, 1), (2, 0.99, 1), (10, 0.25, 2), (3, 0.5, 2)):
        assert held_out_documents(digests[:n], fraction).sum() == count
    assert held_out_documents(np.zeros(4, np.uint64), 0.5).sum() == 2


def test_of_few_documents_the_tails_are_held_out(data_config, tmp_path):
    """Three books and a fraction of 0.1: a whole one would be a third of the text. Ten are chosen whole."""
    books = [f"{word} line {i}\n" * 100 for i, word in enumerate(("first", "second", "third"))] + ["tiny"]
    folder = tmp_path / "books"
    folder.mkdir()
    for i, book in enumerate(books):
        (folder / f"{i}.txt").write_text(book, encoding="utf-8")
    config = data_config(train_files=str(folder / "*.txt"), validation_fraction=0.1)
    data = prepare_data(config, 0, progress=False)
    heads, tails = texts_of(data, data.train), texts_of(data, data.validation["validation"])
    assert heads == [book[: len(book) * 9 // 10] for book in books[:3]] + ["tiny"]
    assert tails == [book[len(book) * 9 // 10 :] for book in books[:3]]
    for i in range(4, 10):
        (folder / f"{i}.txt").write_text(books[0] + str(i), encoding="utf-8")
    many = prepare_data(config, 0, progress=False)
    (held_out,) = texts_of(many, many.validation["validation"])
    assert held_out in [*books, *(books[0] + str(i) for i in range(4, 10))]


def test_documents_too_large_to_hold_or_too_short_to_cut_stay_whole(data_config, tmp_path, monkeypatch):
    config = data_config(train_files=str(tmp_path / "*.txt"), validation_fraction=0.3)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 20, encoding="utf-8")
    monkeypatch.setattr("llmnorm.data.holdout.FEW_BYTES", 100)
    data = prepare_data(config, 0, progress=False)
    assert (data.train.num_documents, data.validation["validation"].num_documents) == (2, 1)
    assert split_documents([b"ab", b"c"], 0.2) == (
        [InlineText("training text", t) for t in (b"ab", b"c")],
        [],
    )


def test_of_a_single_document_the_tail_is_held_out(data_config):
    text = Path(VALIDATION).read_text(encoding="utf-8")
    config = data_config(train_files=VALIDATION, validation_fraction=0.2)
    data = prepare_data(config, 0, progress=False)
    (head,), (tail,) = texts_of(data, data.train), texts_of(data, data.validation["validation"])
    assert head + tail == text and head.endswith("\n")
    assert abs(len(tail) / len(text) - 0.2) < 0.005


def test_a_document_is_cut_between_lines_or_characters():
    for text, tail in (("one\ntwo\nthree\n", "three\n"), ("äöü" * 10, "ü" + "äöü" * 4), ("ab\n", "\n")):
        head, cut = split_document(text.encode(), 0.45)
        assert (head.data + cut.data).decode() == text and cut.data.decode() == tail


def test_streaming_gives_a_stream(data_config, tmp_path, documents):
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    config = data_config(train_files=str(source), validation_files=VALIDATION, streaming=True)
    data = prepare_data(config, 3, progress=False)
    assert data.train is None and isinstance(data.samples, StreamingSamples) and data.samples.seed == 3
    assert data.validation["validation"].num_documents == 1
    loader = training_loader(data.samples, start=0, global_batch_size=4, micro_batch_size=4, num_workers=0)
    assert next(loader).micro_batches[0]["labels"].shape == (4, 32)


def test_a_model_with_too_few_rows_is_refused(data_config, tmp_path, documents):
    data = prepare_data(data_config(train_files=VALIDATION, validation_files=VALIDATION), 0, progress=False)
    data.check_vocabulary(400)
    with pytest.raises(
        UserError, match=r"shard .*shard-00000.bin holds token id \d+, beyond the vocabulary of 90"
    ):
        data.check_vocabulary(90)
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    config = data_config(train_files=str(source), streaming=True, tokenizer=data.tokenizer.name_or_path)
    for vocab_size in (400, 90):
        streamed = prepare_data(config, 0, progress=False)
        streamed.check_vocabulary(vocab_size)
        loader = training_loader(streamed.samples, start=0, global_batch_size=4, micro_batch_size=4)
        if vocab_size == 400:
            next(loader)
        else:
            with pytest.raises(UserError, match=r"a streamed document holds token id \d+, beyond the vocab"):
                next(loader)
        loader.close()


def test_contradictions_in_the_config(data_config):
    with pytest.raises(
        UserError, match=r"data.validation_fraction=0.1 and data.validation_files are both set"
    ):
        prepare_data(data_config(train_files=TRAIN, validation_files=TRAIN, validation_fraction=0.1), 0)
    with pytest.raises(
        UserError, match=r"data.validation_fraction=0.1 cannot be held out with data.streaming"
    ):
        prepare_data(data_config(train_files=TRAIN, streaming=True, validation_fraction=0.1), 0)
    with pytest.raises(
        UserError, match=r"data.tokenizer=\{train: ...\} would fetch the whole of a Hub dataset"
    ):
        prepare_data(data_config(train_files="hf:org/set:en", streaming=True), 0)
    with pytest.raises(UserError, match=r"fewer than one window of data.sequence_length \+ 1 = 1000001"):
        prepare_data(data_config(train_files=VALIDATION, sequence_length=10**6), 0, progress=False)


def test_an_altered_shard_is_found_at_the_start(data_config):
    config = data_config(train_files=VALIDATION)
    data = prepare_data(config, 0, progress=False)
    path = data.train.folder / "shard-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[3] = 65535
    ids.tofile(path)
    with pytest.raises(
        UserError, match=r"shard-00000.bin holds token id 65535, beyond the vocabulary of 400"
    ):
        prepare_data(config, 0, progress=False)


def test_file_hashes_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    source = tmp_path / "a.txt"
    source.write_text("one")
    os.utime(source, ns=(10**18, 10**18))
    sources = resolve_sources(str(source))
    (first,) = content_hashes(sources, tmp_path / "cache")
    assert (tmp_path / "cache" / REMEMBERED).exists()
    with monkeypatch.context() as patch:
        patch.setattr(type(sources[0]), "content_hash", None)  # reading again would fail
        assert content_hashes(sources, tmp_path / "cache") == [first]
    source.write_text("two")
    (second,) = content_hashes(sources, tmp_path / "cache")
    assert second != first
    # Just written: the same size could be written again within the clock's step, so it is not remembered.
    source.write_text("six")
    assert content_hashes(sources, tmp_path / "cache") != [second]


RANK = """
import sys
from types import SimpleNamespace
from llmnorm.data import preparing, pipeline
tokenize = preparing._tokenize
def spy(*arguments):
    print("tokenizes", flush=True)
    tokenize(*arguments)
preparing._tokenize = spy
config = SimpleNamespace(
    train_files=sys.argv[1], validation_files=None, validation_fraction=0.0, text_field="text",
    tokenizer=sys.argv[2], sequence_length=32, recipe="packed", document_masking=False,
    prepared_dir=sys.argv[3], prepare_workers=1, num_workers=0, streaming=False, resampling=None,
)
data = pipeline.prepare_data(config, 0)
print(data.train.folder.name, data.train.num_tokens)
"""


def test_of_the_processes_of_a_node_the_first_writes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", RANK, TRAIN, str(tmp_path / "tokenizer"), str(tmp_path / "prepared")]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "LOCAL_RANK": str(rank)}
        )
        for rank in (1, 0)
    ]
    others, first = (process.communicate(timeout=100)[0].split("\n") for process in ranks)
    assert [process.returncode for process in ranks] == [0, 0]
    assert first[0] == "tokenizes" and first[1:] == others
    assert int(others[0].split()[1]) == len(
        naive_tokens(tokenizer, [Path(TRAIN).read_text(encoding="utf-8")])
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "train.jsonl.xz").exists(), reason="needs the large texts, which do not ship"
)
@pytest.mark.parametrize(("name", "num_documents"), [("validation", 164), ("train", 12232)])
def test_the_large_texts_go_through_whole(data_config, name, num_documents):
    config = data_config(
        train_files=str(SHARED / f"{name}.jsonl.xz"),
        tokenizer={"train": "bpe", "vocab_size": 4096},
        prepare_workers=None,
    )
    data = prepare_data(config, 0, progress=False)
    assert data.train.num_documents == num_documents
    assert data.train.num_bytes == int(data.train.document_bytes.sum())
    document = data.train.num_documents // 2
    (start,), (stop,) = data.train.document_spans(np.array([document]))
    text = data.tokenizer.decode(data.train.read(start, stop - 1))
    assert len(text.encode()) == data.train.document_bytes[document]
