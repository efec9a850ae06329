"""Text is found, read in a fixed order whatever holds it, and refused with its place when it is not text."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from data_cases import write_jsonl

from llmnorm.data import documents as documents_module
from llmnorm.data.sources import plan_units, resolve_sources
from llmnorm.errors import UserError

TEXTS = ["Zwölf Boxkämpfer", "two\nlines\n", "🙂 three", "  spaces  "]


def texts_of(*patterns: str, text_field: str = "text", split: str = "train") -> list[str]:
    """The documents of sources, their pieces joined."""
    documents, parts = [], []
    for unit in plan_units(resolve_sources(list(patterns), split)):
        for chunk in unit.chunks(text_field):
            for piece in chunk.pieces():
                parts.append(piece.text)
                if piece.closes:
                    documents.append("".join(parts))
                    parts = []
    assert not parts
    return documents


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write_parquet(path: Path, texts: list[str | None]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path)


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(jsonl(TEXTS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS))),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl(TEXTS))),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl(TEXTS))),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS))),
    "a.parquet": lambda path: write_parquet(path, TEXTS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_table_gives_its_documents(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert texts_of(str(tmp_path / name)) == TEXTS


def test_compressed_parts_that_were_joined_are_read_to_the_end(tmp_path):
    halves = jsonl(TEXTS[:2]), jsonl(TEXTS[2:])
    for name, compress in (("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstandard.compress)):
        path = tmp_path / f"joined.jsonl.{name}"
        path.write_bytes(b"".join(map(compress, halves)))
        assert texts_of(str(path)) == TEXTS


def test_a_txt_file_is_one_document_without_its_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n")
    assert texts_of(str(tmp_path / "a.txt")) == ["one\r\ntwo\n\n"]


def test_blank_lines_and_a_missing_last_line_end_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n   \n{"text": "two"}')
    assert texts_of(str(tmp_path / "a.jsonl")) == ["one", "two"]


def test_files_come_sorted_by_path_and_once_each(tmp_path):
    for name in ("b.txt", "a.txt", "sub/deep/c.txt", "sub/a.txt", "Z.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    expected = ["Z.txt", "a.txt", "b.txt", "sub/a.txt", "sub/deep/c.txt"]
    assert texts_of(f"{tmp_path}/**/*.txt") == expected
    assert texts_of(str(tmp_path)) == expected
    assert texts_of(f"{tmp_path}/sub/**", f"{tmp_path}/*.txt", f"{tmp_path}/b.txt") == expected


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "notes[1].txt").write_text("bracketed")
    assert texts_of(f"{tmp_path}/notes[1].txt") == ["bracketed"]


def test_long_documents_come_in_pieces_that_join_again(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 1000)
    monkeypatch.setattr(documents_module, "CUT_SEARCH_BYTES", 200)
    monkeypatch.setattr(documents_module, "CONTEXT_BYTES", 50)
    long = [("wörd 🙂 " * 20 + "\n") * 30, "日" * 5000]
    (tmp_path / "a.txt").write_text(long[0], encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", long)
    assert texts_of(str(tmp_path)) == [long[0], *long]
    pieces = list(documents_module.text_pieces(long[0], "here"))
    assert len(pieces) > 5 and [piece.closes for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text.endswith("\n") for piece in pieces)
    joined = "".join(piece.text for piece in pieces)
    at = 0
    for piece in pieces:
        before, after = joined[:at], joined[at + len(piece.text) :]
        assert before.endswith(piece.before) and after.startswith(piece.after)
        assert bool(piece.before) == (at > 0) and bool(piece.after) == bool(after)
        at += len(piece.text)
    counts = [documents_module.measure(piece) for piece in pieces]
    assert sum(count.bytes for count in counts) == len(long[0].encode())
    assert sum(count.words for count in counts) == len(long[0].split())


def test_words_that_a_cut_runs_through_count_once():
    Piece, measure = documents_module.Piece, documents_module.measure
    text = "one two  three\n four"
    for cut in range(1, len(text)):
        halves = Piece("", text[:cut], text[cut:], False), Piece(text[:cut], text[cut:], "", True)
        assert sum(measure(half).words for half in halves) == 4, cut


def test_hub_datasets_are_read_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_dict({"text": TEXTS, "url": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of("hf:org/set:en:test") == TEXTS
    assert texts_of("hf:org/set", split="validation") == TEXTS
    assert asked == [("org/set", "en", "test", False), ("org/set", None, "validation", False)]
    with pytest.raises(UserError, match=r"has no column 'body' \(its columns are text, url\)"):
        texts_of("hf:org/set:en", text_field="body")


def test_a_hub_that_cannot_be_reached_is_named_with_the_remedy(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach 'org/set' on the Hub (LocalEntryNotFoundError)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"hf:org/set:en:train could not be loaded: Couldn't .* their paths"):
        texts_of("hf:org/set:en")


def mistake(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        texts_of(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(UserError, match=r"data files '.*/\*\*/\*\.txt' match nothing.*quote the pattern"):
        texts_of(f"{tmp_path}/**/*.txt")
    with pytest.raises(UserError, match="match nothing"):
        texts_of(str(tmp_path))


def test_empty_and_unknown_files(tmp_path):
    assert "a.txt is empty" in mistake(tmp_path / "a.txt", b"")
    assert "bom.txt is empty" in mistake(tmp_path / "bom.txt", b"\xef\xbb\xbf")
    assert "a.jsonl holds no documents: every line is blank" in mistake(tmp_path / "a.jsonl", b"\n \n")
    assert "a.pdf is of an unknown kind; text files end in" in mistake(tmp_path / "a.pdf", b"%PDF")
    write_parquet(tmp_path / "none.parquet", [])
    with pytest.raises(UserError, match=r"none.parquet holds no rows"):
        texts_of(f"{tmp_path}/none.parquet")


def test_binary_and_other_encodings_are_named_with_their_byte_offset(tmp_path, monkeypatch):
    assert "a.txt is a binary file: NUL byte at offset 4" in mistake(tmp_path / "a.txt", b"text\0more")
    found = mistake(tmp_path / "latin.txt", "Zwölf".encode("latin1"))
    assert "latin.txt is not UTF-8 text: byte 0xf6 at offset 2" in found and "iconv" in found
    line = b'{"text": "good"}\n'
    found = mistake(tmp_path / "a.jsonl", line + b'{"text": "\xff"}\n')
    assert f"byte 0xff at offset {len(line) + 10}" in found
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 1000)
    bad = b"good line\n" * 500 + b"\xe6" + b"good line\n" * 500
    assert "byte 0xe6 at offset 5000" in mistake(tmp_path / "long.txt", bad)


def test_lines_that_are_no_documents_are_named_by_number(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n\n'
    for line, expected in (
        (b'{"text": oops}', "a.jsonl:3 is not valid JSON: Expecting value at column 10"),
        (b'{"id": 1, "body": ""}', "a.jsonl:3 has no field 'text' (its keys are id, body)"),
        (b'["text"]', "a.jsonl:3 has no field 'text' (it is not an object)"),
        (b'{"text": null}', "a.jsonl:3: field 'text' holds NoneType, not text"),
        (b'{"text": "a\\ud800"}', "a.jsonl:3: field 'text' holds half of a surrogate pair at character 1"),
    ):
        assert expected in mistake(path, good + line)
    write_parquet(tmp_path / "null.parquet", ["good", None])
    with pytest.raises(UserError, match=r"null.parquet, row 1: field 'text' holds NoneType"):
        texts_of(f"{tmp_path}/null.parquet")
    with pytest.raises(UserError, match=r"null.parquet has no column 'body' \(its columns are n, text\)"):
        texts_of(f"{tmp_path}/null.parquet", text_field="body")


def test_damaged_archives_are_named(tmp_path):
    lines = jsonl([str(i) * 50 for i in range(2000)])
    for ending, compress in (("gz", gzip.compress), ("xz", lzma.compress)):
        found = mistake(tmp_path / f"cut.jsonl.{ending}", compress(lines)[:-20])
        assert f"cut.jsonl.{ending} cannot be decompressed" in found and "truncated" in found
    assert "cannot be decompressed" in mistake(tmp_path / "a.jsonl.gz", b"no archive")
    assert "cannot be decompressed" in mistake(tmp_path / "a.jsonl.zst", b"no archive")
    assert "not a readable parquet file" in mistake(tmp_path / "a.parquet", b"no table")


def test_a_file_without_read_permission_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("secret")

    def refuse(self, *arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # a mode would not stop the tests' own user where that is root
    with pytest.raises(UserError, match=r"a.txt cannot be read: Permission denied"):
        texts_of(str(path))
