"""From the `data` section of a config to a tokenizer, training samples and validation sets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmnorm.data.dataset import TokenDataset
from llmnorm.data.holdout import few_documents, held_out_documents, split_documents
from llmnorm.data.hub import HubDataset
from llmnorm.data.preparing import prepare
from llmnorm.data.resampling import resampled_documents
from llmnorm.data.samples import TrainingSamples, padding_id
from llmnorm.data.sources import Source, resolve_sources
from llmnorm.data.tokenizer import load_or_train_tokenizer, vocabulary_size
from llmnorm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmnorm.data.stream import StreamingSamples

DEFAULT_PREPARED_DIR = "~/.cache/llmnorm/prepared"


@dataclass
class PreparedData:
    """What a run reads.

    train: the training tokens after `data.resampling`, None when streaming. validation: held-out tokens by
        name.
    samples: what `training_loader` takes.
    """

    tokenizer: PreTrainedTokenizerFast
    train: TokenDataset | None
    validation: dict[str, TokenDataset]
    samples: TrainingSamples | StreamingSamples

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check that the model's embedding has a row for every token; streamed text is checked as it is read.

        A vocabulary may be smaller than the tokenizer's: the last ids of T5's are sentinels that no text
        holds. Raises `UserError` naming the shard that needs more.
        """
        for dataset in (*([self.train] if self.train else []), *self.validation.values()):
            dataset.check_vocabulary(vocab_size)
        if isinstance(self.samples, TrainingSamples):
            return
        self.samples.vocab_size = vocab_size


def prepare_data(
    config: Any, seed: int, *, local_rank: int | None = None, progress: bool = True
) -> PreparedData:
    """Load or train the tokenizer, and tokenize what is not tokenized yet.

    config: the `data` section. seed: of the order of samples. local_rank: this process's number on its
    node, None to take it from LOCAL_RANK. Every process of a run calls this; the first of each node does
    the work and shows its progress, the others wait, on file locks, so that no collective can time out and
    nodes may share `prepared_dir` or not. Should the first die, another takes the work up.

    Raises `UserError` for what the user must change.
    """
    leader = (int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank) == 0
    root = Path(config.prepared_dir or DEFAULT_PREPARED_DIR).expanduser()
    sources = resolve_sources(config.train_files, "train")
    validation_sources = _validation_sources(config)
    on_hub = any(isinstance(source, HubDataset) for source in sources)
    if config.streaming and on_hub and not isinstance(config.tokenizer, str):
        raise UserError(
            "data.tokenizer={train: ...} would fetch the whole of a Hub dataset that data.streaming=true "
            "reads as it trains; give an existing tokenizer or set data.streaming=false"
        )
    # Of few documents the tails are held out here; of many, whole ones once they are tokenized.
    held_out_fraction = config.validation_fraction
    if held_out_fraction:
        few = few_documents(sources, config.text_field, held_out_fraction)
        heads, tails = split_documents(few or [], held_out_fraction)
        if tails:
            sources, validation_sources, held_out_fraction = heads, {"validation": tails}, 0.0

    tokenizer = load_or_train_tokenizer(
        config.tokenizer,
        sources,
        root,
        config.text_field,
        validation_fraction=held_out_fraction,
        leader=leader,
    )

    def prepared(these: list[Source]) -> TokenDataset:
        dataset = prepare(
            these,
            tokenizer,
            root,
            text_field=config.text_field,
            workers=config.prepare_workers,
            progress=progress,
            leader=leader,
        )
        if leader:
            dataset.verify(tokenizer, vocabulary_size(tokenizer))
        return dataset

    recipe = (config.sequence_length, config.recipe, config.document_masking, seed)
    validation = {name: prepared(these) for name, these in validation_sources.items()}
    if config.streaming:
        from llmnorm.data.stream import StreamingSamples

        streamed = StreamingSamples(sources, tokenizer, *recipe, config.text_field)
        return PreparedData(tokenizer, None, validation, streamed)
    train = prepared(sources)
    chosen = None
    if held_out_fraction:
        chosen = held_out_documents(train.document_digests, held_out_fraction)
        validation = {"validation": train.select(chosen)}
    if config.resampling is not None:
        candidates = np.ones(train.num_documents, np.bool_) if chosen is None else ~chosen
        kept = resampled_documents(
            config.resampling,
            sources,
            candidates,
            root,
            text_field=config.text_field,
            workers=config.prepare_workers,
            leader=leader,
            progress=progress,
        )
        train = train.select(kept)
    elif chosen is not None:
        train = train.select(~chosen)
    samples = TrainingSamples(train, *recipe, padding_id(tokenizer))
    return PreparedData(tokenizer, train, validation, samples)


def _validation_sources(config: Any) -> dict[str, list[Source]]:
    files = config.validation_files
    if files and config.validation_fraction:
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} and data.validation_files are both set; "
            "validation text is either held out or read from files, so drop one of them"
        )
    if config.validation_fraction and config.streaming:
        raise UserError(
            f"data.validation_fraction={config.validation_fraction} cannot be held out with "
            "data.streaming=true; give data.validation_files or set data.streaming=false"
        )
    named = files if isinstance(files, dict) else {"validation": files} if files else {}
    return {name: resolve_sources(these, "validation") for name, these in named.items()}
