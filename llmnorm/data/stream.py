"""Second-class reading: text is fetched, tokenized and packed while the model trains, and nothing is kept.

Good to try a large dataset now. Not good to resume: the order of a stream cannot be entered in the middle,
so a resumed run begins the stream again in another order, and reads some documents twice and others later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from llmnorm.data.batches import BatchShape, StepBatch
from llmnorm.data.dataset import beyond_vocabulary
from llmnorm.data.documents import Piece, checked_text, text_pieces
from llmnorm.data.encoding import encode_pieces, encoding_tokenizer
from llmnorm.data.files import check_column
from llmnorm.data.hub import HubDataset
from llmnorm.data.samples import Rows, check_masking, galore_rows, packed_rows, padding_id
from llmnorm.data.sources import Source, resolve_sources
from llmnorm.errors import UserError

logger = logging.getLogger("llmnorm.data")

SHUFFLE_BUFFER = 10_000


@dataclass
class StreamingSamples:
    """Samples of text that is read as it trains; `training_loader` takes them as it takes `TrainingSamples`.

    Each process reads the documents whose number is its rank modulo the number of processes, through a
    buffer of `SHUFFLE_BUFFER` documents from which it draws by (seed, start, epoch). Rows are made as by
    the recipes of `TrainingSamples`. Positions only count samples.
    """

    sources: Sequence[Source]
    tokenizer: Any
    sequence_length: int
    recipe: str = "packed"
    document_masking: bool = False
    seed: int = 0
    text_field: str = "text"
    vocab_size: int | None = None  # of the model; None: any id is good

    def __post_init__(self) -> None:
        self.sources = resolve_sources(self.sources)
        check_masking(self.recipe, self.document_masking)

    def documents(self, shape: BatchShape, start: int) -> Iterator[np.ndarray]:
        """This process's documents as ids with EOS, epoch after epoch, without end."""
        for epoch in count():
            document = None
            generator = np.random.default_rng([self.seed, start, epoch])
            for document in _shuffled(self._encoded(shape, int(generator.integers(1 << 31))), generator):
                yield document
            if document is None:
                raise UserError(
                    f"data.streaming: process {shape.rank} of {shape.world_size} got no documents; give "
                    "more, or set data.streaming=false"
                )

    def _encoded(self, shape: BatchShape, seed: int) -> Iterator[np.ndarray]:
        backend = encoding_tokenizer(self.tokenizer.backend_tokenizer.to_str())
        eos = np.array([self.tokenizer.eos_token_id])
        ids: list[int] = []
        for piece in self._pieces(shape, seed):
            ids += encode_pieces(backend, [piece])[0]
            if piece.closes:
                if self.vocab_size is not None and max(ids, default=0) >= self.vocab_size:
                    raise beyond_vocabulary("a streamed document", max(ids), self.vocab_size)
                yield np.concatenate((np.array(ids, np.int64), eos))
                ids = []

    def _pieces(self, shape: BatchShape, seed: int) -> Iterator[Piece]:
        number = 0
        for source in self.sources:
            if isinstance(source, HubDataset):
                yield from self._hub_pieces(source, shape, seed)
                continue
            for chunk in source.chunks(self.text_field):
                for piece in chunk.pieces():
                    if piece.text and number % shape.world_size == shape.rank:
                        yield piece
                    number += piece.closes and bool(piece.text)

    def _hub_pieces(self, source: HubDataset, shape: BatchShape, seed: int) -> Iterator[Piece]:
        from datasets.distributed import split_dataset_by_node

        # Of the stream's own shuffle only the order of its shards is wanted: documents are mixed in
        # _shuffled.
        stream = source.stream().shuffle(seed=seed, buffer_size=1)
        for row in split_dataset_by_node(stream, rank=shape.rank, world_size=shape.world_size):
            check_column(source.name, self.text_field, list(row), num_rows=1)
            text = checked_text(row[self.text_field], source.name, self.text_field)
            if text:
                yield from text_pieces(text, source.name)


def _shuffled(documents: Iterator[np.ndarray], generator: np.random.Generator) -> Iterator[np.ndarray]:
    buffer: list[np.ndarray] = []
    for document in documents:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(document)
            continue
        slot = int(generator.integers(SHUFFLE_BUFFER))
        buffer[slot], document = document, buffer[slot]
        yield document
    for slot in generator.permutation(len(buffer)):
        yield buffer[slot]


def _packed(documents: Iterator[np.ndarray], num_rows: int, samples: StreamingSamples) -> Iterator[Rows]:
    length = samples.sequence_length
    tokens, begins = np.empty(0, np.int64), np.empty(0, np.bool_)
    while True:
        parts, flags, size = [tokens], [begins], len(tokens)
        while size < num_rows * length + 1:
            document = next(documents)
            parts.append(document)
            flags.append(np.arange(len(document)) == 0)
            size += len(document)
        tokens, begins = np.concatenate(parts), np.concatenate(flags)
        cut = np.arange(num_rows)[:, None] * length + np.arange(length + 1)
        yield packed_rows(tokens[cut], begins[cut] if samples.document_masking else None)
        tokens, begins = tokens[num_rows * length :], begins[num_rows * length :]


def _galore(documents: Iterator[np.ndarray], num_rows: int, samples: StreamingSamples) -> Iterator[Rows]:
    tokenizer = samples.tokenizer
    while True:
        batch = [next(documents) for _ in range(num_rows)]
        yield galore_rows(batch, samples.sequence_length, tokenizer.eos_token_id, padding_id(tokenizer))


RECIPES: dict[str, Callable[[Iterator[np.ndarray], int, StreamingSamples], Iterator[Rows]]] = {
    "packed": _packed,
    "galore": _galore,
}


class StreamedSteps(IterableDataset[StepBatch]):
    """The steps in order. A user's mistake found in a worker process is passed on as an item."""

    def __init__(self, samples: StreamingSamples, shape: BatchShape, start: int) -> None:
        self._samples, self._shape, self._start = samples, shape, start
        if shape.rank == 0:
            logger.warning(
                "data.streaming: resuming is approximate: a resumed run reads the stream from its "
                "beginning in another order; data.streaming=false resumes exactly"
            )

    def __iter__(self) -> Iterator[Any]:
        shape, samples = self._shape, self._samples
        num_rows = shape.micro_batches * shape.micro_batch_size
        try:
            rows = RECIPES[samples.recipe](samples.documents(shape, self._start), num_rows, samples)
            for step, batch in enumerate(rows):
                yield shape.step(self._start + step * shape.global_batch_size, batch)
        except UserError as error:
            yield error
