"""Samples hold the tokens, targets and positions that their recipe says, each once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from data_cases import write_jsonl

from llmnorm.data import TrainingSamples, prepare
from llmnorm.data.samples import galore_rows, packed_rows
from llmnorm.errors import UserError


def test_packed_rows_are_the_stream_cut_with_targets_shifted(dataset):
    samples = TrainingSamples(dataset, 50)
    assert samples.num_samples == (dataset.num_tokens - 1) // 50
    stream = dataset.read(0, dataset.num_tokens)
    expected = {tuple(stream[i * 50 : i * 50 + 51]) for i in range(samples.num_samples)}
    rows = samples.batch(np.arange(samples.num_samples))
    assert set(rows) == {"input_ids", "labels"}
    assert rows["input_ids"].dtype == rows["labels"].dtype == np.int64
    found = {(*inputs, labels[-1]) for inputs, labels in zip(rows["input_ids"], rows["labels"], strict=True)}
    assert found == expected
    assert np.array_equal(rows["input_ids"][:, 1:], rows["labels"][:, :-1])


def test_a_position_is_all_that_a_sample_depends_on(dataset):
    samples = TrainingSamples(dataset, 50, seed=3)
    positions = np.array([0, 5, samples.num_samples - 1, samples.num_samples, 3 * samples.num_samples + 2])
    batch = samples.batch(positions)
    for row, position in enumerate(positions.tolist()):
        sample = TrainingSamples(dataset, 50, seed=3).sample(position)
        assert all(np.array_equal(sample[name], batch[name][row]) for name in ("input_ids", "labels"))
        assert sample["input_ids"].shape == (50,)


def test_every_epoch_holds_each_row_once_in_another_order(dataset):
    samples = TrainingSamples(dataset, 50, seed=1)
    n = samples.num_samples
    epochs = [samples.batch(np.arange(n) + epoch * n)["input_ids"] for epoch in range(3)]
    epochs.append(TrainingSamples(dataset, 50, seed=2).batch(np.arange(n))["input_ids"])
    as_sets = [{row.tobytes() for row in epoch} for epoch in epochs]
    assert as_sets[0] == as_sets[1] == as_sets[2] == as_sets[3]
    for i, epoch in enumerate(epochs):
        for other in epochs[:i]:
            # At a random order 1 row in n is in its place on average.
            assert (epoch == other).all(axis=1).mean() < 0.02


def test_document_masking_restarts_positions_and_predicts_no_first_token(dataset):
    samples = TrainingSamples(dataset, 50, document_masking=True, seed=1)
    plain = TrainingSamples(dataset, 50, seed=1)
    stream = dataset.read(0, dataset.num_tokens)
    starts_of_documents = set(dataset.document_starts.tolist())
    rows, unmasked = (s.batch(np.arange(samples.num_samples)) for s in (samples, plain))
    where = {tuple(stream[i * 50 : i * 50 + 50]): i * 50 for i in range(samples.num_samples)}
    assert np.array_equal(rows["input_ids"], unmasked["input_ids"])
    boundaries = 0
    for row in range(samples.num_samples):
        start = where[tuple(rows["input_ids"][row])]
        position = -1
        for t in range(50):
            position = 0 if t == 0 or start + t in starts_of_documents else position + 1
            assert rows["position_ids"][row, t] == position
            crosses = start + t + 1 in starts_of_documents
            assert rows["labels"][row, t] == (-100 if crosses else unmasked["labels"][row, t])
            if crosses:
                boundaries += 1
                assert rows["input_ids"][row, t] == dataset.eos_token_id
    assert boundaries > 100


def test_packed_rows_by_hand():
    windows = np.array([[5, 6, 2, 7, 2, 8, 9]])
    begins = np.array([[False, False, False, True, False, True, False]])
    rows = packed_rows(windows, begins)
    assert rows["input_ids"].tolist() == [[5, 6, 2, 7, 2, 8]]
    assert rows["labels"].tolist() == [[6, 2, -100, 2, -100, 9]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    last = packed_rows(windows[:, :6], begins[:, :6])
    assert last["labels"].tolist() == [[6, 2, -100, 2, -100]]
    assert packed_rows(windows, None)["labels"].tolist() == [[6, 2, 7, 2, 8, 9]]


def test_galore_rows_by_hand():
    documents = [np.array([5, 6, 2]), np.array([5, 6, 7, 8, 2]), np.array([5, 6, 7, 2]), np.array([2])]
    rows = galore_rows(documents, 4, eos_token_id=2, pad_token_id=0)
    assert rows["input_ids"].tolist() == [[5, 6, 2, 0], [5, 6, 7, 2], [5, 6, 7, 2], [2, 0, 0, 0]]
    assert rows["labels"].tolist() == [
        [6, 2, -100, -100],
        [6, 7, 2, -100],
        [6, 7, 2, -100],
        [-100, -100, -100, -100],
    ]


def test_galore_samples_are_what_the_papers_script_makes(tokenizer, documents, dataset):
    """Against the script's own steps: tokenize with truncation and padding, mask pads, shift in the model."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    with_eos = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    from tokenizers.processors import TemplateProcessing

    with_eos.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 2)]
    )
    batch = with_eos(documents, max_length=64, truncation=True, padding="max_length", return_tensors="np")
    inputs = batch["input_ids"]
    targets = np.where(batch["attention_mask"] == 1, inputs, -100)
    shifted = np.concatenate((targets[:, 1:], np.full((len(documents), 1), -100)), axis=1)
    samples = TrainingSamples(dataset, 64, "galore", seed=5, pad_token_id=0)
    assert samples.num_samples == len(documents)
    rows = samples.batch(np.arange(len(documents)))
    found = {(*ids, *labels) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)}
    assert found == {(*ids, *labels) for ids, labels in zip(inputs, shifted, strict=True)}
    filled = (rows["input_ids"] != 0).sum(axis=1)
    assert filled.min() < 64 and (filled == 64).any()


def test_text_shorter_than_one_window(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "short.jsonl", ["12345"])
    dataset = prepare(str(source), tokenizer, tmp_path / "prepared", workers=1, progress=False)
    assert TrainingSamples(dataset, 5).num_samples == 1
    with pytest.raises(
        UserError, match=r"hold 6 tokens in all, fewer than one window of data.sequence_length \+ 1 = 7"
    ):
        TrainingSamples(dataset, 6)


def test_masking_where_it_does_nothing_is_refused(dataset):
    with pytest.raises(UserError, match=r"data.document_masking=true does nothing with data.recipe=galore"):
        TrainingSamples(dataset, 64, "galore", document_masking=True, pad_token_id=0)
