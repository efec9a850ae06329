"""Streamed text gives steps like prepared text, says that resuming is not exact, and passes mistakes on."""

from __future__ import annotations

from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from data_cases import naive_tokens, write_jsonl

from llmnorm.data import StreamingSamples, training_loader
from llmnorm.data import stream as stream_module
from llmnorm.errors import UserError

SIZES = {"global_batch_size": 4, "micro_batch_size": 2}


def samples_of(tokenizer, source, **options) -> StreamingSamples:
    return StreamingSamples([str(source)], tokenizer, 32, **options)


def steps(samples, count, start=0, num_workers=0, **options):
    loader = training_loader(samples, start=start, num_workers=num_workers, **{**SIZES, **options})
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


def split_at_eos(tokens: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(part) for part in np.split(tokens, np.flatnonzero(tokens == 2) + 1) if len(part)]


def test_packs_every_document_once_an_epoch_in_a_shuffled_order(tokenizer, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "SHUFFLE_BUFFER", 50)
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    batches = steps(samples_of(tokenizer, source), 3000)
    assert [batch.first for batch in batches[:3]] == [0, 4, 8]
    assert batches[0].tensors["input_ids"].shape == (2, 2, 32)
    inputs = torch.cat([batch.tensors["input_ids"].flatten() for batch in batches]).numpy()
    labels = torch.cat([batch.tensors["labels"].flatten() for batch in batches]).numpy()
    assert np.array_equal(labels[:-1], inputs[1:])
    found = split_at_eos(inputs)
    expected = split_at_eos(naive_tokens(tokenizer, documents))
    epochs = [found[:200], found[200:400]]
    assert len(found) > 400
    for epoch in epochs:
        assert epoch != expected and sorted(epoch) == sorted(expected)
    assert epochs[0] != epochs[1]


def test_document_masking_and_the_galore_recipe(tokenizer, documents, tmp_path):
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    (batch,) = steps(samples_of(tokenizer, source, document_masking=True), 1, global_batch_size=64)
    inputs, labels, positions = (batch.tensors[name] for name in ("input_ids", "labels", "position_ids"))
    ends = (inputs == 2)[..., :-1]
    assert ends.any()
    assert torch.equal(labels[..., :-1] == -100, ends)
    assert torch.equal(positions[..., 1:] == 0, ends)
    (batch,) = steps(samples_of(tokenizer, source, recipe="galore"), 1, global_batch_size=200)
    rows = {tuple(row[row != 0].tolist()) for row in batch.tensors["input_ids"].flatten(0, 1)}
    expected = [tuple(naive_tokens(tokenizer, [text]).tolist()) for text in documents]
    assert rows == {ids if len(ids) <= 32 else (*ids[:31], 2) for ids in expected}


def test_processes_share_the_documents(tokenizer, tmp_path):
    documents = [f"{i:03}" * 20 for i in range(30)]
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    seen = []
    for rank in range(2):
        (batch,) = steps(
            samples_of(tokenizer, source, recipe="galore"), 1, global_batch_size=30, micro_batch_size=5,
            rank=rank, world_size=2,
        )  # fmt: skip
        rows = batch.tensors["input_ids"].flatten(0, 1)
        seen.append({tokenizer.decode(row)[:3] for row in rows})
    assert [len(part) for part in seen] == [15, 15] and not seen[0] & seen[1]


def test_a_worker_process_gives_the_same_steps(tokenizer, documents, tmp_path):
    samples = samples_of(tokenizer, write_jsonl(tmp_path / "documents.jsonl", documents))
    for here, there in zip(steps(samples, 5), steps(samples, 5, num_workers=1), strict=True):
        assert here.first == there.first
        assert torch.equal(here.tensors["input_ids"], there.tensors["input_ids"])
    with pytest.raises(
        UserError, match=r"data.num_workers=2: with data.streaming=true each process reads one"
    ):
        steps(samples, 1, num_workers=2)


def test_says_once_that_resuming_is_approximate(tokenizer, documents, tmp_path, caplog):
    samples = samples_of(tokenizer, write_jsonl(tmp_path / "documents.jsonl", documents))
    first = steps(samples, 2)
    assert caplog.text.count("resuming is approximate") == 1
    resumed = steps(samples, 2, start=8)
    assert resumed[0].first == 8
    assert not torch.equal(resumed[0].tensors["input_ids"], first[0].tensors["input_ids"])


def test_hub_datasets_are_streamed(tokenizer, documents, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "documents.jsonl", documents)
    load_dataset = datasets.load_dataset
    files = {"train": str(tmp_path / "documents.jsonl")}
    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return load_dataset(
            "json", data_files=files, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache")
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    samples = StreamingSamples(["hf:org/set:en"], tokenizer, 32, "galore")
    for rank in range(2):
        (batch,) = steps(samples, 1, global_batch_size=200, rank=rank, world_size=2)
        rows = {tuple(row[row != 0].tolist()) for row in batch.tensors["input_ids"].flatten(0, 1)}
        half = [tuple(naive_tokens(tokenizer, [text]).tolist()) for text in documents[rank::2]]
        assert rows == {ids if len(ids) <= 32 else (*ids[:31], 2) for ids in half}
    assert asked == [("org/set", "en", "train", True)] * 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_mistakes_arrive_as_one_paragraph(tokenizer, documents, tmp_path, num_workers, monkeypatch):
    monkeypatch.setattr(stream_module, "SHUFFLE_BUFFER", 10)
    source = write_jsonl(tmp_path / "documents.jsonl", documents)
    with source.open("a") as stream:
        stream.write("no json\n")
    with pytest.raises(UserError, match=r"^.*documents.jsonl:201 is not valid JSON: [^\n]*$"):
        steps(samples_of(tokenizer, source), 10_000, num_workers=num_workers)


def test_a_process_without_documents_is_a_mistake(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "one.jsonl", ["the only document"])
    with pytest.raises(UserError, match=r"process 1 of 2 got no documents; give more"):
        steps(samples_of(tokenizer, source), 1, rank=1, world_size=2)
