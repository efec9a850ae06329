"""Preparing gives exactly the tokenizer's ids, however it is shared out, cut short or repeated."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_cases import SHAKESPEARE, any_text, naive_tokens, write_jsonl

from llmnorm.data import TokenDataset, prepare
from llmnorm.data import documents as documents_module
from llmnorm.data import preparing as preparing_module
from llmnorm.data.dataset import STAMPS
from llmnorm.errors import UserError


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file of a prepared folder but the modification times it notes."""
    files = [path for path in folder.iterdir() if path.name != STAMPS]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_holds_each_document_encoded_then_eos(tokenizer, documents, dataset):
    expected = naive_tokens(tokenizer, documents)
    assert np.array_equal(dataset.read(0, dataset.num_tokens), expected)
    assert len(dataset.manifest["shards"]) > 5
    assert dataset.num_documents == len(documents)
    assert dataset.num_words == sum(len(text.split()) for text in documents)
    assert dataset.document_bytes.tolist() == [len(text.encode()) for text in documents]
    assert dataset.document_words.tolist() == [len(text.split()) for text in documents]
    ends = np.append(dataset.document_starts[1:], dataset.num_tokens)
    for text, start, end in zip(documents, dataset.document_starts, ends, strict=True):
        assert tokenizer.decode(dataset.read(start, end - 1)) == text


def test_the_manifest_says_what_is_there(tokenizer, documents, dataset):
    manifest = json.loads((dataset.folder / "manifest.json").read_text())
    assert manifest == dataset.manifest
    assert manifest["tokens"] == dataset.num_tokens and manifest["bytes"] == dataset.num_bytes
    assert manifest["documents"] == len(documents) and manifest["empty_documents"] == 0
    assert manifest["dtype"] == "<u2" and manifest["eos_token_id"] == 2 and manifest["vocab_size"] == 400
    for shard in manifest["shards"]:
        for file in shard["files"]:
            data = (dataset.folder / file["name"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"])
        ids = np.fromfile(dataset.folder / shard["files"][0]["name"], "<u2")
        assert (len(ids), ids.max()) == (shard["tokens"], shard["largest_id"])
        assert ids[-1] == 2
    names = {file["name"] for shard in manifest["shards"] for file in shard["files"]}
    assert {path.name for path in dataset.folder.iterdir()} == names | {"manifest.json", STAMPS}


def test_large_vocabularies_take_four_bytes(tokenizer, tmp_path):
    wide = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    wide.add_tokens([f"\U000f0000{i}" for i in range(1 << 16)])
    (tmp_path / "a.txt").write_text("a\U000f000065535b", encoding="utf-8")
    dataset = prepare(str(tmp_path / "a.txt"), wide, tmp_path / "prepared", workers=1, progress=False)
    assert dataset.manifest["dtype"] == "<u4"
    assert np.array_equal(dataset.read(0, 4), [*wide.encode("a"), 400 + 65535, *wide.encode("b"), 2])


def test_the_number_of_workers_changes_nothing(tokenizer, documents, tmp_path, small_chunks):
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    folders = [
        prepare(str(source), tokenizer, tmp_path / str(workers), workers=workers, progress=False).folder
        for workers in (1, 3)
    ]
    assert contents(folders[0]) == contents(folders[1])


def test_long_documents_are_cut_without_a_trace(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 5000)
    monkeypatch.setattr(documents_module, "CUT_SEARCH_BYTES", 1000)
    monkeypatch.setattr(documents_module, "CONTEXT_BYTES", 500)
    generator = random.Random(0)
    # Blank lines and spaces at the cuts; and no line ends at all, so that cuts run through words.
    parts = [
        ["\n\n\n", "   ", " word", "12", "日本語", "🙂"],
        ["people", "thou", " shall", "12", "日本語", "🙂", " "],
    ]
    texts = ["".join(generator.choice(words) for _ in range(20_000)) for words in parts]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    dataset = prepare(
        str(tmp_path), tokenizer, tmp_path / "prepared", workers=2, progress=False, shard_tokens=1000
    )
    assert np.array_equal(dataset.read(0, dataset.num_tokens), naive_tokens(tokenizer, texts))
    assert [shard["documents"] for shard in dataset.manifest["shards"]] == [1, 1]
    assert dataset.document_bytes.tolist() == [len(text.encode()) for text in texts]
    assert dataset.document_words.tolist() == [len(text.split()) for text in texts]


def test_truncation_and_padding_left_set_on_the_tokenizer_change_nothing(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 50)
    used = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    used("text", truncation=True, max_length=8, padding="max_length")
    assert used.backend_tokenizer.truncation and used.backend_tokenizer.padding
    dataset = prepare(str(tmp_path / "a.txt"), used, tmp_path, workers=1, progress=False)
    expected = naive_tokens(tokenizer, ["to be or not to be " * 50])
    assert np.array_equal(dataset.read(0, dataset.num_tokens), expected)


def test_any_text_survives_the_whole_way(tokenizer, tmp_path):
    generator = random.Random(1)
    texts = [any_text(generator, generator.randint(1, 300)) for _ in range(50)]
    source = write_jsonl(tmp_path / "any.jsonl", texts)
    dataset = prepare(str(source), tokenizer, tmp_path / "prepared", workers=1, progress=False)
    ends = np.append(dataset.document_starts[1:], dataset.num_tokens)
    for text, start, end in zip(texts, dataset.document_starts, ends, strict=True):
        assert tokenizer.decode(dataset.read(start, end - 1)) == text


def test_documents_without_text_are_counted_and_left_out(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "some.jsonl", ["", "one", "", "two", ""])
    dataset = prepare(str(source), tokenizer, tmp_path / "prepared", workers=1, progress=False)
    assert np.array_equal(dataset.read(0, dataset.num_tokens), naive_tokens(tokenizer, ["one", "two"]))
    assert (dataset.num_documents, dataset.manifest["empty_documents"]) == (2, 3)
    nothing = write_jsonl(tmp_path / "none.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"none.jsonl: all documents are empty"):
        prepare(str(nothing), tokenizer, tmp_path / "prepared", workers=1, progress=False)


def test_is_done_once_for_the_same_content(tokenizer, documents, tmp_path, monkeypatch):
    def again(source: Path, **options: str) -> Path:
        return prepare(
            str(source), tokenizer, tmp_path / "prepared", workers=1, progress=False, **options
        ).folder

    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    folder = again(source)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(preparing_module, "_tokenize", None)  # tokenizing again would fail
        assert again(source) == folder
        elsewhere = tmp_path / "elsewhere.jsonl"
        elsewhere.write_bytes(source.read_bytes())
        assert again(elsewhere) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    # One letter changed, the size kept: other content, another folder.
    data = source.read_bytes()
    source.write_bytes(data.replace(b"a", b"b", 1))
    assert again(source) != folder
    source.write_bytes(data.replace(b'"text"', b'"body"'))
    assert again(source, text_field="body") != folder


def test_another_tokenizer_gets_a_folder_of_its_own(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be")
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    other.add_tokens(["zounds"])
    folders = [
        prepare(str(tmp_path / "a.txt"), each, tmp_path, workers=1, progress=False).folder
        for each in (tokenizer, other)
    ]
    assert folders[0] != folders[1]


PREPARE = """
import sys
from llmnorm.data import files, prepare, sources
from llmnorm.data.tokenizer import load_tokenizer
files.CHUNK_BYTES = sources.CHUNK_BYTES = 20_000
source, tokenizer, folder = sys.argv[1:]
prepare(source, load_tokenizer(tokenizer), folder, workers=2, progress=False, shard_tokens=10_000)
"""


def test_killed_and_started_again_it_keeps_what_was_finished(tokenizer, tmp_path, small_chunks):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = (SHAKESPEARE / "train.txt").read_text(encoding="utf-8")
    # A .txt in front and compressed lines behind: the work is taken up in the second unit.
    (tmp_path / "a.txt").write_text(text[:100_000])
    documents = [text[start : start + 3000] for start in range(100_000, len(text), 3000)]
    write_jsonl(tmp_path / "b.jsonl", documents)
    source, interrupted = f"{tmp_path}/[ab].*", tmp_path / "interrupted"
    command = [sys.executable, "-c", PREPARE, source, str(tmp_path / "tokenizer"), str(interrupted)]
    process = subprocess.Popen(command)
    finished: list[Path] = []
    while len(finished) < 6:
        assert process.poll() is None, "it ended before it could be killed"
        finished = list(interrupted.glob("*.partial/shard-*.json"))
        time.sleep(0.001)
    process.kill()
    process.wait()
    (partial,) = interrupted.glob("*.partial")
    assert not list(interrupted.glob("*/manifest.json"))
    kept = {path.name: path.stat().st_ino for path in partial.glob("shard-0000[0-5].*")}
    assert len(kept) >= 18

    def whole(folder: Path) -> TokenDataset:
        return prepare(source, tokenizer, folder, workers=1, progress=False, shard_tokens=10_000)

    resumed, straight = whole(interrupted), whole(tmp_path / "straight")
    assert len(resumed.manifest["shards"]) > 20
    assert contents(resumed.folder) == contents(straight.folder)
    assert not partial.exists()
    for name, inode in kept.items():
        if not name.endswith(".json"):
            assert (resumed.folder / name).stat().st_ino == inode, f"{name} was written again"


def test_a_full_disk_keeps_what_was_finished(tokenizer, documents, tmp_path, monkeypatch, small_chunks):
    source = str(write_jsonl(tmp_path / "documents.jsonl", documents))
    calls = []

    def sync(stream):
        calls.append(stream)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def go(folder: Path) -> TokenDataset:
        return prepare(source, tokenizer, folder, workers=1, progress=False, shard_tokens=5000)

    with monkeypatch.context() as patch:
        patch.setattr("llmnorm.data.shards.sync", sync)
        with pytest.raises(
            UserError, match=r"cannot be written \(No space left on device\); free some space"
        ):
            go(tmp_path / "prepared")
    (partial,) = (tmp_path / "prepared").glob("*.partial")
    assert len(list(partial.glob("shard-*.json"))) == 4
    assert contents(go(tmp_path / "prepared").folder) == contents(go(tmp_path / "straight").folder)


def test_a_folder_that_cannot_be_written_is_named(tokenizer, documents, tmp_path):
    source = str(write_jsonl(tmp_path / "documents.jsonl", documents))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"data.prepared_dir: .*file/prepared cannot be written"):
        prepare(source, tokenizer, tmp_path / "file" / "prepared", workers=1, progress=False)


def test_mistakes_found_by_a_tokenizing_process_are_named_and_leave_no_set(tokenizer, documents, tmp_path):
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    with source.open("a") as stream:
        stream.write('{"body": "no text"}\n')
    with pytest.raises(UserError, match=r"documents.jsonl:201 has no field 'text' \(its keys are body\)"):
        prepare(str(source), tokenizer, tmp_path / "prepared", workers=2, progress=False)
    assert not list((tmp_path / "prepared").glob("*/manifest.json"))


def test_a_tokenizing_process_that_dies_is_reported(tokenizer, documents, tmp_path, monkeypatch):
    from llmnorm.data import encoding, worker

    class Dying(worker.Child):
        def __init__(self, *setup, **options):
            super().__init__(*setup, **options)
            self._process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(encoding, "Child", Dying)
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    with pytest.raises(UserError, match=r"was killed by signal 9; if the machine ran out of memory, lower"):
        prepare(str(source), tokenizer, tmp_path / "prepared", workers=1, progress=False)


def test_tokenizing_processes_end_with_a_killed_parent(tokenizer, tmp_path):
    script = (
        "import sys, time\n"
        "from llmnorm.data.worker import Child\n"
        "child = Child('llmnorm.data.tokenizer_training:Trainer', threads=1, parallel=False)\n"
        "print(child._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)
