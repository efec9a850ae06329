"""Training samples: rows of input ids and targets, each a pure function of its position in the run.

    epoch, i = divmod(position, num_samples)        row = recipe(pi_(seed, epoch)(i))

labels are shifted already: labels[t] is the target of input_ids[t], and -100 where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmnorm.data.dataset import TokenDataset
from llmnorm.data.order import permute
from llmnorm.errors import UserError

NO_TARGET = -100
Rows = dict[str, np.ndarray]


def packed_rows(windows: np.ndarray, begins: np.ndarray | None) -> Rows:
    """Rows from windows of consecutive tokens: input_ids = w[:T], labels = w[1:T+1].

    windows: int64 [B, T+1]. begins: bool [B, T+1], true where a document begins in the window, to keep
    documents apart, or None. Kept apart, `position_ids` counts from 0 at each document (and at the row's
    start), which is what the model blocks attention by, and the step from a document's EOS to the next
    document's first token has no target: nothing the model may see there says what comes next.
    """
    rows = {"input_ids": windows[:, :-1].copy(), "labels": windows[:, 1:].copy()}
    if begins is not None:
        rows["labels"][begins[:, 1:]] = NO_TARGET
        positions = np.arange(windows.shape[1] - 1)
        starts = np.maximum.accumulate(np.where(begins[:, :-1], positions, 0), axis=1)
        rows["position_ids"] = positions - starts
    return rows


def galore_rows(
    documents: list[np.ndarray], sequence_length: int, eos_token_id: int, pad_token_id: int
) -> Rows:
    """One document in each row, truncated or padded to T tokens.

    The convention of "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (arXiv
    2403.03507) and of the papers that share its script.

    documents: ids with their EOS. A document of more than T tokens keeps its first T-1 and EOS, as the T5
    tokenizer truncates. Of the T tokens, T-1 have a target: labels[t] = ids[t+1], and -100 at the last
    token and at padding. Padding is at the end, so that causal attention never reads it and no mask is
    needed.
    """
    shape = (len(documents), sequence_length)
    rows = {"input_ids": np.full(shape, pad_token_id), "labels": np.full(shape, NO_TARGET)}
    for input_ids, labels, document in zip(rows["input_ids"], rows["labels"], documents, strict=True):
        length = min(len(document), sequence_length)
        input_ids[:length] = document[:length]
        input_ids[length - 1] = eos_token_id
        labels[: length - 1] = input_ids[1:length]
    return rows


class _Recipe(Protocol):
    """How many rows a dataset makes, and those of given indices: [B] to {name: int64 [B, T]}."""

    num_rows: int

    def rows(self, indices: np.ndarray) -> Rows: ...


class _Packed:
    """Row i is tokens [i*T, i*T + T + 1) of the stream of documents, each ended by EOS."""

    def __init__(self, samples: TrainingSamples) -> None:
        self._dataset, self._length = samples.dataset, samples.sequence_length
        self._document_masking = samples.document_masking
        self.num_rows = max(samples.dataset.num_tokens - 1, 0) // samples.sequence_length

    def rows(self, indices: np.ndarray) -> Rows:
        starts = indices * self._length
        windows = self._dataset.windows(starts, self._length + 1)
        masking = self._document_masking
        return packed_rows(
            windows, self._dataset.document_begins(starts, self._length + 1) if masking else None
        )


class _Galore:
    """Row i is document i."""

    def __init__(self, samples: TrainingSamples) -> None:
        assert samples.pad_token_id is not None, "the galore recipe needs a pad_token_id"
        self._dataset, self._length = samples.dataset, samples.sequence_length
        self._pad_token_id = samples.pad_token_id
        self.num_rows = samples.dataset.num_documents

    def rows(self, indices: np.ndarray) -> Rows:
        starts, stops = self._dataset.document_spans(indices)
        stops = np.minimum(stops, starts + self._length)
        documents = [self._dataset.read(*span) for span in zip(starts.tolist(), stops.tolist(), strict=True)]
        return galore_rows(documents, self._length, self._dataset.eos_token_id, self._pad_token_id)


RECIPES: dict[str, Callable[[TrainingSamples], _Recipe]] = {"packed": _Packed, "galore": _Galore}


@dataclass
class TrainingSamples:
    """The endless sequence of a dataset's training samples: every row once an epoch, in another order each.

    recipe: packed (`packed_rows`) or galore (`galore_rows`, which needs `pad_token_id`).
    Raises `UserError` if the text is shorter than one window, or document_masking would do nothing.
    """

    dataset: TokenDataset
    sequence_length: int
    recipe: str = "packed"
    document_masking: bool = False
    seed: int = 0
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_masking(self.recipe, self.document_masking)
        window = self.sequence_length + 1
        if self.dataset.num_tokens < window:
            raise UserError(
                f"data.train_files hold {self.dataset.num_tokens} tokens in all, fewer than one window of "
                f"data.sequence_length + 1 = {window}; give more text or lower data.sequence_length"
            )
        self._rows = RECIPES[self.recipe](self)

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self._rows.num_rows

    def batch(self, positions: np.ndarray) -> Rows:
        """The samples at positions [B] of the run.

        {"input_ids", "labels"[, "position_ids"]}: int64 [B, T].
        """
        epochs, indices = np.divmod(positions, self.num_samples)
        rows = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            members = epochs == epoch
            rows[members] = permute(indices[members], self.num_samples, self.seed, epoch)
        return self._rows.rows(rows)

    def sample(self, position: int) -> Rows:
        """The sample at one position: int64 [T] arrays."""
        return {name: array[0] for name, array in self.batch(np.array([position])).items()}


def check_masking(recipe: str, document_masking: bool) -> None:
    """Raise `UserError` for document masking in a recipe where a row is one document anyway."""
    if recipe == "galore" and document_masking:
        raise UserError(
            "data.document_masking=true does nothing with data.recipe=galore, whose rows hold one document "
            "each; drop it, or use data.recipe=packed"
        )


def padding_id(tokenizer: Any) -> int:
    """The id that fills rows. EOS where there is no pad token: targets are masked by place, not by id."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
