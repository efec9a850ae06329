"""From text to tokens to numbers that say what they are of."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmnorm.data import TokenDataset, prepare, tokenizer_fingerprint
from llmnorm.errors import UserError
from llmnorm.evaluation import evaluate_dataset, evaluate_datasets, perplexity, read_held_out
from llmnorm.evaluation.held_out import read_rows

TEXTS = ["Où est le café?\n", "東京は大きい。 Yes, it is.", "plain words only"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a BOS that only special tokens bring."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {letter: 3 + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return fast


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_bits_per_byte_counts_bytes_and_not_characters(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXTS[1], encoding="utf-8")
    result = evaluate_dataset(llama, read_held_out(file, tokenizer), context_length=16)
    size = len(TEXTS[1].encode())
    assert size == 33 and len(TEXTS[1]) == 19
    assert (result.bytes, result.words, result.tokens) == (size, 4, size - 1)
    assert result.bits_per_byte == pytest.approx(result.nll_sum / (math.log(2) * size))
    assert result.word_perplexity == pytest.approx(math.exp(result.nll_sum / 4))
    assert result.tokenizer_hash == tokenizer_fingerprint(tokenizer)
    assert result.data_hash == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_text_file_is_its_tokens_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXTS[0] + TEXTS[1])
    expected = tokenizer(TEXTS[0] + TEXTS[1], add_special_tokens=False)["input_ids"]
    text = read_held_out(file, tokenizer)
    assert text.read(0, text.num_tokens).tolist() == expected and text.num_documents == 1
    file.rename(tmp_path / "text.md")  # any other ending is plain text
    assert read_held_out(tmp_path / "text.md", tokenizer).tokens.tolist() == expected


def test_documents_are_joined_with_what_is_asked_for(tokenizer: PreTrainedTokenizerFast, jsonl: Path) -> None:
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    text = read_held_out(jsonl, tokenizer)
    assert text.tokens.tolist() == [token for ids in plain for token in ids]
    assert (text.num_documents, text.num_bytes) == (3, sum(len(t.encode()) for t in TEXTS))
    assert text.num_words == sum(len(t.split()) for t in TEXTS)
    eos = read_held_out(jsonl, tokenizer, append_eos=True)
    assert eos.tokens.tolist() == [token for ids in plain for token in [*ids, 2]]
    special = read_held_out(jsonl, tokenizer, add_special_tokens=True)
    assert special.tokens.tolist() == [token for ids in plain for token in [1, *ids]]
    assert text.num_bytes == special.num_bytes


def test_a_long_document_is_encoded_in_parts(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmnorm.data.documents.PIECE_BYTES", 64)
    monkeypatch.setattr("llmnorm.data.documents.CONTEXT_BYTES", 16)
    file = tmp_path / "text.txt"
    file.write_text("Où est-il? Ici.\n" * 40)
    text = read_held_out(file, tokenizer)
    assert text.tokens.tolist() == tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    assert (text.num_documents, text.num_words) == (1, 120)


def test_a_prepared_set_is_the_file_with_an_eos_after_each_document(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, jsonl: Path, tmp_path: Path
) -> None:
    dataset = prepare(str(jsonl), tokenizer, tmp_path / "prepared", workers=1, progress=False)
    from_file = evaluate_dataset(llama, read_held_out(jsonl, tokenizer, append_eos=True), context_length=16)
    prepared = evaluate_dataset(llama, dataset, context_length=16)
    assert (prepared.nll_sum, prepared.bytes, prepared.words) == (
        pytest.approx(from_file.nll_sum, rel=1e-12),
        from_file.bytes,
        from_file.words,
    )
    assert prepared.tokenizer_hash == from_file.tokenizer_hash
    opened = read_held_out(dataset.folder, tokenizer)
    assert isinstance(opened, TokenDataset)
    assert evaluate_dataset(llama, opened, context_length=16) == prepared
    cut = evaluate_dataset(llama, dataset, context_length=16, max_tokens=20)
    assert (cut.tokens, cut.words, cut.bytes) == (20, None, None)
    half = dataset.select(np.array([True, False, False]))
    assert evaluate_dataset(llama, half, context_length=16).data_hash != prepared.data_hash
    sets = evaluate_datasets(llama, {"a": dataset, "b": half}, context_length=16)
    assert sets["a"] == prepared and sets["b"].tokens == half.num_tokens - 1


def test_rows_of_the_galore_recipe(tokenizer: PreTrainedTokenizerFast, jsonl: Path) -> None:
    assert read_rows(jsonl, tokenizer, 8) == [tokenizer(text)["input_ids"][:8] for text in TEXTS]
    assert read_rows(jsonl, tokenizer, 8)[0][0] == 1
    assert len(read_held_out(jsonl, tokenizer).tokens) > 24, "truncation does not stick to the tokenizer"


def test_compressed_text_and_other_fields(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    packed = tmp_path / "texts.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"body": "one two"}).encode()))
    assert read_held_out(packed, tokenizer, text_field="body").num_words == 2
    with pytest.raises(UserError, match="has no field 'text'"):
        read_held_out(packed, tokenizer)


def test_what_is_no_text_is_named(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="match nothing"):
        read_held_out(tmp_path / "absent.txt", tokenizer)
    for name, content, message in (
        ("empty.txt", b"", "is empty"),
        ("latin.txt", "é".encode("latin1"), "is not UTF-8 text"),
        ("binary.bin", b"\x7fELF\x00\x00", "is a binary file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_held_out(tmp_path / name, tokenizer)
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UserError, match="at least 2 tokens"):
        evaluate_dataset(llama, read_held_out(tmp_path / "short.txt", tokenizer))
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        read_held_out(tmp_path / "short.txt", bare, append_eos=True)


def test_the_stream_interface_is_the_arrays(llama: LlamaForCausalLM, tokenizer, jsonl: Path) -> None:
    text = read_held_out(jsonl, tokenizer)
    assert perplexity(llama, text, 16) == perplexity(llama, text.tokens, 16)
