"""Importance resampling: counts and weights by brute force, the draw's distribution, the choice."""

from __future__ import annotations

import hashlib
import json
import math
import random
from itertools import pairwise, permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_cases import write_jsonl

from llmnorm.config import load_run_config
from llmnorm.data import prepare_data
from llmnorm.data.resampling import BucketReader, gumbel_top_k, log_ratio
from llmnorm.errors import UserError

BUCKETS = 997


def by_hand(text):
    """Counts of one document as the released code makes them (words, then pairs joined by a space)."""
    words, word = [], ""
    for character in text.lower() + " ":
        kind = "word" if character.isalnum() or character == "_" else "" if character.isspace() else "mark"
        before = "" if not word else "word" if word[-1].isalnum() or word[-1] == "_" else "mark"
        if word and kind != before:
            words.append(word)
            word = ""
        word += character if kind else ""
    counts = [0] * BUCKETS
    for ngram in [*words, *(" ".join(pair) for pair in pairwise(words))]:
        counts[int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % BUCKETS] += 1
    assert sum(counts) == 2 * len(words) - 1
    return counts


@pytest.fixture(scope="module")
def mixture():
    """300 documents, every third of them about the sea, and 40 others about the sea."""
    sea = ["ship", "wave", "salt", "anchor", "sail", "storm", "deck", "harbor", "tide", "whale"]
    city = ["street", "tower", "train", "office", "market", "car", "light", "bridge", "crowd", "noise"]
    both = ["the", "a", "of", "and", "in", ",", ".", "7"]
    generator = random.Random(0)

    def document(words):
        return " ".join(generator.choices(words + both, k=generator.randint(20, 60)))

    return [document(sea if i % 3 == 0 else city) for i in range(300)], [document(sea) for _ in range(40)]


@pytest.fixture
def resampling(mixture, tmp_path, data_config):
    """A `data` section that keeps a fifth of the mixture."""
    train = write_jsonl(tmp_path / "train.jsonl", mixture[0])
    target = write_jsonl(tmp_path / "target.jsonl", mixture[1])

    def make(*, fraction=0.2, seed=0, **changes):
        section = SimpleNamespace(
            target_files=str(target), fraction=fraction, seed=seed, ngrams=2, buckets=BUCKETS
        )
        return data_config(train_files=str(train), resampling=section, **changes)

    return make


def texts(data):
    """The documents that a run trains on."""
    starts = [*data.train.document_starts.tolist(), data.train.num_tokens]
    return [
        data.tokenizer.decode(data.train.read(start, stop - 1).tolist()) for start, stop in pairwise(starts)
    ]


def weights_folder(config):
    (folder,) = Path(config.prepared_dir).glob("resampling-*[!k]")
    return folder


def test_o1_log_weights_equal_brute_force(resampling, mixture, small_chunks):
    config = resampling()
    prepare_data(config, 0, progress=False)
    documents, targets = mixture
    raw = np.sum([by_hand(text) for text in documents], axis=0)
    target = np.sum([by_hand(text) for text in targets], axis=0)
    delta = [
        math.log(t / target.sum() + 1e-8) - math.log(r / raw.sum() + 1e-8)
        for t, r in zip(target.tolist(), raw.tolist(), strict=True)
    ]
    expected = [sum(count * d for count, d in zip(by_hand(text), delta, strict=True)) for text in documents]
    found = np.load(weights_folder(config) / "log_weights.npy")
    # Sums of about 100 terms of up to 18 in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("text", ["Don't stop -- it's 3.14, naïve_x!", "日本語 と  \n English", "a"])
def test_words_are_runs_of_letters_or_of_marks(text):
    found = BucketReader(2, BUCKETS, None).buckets_of(text)
    assert np.bincount(found, minlength=BUCKETS).tolist() == by_hand(text)


def test_o2_a_mixture_gives_back_the_documents_like_the_target(resampling):
    data = prepare_data(resampling(), 0, progress=False)
    chosen = texts(data)
    assert len(chosen) == 60
    # A draw from all would hold 20 of 60 about the sea; by their weights the others have no chance.
    assert all(not {"street", "tower", "train", "office", "market"} & set(text.split()) for text in chosen)


def test_o3_the_draw_without_replacement_has_the_probabilities_of_its_weights():
    """Ordered pairs of 4 documents, Plackett-Luce: P(i, j) = w_i w_j / (1 - w_i); 8000 seeds, 4 sigma."""
    w = np.array([0.5, 0.25, 0.15, 0.1])
    candidates, number = np.ones(4, np.bool_), 8000
    first = np.zeros(4)
    pairs = dict.fromkeys(((i, j) for i in range(4) for j in range(i)), 0)
    for seed in range(number):
        first += gumbel_top_k(np.log(w) + 7.0, candidates, 1, seed)
        i, j = np.flatnonzero(gumbel_top_k(np.log(w) + 7.0, candidates, 2, seed)).tolist()
        pairs[j, i] += 1
    expected = dict.fromkeys(pairs, 0.0)
    for i, j in permutations(range(4), 2):
        expected[max(i, j), min(i, j)] += w[i] * w[j] / (1 - w[i])
    for share, p in [
        *zip(first / number, w, strict=True),
        *((pairs[k] / number, expected[k]) for k in pairs),
    ]:
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / number)


def test_equal_distributions_give_weights_of_one(mixture):
    counts = np.sum([by_hand(text) for text in mixture[0]], axis=0)
    assert log_ratio(counts, counts).tolist() == [0.0] * BUCKETS
    assert np.isfinite(log_ratio(counts, np.eye(1, BUCKETS, dtype=np.int64)[0])).all()


def test_candidates_alone_are_drawn_and_keep_their_noise():
    weights = np.zeros(1000)
    everyone = gumbel_top_k(weights, np.ones(1000, np.bool_), 100, seed=3)
    candidates = everyone | (np.arange(1000) < 500)
    assert (gumbel_top_k(weights, candidates, 100, seed=3) == everyone).all()
    assert not (gumbel_top_k(weights, ~everyone, 100, seed=3) & everyone).any()


def test_the_choice_depends_on_its_seed_and_on_no_number_of_workers(resampling, tmp_path, small_chunks):
    def chosen(workers, seed, run_seed):
        folder = str(tmp_path / f"prepared-{workers}-{seed}-{run_seed}")
        config = resampling(seed=seed, prepare_workers=workers, prepared_dir=folder)
        return prepare_data(config, run_seed, progress=False).train.document_digests.tolist()

    one = chosen(1, 0, 0)
    assert chosen(3, 0, 5) == one
    assert chosen(1, 1, 0) != one


def test_the_manifest_says_what_the_weights_came_from_and_they_are_computed_once(resampling, monkeypatch):
    config = resampling(seed=4)
    first = prepare_data(config, 0, progress=False)
    folder = weights_folder(config)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["seed"], manifest["fraction"], manifest["chosen"]) == (4, 0.2, 60)
    assert (manifest["documents"], manifest["ngrams"], manifest["buckets"]) == (300, 2, BUCKETS)
    assert manifest["target_files"] == [config.resampling.target_files]
    assert len(manifest["train_hash"]) == len(manifest["target_hash"]) == 64

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr("llmnorm.data.resampling._weights", fail)
    again = prepare_data(config, 0, progress=False)
    assert again.train.document_digests.tolist() == first.train.document_digests.tolist()


def test_validation_is_what_it_is_without_resampling(resampling, mixture):
    plain = prepare_data(resampling(validation_fraction=0.1), 0, progress=False)
    config = resampling(validation_fraction=0.1)
    config.resampling = None
    without = prepare_data(config, 0, progress=False)
    held_out = plain.validation["validation"].document_digests.tolist()
    assert held_out == without.validation["validation"].document_digests.tolist()
    assert len(held_out) == 30
    trained = plain.train.document_digests.tolist()
    assert len(trained) == round(0.2 * 270)
    assert not set(trained) & set(held_out)
    assert set(trained) < set(without.train.document_digests.tolist())


@pytest.mark.parametrize(
    ("documents", "targets", "message"),
    [
        (["one document only"], ["target"], "1 training document to choose from; give files with many"),
        (["one", "two", "three"], ["   "], r"data.resampling.target_files hold no words"),
    ],
)
def test_text_that_leaves_no_choice_is_refused(tmp_path, tokenizer, data_config, documents, targets, message):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = data_config(
        train_files=str(write_jsonl(tmp_path / "train.jsonl", documents)),
        tokenizer=str(tmp_path / "tokenizer"),
        resampling=SimpleNamespace(
            target_files=str(write_jsonl(tmp_path / "target.jsonl", targets)),
            fraction=0.5,
            seed=0,
            ngrams=2,
            buckets=BUCKETS,
        ),
    )
    with pytest.raises(UserError, match=message):
        prepare_data(config, 0, progress=False)


def test_a_stream_cannot_be_resampled():
    with pytest.raises(UserError, match=r"data.resampling weighs every document .* data.streaming: false"):
        load_run_config(
            None,
            {
                "output_dir": "run",
                "model.preset": "2m",
                "data.train_files": "hf:allenai/c4:en",
                "data.tokenizer": "t5-base",
                "data.streaming": True,
                "data.sequence_length": 32,
                "data.resampling": {"target_files": "x.txt", "fraction": 0.1},
                "optimizer.name": "adamw",
                "optimizer.lr": 1e-3,
                "train.max_steps": 1,
                "train.global_batch_size": 1,
            },
        )
