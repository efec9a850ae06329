"""Importance resampling of training documents: "Data Selection for Language Models via Importance Resampling"
(DSIR, arXiv 2302.03169).

    log w(x) = sum over n-grams of x of  log(p_target[b] + 1e-8) - log(p_raw[b] + 1e-8)
    chosen: the documents with the largest  log w(x) + G(x),  G Gumbel(0, 1)

which draws without replacement in proportion to w. b = SHA-256 of the n-gram modulo `buckets`; n-grams are
the words (runs of letters and digits, runs of other marks) of the lower-cased text and, up to `ngrams`,
neighbors joined by a space; p are the shares of the buckets in all of the training files and in the target
files. log w grows with the length of a document, as in the paper. G is a function of (seed, number of the
document), so that neither workers nor shards change the choice. A document over 2 MiB is read in parts,
without the n-grams that span two of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import llmnorm
from llmnorm.data.content import content_hashes
from llmnorm.data.documents import Chunk
from llmnorm.data.durable import cannot_write, exclusive, give_way, writable_folder, write_durably
from llmnorm.data.order import keyed_uniform
from llmnorm.data.progress import Progress
from llmnorm.data.sources import Source, plan_units, resolve_sources
from llmnorm.data.worker import Child, available_cpus
from llmnorm.errors import UserError

SMOOTHING = 1e-8
WORD = re.compile(r"\w+|[^\w\s]+")
FORMAT_VERSION = 1
WEIGHTS, MANIFEST = "log_weights.npy", "manifest.json"
HASHES_KEPT = 1 << 20


class BucketReader:
    """The handler of a hashing process: a chunk to its bucket counts, or with `delta` to shares of log w.

    delta: float64 [buckets], None to count. A chunk becomes int64 [buckets], or float64 [2, pieces]: each
    piece's share of log w, and whether its document ends there.
    """

    def __init__(self, ngrams: int, buckets: int, delta: np.ndarray | None) -> None:
        self._ngrams, self._buckets, self._delta = ngrams, buckets, delta

        @lru_cache(HASHES_KEPT)
        def bucket(ngram: str) -> int:
            return int.from_bytes(hashlib.sha256(ngram.encode()).digest(), "big") % buckets

        self._bucket = bucket

    def buckets_of(self, text: str) -> np.ndarray:
        """The bucket of every n-gram of a text: int64 [number of n-grams]."""
        words = WORD.findall(text.lower())
        found = [self._bucket(word) for word in words]
        for n in range(2, self._ngrams + 1):
            shifted = [words[i:] for i in range(n)]
            found += [self._bucket(" ".join(ngram)) for ngram in zip(*shifted, strict=False)]
        return np.array(found, np.int64)

    def __call__(self, chunk: Chunk) -> np.ndarray:
        pieces = [piece for piece in chunk.pieces() if piece.text]
        if self._delta is not None:
            rows = [(self._delta[self.buckets_of(piece.text)].sum(), piece.closes) for piece in pieces]
            return np.array(rows, np.float64).reshape(-1, 2).T
        counts = np.zeros(self._buckets, np.int64)
        for piece in pieces:
            counts += np.bincount(self.buckets_of(piece.text), minlength=self._buckets)
        return counts


def log_ratio(target: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """delta = log(p_target + 1e-8) - log(p_raw + 1e-8): float64 [buckets], from two int64 counts."""
    return np.log(target / target.sum() + SMOOTHING) - np.log(raw / raw.sum() + SMOOTHING)


def gumbel_top_k(log_weights: np.ndarray, candidates: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Which k of the candidates are drawn: without replacement, in proportion to exp(log_weights); bool [n].

    Document i has the same noise whatever the other documents are.
    """
    uniform = keyed_uniform(np.arange(len(log_weights)), f"llmnorm resampling {seed}")
    keys = np.where(candidates, log_weights - np.log(-np.log(uniform)), -np.inf)
    chosen = np.zeros(len(keys), np.bool_)
    chosen[np.argsort(-keys, kind="stable")[:k]] = True
    return chosen & candidates


def resampled_documents(
    config: Any,
    sources: Sequence[Source],
    candidates: np.ndarray,
    root: Path,
    *,
    text_field: str,
    workers: int | None,
    leader: bool,
    progress: bool,
) -> np.ndarray:
    """Which documents a run trains on: bool [documents], true for `config.fraction` of the candidates.

    config: the section `data.resampling`. sources: what the documents were prepared from. candidates: bool
    [documents], false for those that are held out, which are never chosen. The weights are computed once and
    kept under `root` with a manifest that names what they were computed from; other processes wait for them.

    Raises `UserError` for text that cannot be read, for fewer than two candidates, and for targets without a
    word.
    """
    if candidates.sum() < 2:
        raise UserError(
            f"data.resampling has {int(candidates.sum())} training document to choose from; give files with "
            "many documents (lines of .jsonl, rows of .parquet, or many .txt), or remove data.resampling"
        )
    targets = resolve_sources(config.target_files, "train")
    header = {
        "format_version": FORMAT_VERSION,
        "method": "hashed n-gram importance weights (arXiv 2302.03169)",
        "train_hash": _joint_hash(sources, root),
        "target_hash": _joint_hash(targets, root),
        "target_files": [source.name for source in targets],
        "text_field": text_field,
        "ngrams": config.ngrams,
        "buckets": config.buckets,
        "fraction": config.fraction,
        "seed": config.seed,
        "candidates": int(candidates.sum()),
        "candidates_hash": hashlib.sha256(np.packbits(candidates).tobytes()).hexdigest(),
    }
    k = max(1, round(config.fraction * header["candidates"]))
    named = {key: value for key, value in header.items() if key != "target_files"}
    name = "resampling-" + hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]
    folder = root / name
    if not folder.is_dir():
        writable_folder(root)
        lock = root / (name + ".lock")
        if not leader:
            give_way(lock, folder.is_dir)
        with exclusive(lock):
            if not folder.is_dir():
                pool = (config.ngrams, config.buckets, workers or available_cpus())
                weights = _weights(sources, targets, text_field, pool, progress and leader)
                _write(folder, weights, {**header, "chosen": k})
    log_weights = np.load(folder / WEIGHTS, allow_pickle=False)
    if len(log_weights) != len(candidates):
        raise UserError(
            f"{folder} weighs {len(log_weights)} documents and data.train_files hold {len(candidates)}: the "
            "files changed while they were read; delete the folder and start again"
        )
    return gumbel_top_k(log_weights, candidates, k, config.seed)


def _joint_hash(sources: Sequence[Source], root: Path) -> str:
    return hashlib.sha256("\n".join(content_hashes(sources, root)).encode()).hexdigest()


def _weights(
    sources: Sequence[Source],
    targets: Sequence[Source],
    text_field: str,
    pool: tuple[int, int, int],
    progress: bool,
) -> np.ndarray:
    """log w of every document with text, in reading order: float64 [documents]."""
    ngrams, buckets, workers = pool
    counts = {}
    for key, these in (("target_files", targets), ("train_files", sources)):
        total = np.zeros(buckets, np.int64)
        for part in _read(these, text_field, (ngrams, buckets, None), workers, progress):
            total += part
        if not total.sum():
            raise UserError(
                f"data.{'resampling.' if key == 'target_files' else ''}{key} hold no words to weigh "
                "documents by; give files with text"
            )
        counts[key] = total
    delta = log_ratio(counts["target_files"], counts["train_files"])
    weights, sum_so_far = [], 0.0
    for shares, closes in _read(sources, text_field, (ngrams, buckets, delta), workers, progress):
        for share, ends in zip(shares.tolist(), closes.tolist(), strict=True):
            sum_so_far += share
            if ends:
                weights.append(sum_so_far)
                sum_so_far = 0.0
    return np.array(weights)


def _read(
    sources: Sequence[Source], text_field: str, setup: tuple[Any, ...], workers: int, progress: bool
) -> Iterator[np.ndarray]:
    """What `BucketReader` makes of each chunk, in reading order, a few chunks at a time."""
    units = plan_units(sources)
    chunks = (chunk for unit in units for chunk in unit.chunks(text_field))
    children: list[Child] = []
    try:
        with Progress("hashing", sum(unit.size for unit in units), shown=progress) as bar:
            done = 0
            for size, found in _in_order(chunks, children, setup, workers):
                done += size
                bar.update(done, 0)
                yield found
    finally:
        for child in children:
            child.close()


def _in_order(
    chunks: Iterable[Chunk], children: list[Child], setup: tuple[Any, ...], workers: int
) -> Iterator[tuple[int, np.ndarray]]:
    running: deque[tuple[int, Future[np.ndarray]]] = deque()
    for number, chunk in enumerate(chunks):
        if len(running) >= 2 * workers:
            size, future = running.popleft()
            yield size, future.result()
        if len(children) < workers:
            children.append(Child("llmnorm.data.resampling:BucketReader", *setup, threads=1, parallel=False))
        running.append((chunk.disk_bytes, children[number % len(children)].submit(chunk)))
    for size, future in running:
        yield size, future.result()


def _write(folder: Path, weights: np.ndarray, manifest: dict[str, Any]) -> None:
    partial = writable_folder(folder.with_name(folder.name + ".partial"))
    try:
        np.save(partial / WEIGHTS, weights)
        content = {**manifest, "documents": len(weights), "versions": {"llmnorm": llmnorm.__version__}}
        write_durably(partial / MANIFEST, json.dumps(content, indent=1).encode())
        partial.rename(folder)
    except OSError as error:
        raise cannot_write(folder.parent, error) from error
