"""Tokenizers are trained the same each time, give back every text, and are refused where they cannot do."""

from __future__ import annotations

import random

import pytest
import tokenizers
from data_cases import SHAKESPEARE, any_text, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmnorm.data import load_or_train_tokenizer, resolve_sources, tokenizer_fingerprint
from llmnorm.data import tokenizer as tokenizer_module
from llmnorm.data.holdout import held_out_by_source
from llmnorm.data.tokenizer import load_tokenizer, sample_text, vocabulary_size
from llmnorm.errors import UserError

SAMPLE = str(SHAKESPEARE / "validation.txt")


@pytest.fixture(scope="module")
def trained(cache):
    """A tokenizer of each kind."""
    return {
        kind: load_or_train_tokenizer({"train": kind, "vocab_size": 400}, SAMPLE, cache)
        for kind in ("bpe", "unigram")
    }


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_any_text_comes_back_exactly(trained, kind):
    tokenizer = trained[kind]
    generator = random.Random(0)
    # What unigram vocabularies and special tokens are made of must survive as text too.
    texts = [
        "",
        " ",
        "\u2581",
        "a\u2581 \u2581b",
        "<0x0A><0x41>",
        "<pad> <eos><unk>",
        "\u0120Ċ",
        "\ufeff\x00\x7f",
    ]
    texts += ["  two\n\n\n   spaces \t\r\n", "x" * 5000, "é e\u0301 ﬁ ①", "👩‍👩‍👧"]
    texts += [any_text(generator, generator.randint(1, 60)) for _ in range(500)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_special_tokens_come_first_and_numbers_are_split(trained, kind):
    tokenizer = trained[kind]
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    assert [getattr(tokenizer, f"{name}_id") for name in names] == [0, 1, 2, 3]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<bos>", "<eos>", "<unk>"]
    assert len(tokenizer) == 400 and vocabulary_size(tokenizer) == 400
    ids = tokenizer.encode("1789", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids] == ["1", "7", "8", "9"]
    # Trained on English, it must do better than bytes.
    text = "the people and the king"
    assert len(tokenizer.encode(text, add_special_tokens=False)) < 0.7 * len(text)


def test_a_saved_tokenizer_is_a_normal_folder_with_the_same_fingerprint(trained, tmp_path):
    for kind, tokenizer in trained.items():
        tokenizer.save_pretrained(tmp_path / kind)
        again = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert isinstance(again, PreTrainedTokenizerFast)
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
        assert (
            load_or_train_tokenizer(str(tmp_path / kind), [], tmp_path).get_vocab() == tokenizer.get_vocab()
        )
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in trained.values()}) == 2


def test_the_fingerprint_is_of_the_ids_and_not_of_settings(trained):
    tokenizer = trained["bpe"]
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    other = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    other.add_tokens(["zounds"])
    assert tokenizer_fingerprint(PreTrainedTokenizerFast(tokenizer_object=other)) != before


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_repeatable_and_done_once(trained, kind, tmp_path, cache, monkeypatch):
    spec = {"train": kind, "vocab_size": 400}
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    again = load_or_train_tokenizer(spec, SAMPLE, tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(trained[kind])
    monkeypatch.setattr(tokenizer_module, "Child", None)  # training again would fail
    load_or_train_tokenizer(spec, SAMPLE, cache)


def test_changed_text_is_trained_on_anew(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("abab " * 500)
    spec = {"train": "bpe", "vocab_size": 262}
    first = load_or_train_tokenizer(spec, str(source), tmp_path)
    source.write_text("cdcd " * 500)
    second = load_or_train_tokenizer(spec, str(source), tmp_path)
    assert len(first.encode("abab")) < 4 and len(second.encode("abab")) == 4


def test_only_a_bounded_sample_is_read_and_each_file_gives_its_share(tmp_path):
    for name, size in (("a", 100), ("b", 10_000), ("c", 50_000), ("d", 50_000)):
        write_jsonl(tmp_path / f"{name}.jsonl", [name * 50] * (size // 50))
    sources = resolve_sources(str(tmp_path / "*.jsonl"))
    text = "".join(sample_text(sources, "text", 30_100))
    assert {name: text.count(name) for name in "abcd"} == {"a": 100, "b": 10_000, "c": 10_000, "d": 10_000}
    assert next(sample_text(sources, "text", 10**6)) == "a" * 50
    assert sum(map(len, sample_text(sources, "text", 10**6))) == 110_100


def test_of_very_many_files_evenly_spaced_ones_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "SAMPLED_SOURCES", 5)
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(str(i))
    assert sorted(sample_text(resolve_sources(str(tmp_path)), "text", 1000)) == ["0", "2", "4", "6", "8"]


def test_held_out_documents_are_not_trained_on(tmp_path):
    texts = [f"document {i} " * 5 for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", ["", *texts[:25]])
    write_jsonl(tmp_path / "b.jsonl", texts[25:])
    sources = resolve_sources(str(tmp_path))
    held_out = held_out_by_source(sources, "text", 0.25)
    held = [text for text, out in zip(texts, [*held_out[0], *held_out[1]], strict=True) if out]
    assert len(held) == 10
    assert sorted(sample_text(sources, "text", 10**6, held_out)) == sorted(set(texts) - set(held))


def test_too_small_vocabularies_and_too_little_text(tmp_path, caplog):
    source = tmp_path / "a.txt"
    source.write_text("some words of text " * 20)
    with pytest.raises(
        UserError, match=r"data.tokenizer.vocab_size=259 is below 260: 256 bytes and 4 special"
    ):
        load_or_train_tokenizer({"train": "bpe", "vocab_size": 259}, str(source), tmp_path)
    tokenizer = load_or_train_tokenizer({"train": "bpe", "vocab_size": 5000}, str(source), tmp_path)
    assert f"vocab_size=5000: the text supports only {len(tokenizer)} tokens" in caplog.text
    write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        load_or_train_tokenizer({"train": "bpe", "vocab_size": 300}, str(tmp_path / "empty.jsonl"), tmp_path)
    # The text has ten letters and the space.
    with pytest.raises(UserError, match=r"data.tokenizer.vocab_size=270 is below 271, which unigram needs"):
        load_or_train_tokenizer({"train": "unigram", "vocab_size": 270}, str(source), tmp_path)
    smallest = load_or_train_tokenizer({"train": "unigram", "vocab_size": 271}, str(source), tmp_path)
    assert len(smallest) == 271


def test_tokenizers_that_cannot_be_loaded_or_used(trained, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data.tokenizer='./none' is not a folder"):
        load_tokenizer("./none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"could not be loaded: .* train one: \{train: bpe, vocab_size: 32000\}"
    ):
        load_tokenizer(str(tmp_path / "empty"))

    def unreachable(name, **options):
        raise OSError("We couldn't connect to the Hub\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", unreachable)
        with pytest.raises(
            UserError, match=r"data.tokenizer='t5-base' could not be loaded: We couldn't connect"
        ):
            load_tokenizer("t5-base")

    backend = trained["bpe"].backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError, match="has no EOS token"):
        load_tokenizer(str(tmp_path / "no_eos"))


def test_a_hub_tokenizer_in_the_cache_is_used_without_asking_the_hub(trained, monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append(options)
        return trained["bpe"]

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    load_tokenizer("t5-base")
    assert asked == [{"local_files_only": True}]
