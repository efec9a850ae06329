"""Training of tokenizers that give back every UTF-8 text exactly, and split numbers into digits.

bpe: byte-level BPE of the `tokenizers` library; all 256 bytes are in its alphabet.
unigram: the unigram model of sentencepiece (Kudo, "Subword Regularization", arXiv 1804.10959), for
characters it
    does not know with byte fallback. Spaces stay spaces in the pieces: with sentencepiece's own U+2581 in
    their place, a U+2581 in the text would come back as a space.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from llmnorm.errors import UserError

SPACE_IN_PIECES = "\u2581"
# Sentencepiece sums over its threads' parts, so that another number of threads would be another tokenizer.
SENTENCEPIECE_THREADS = 4
SENTENCE_BYTES = 4096
# A space goes with the word after it, other whitespace stays together; digits are split before.
WORDS = r" ?[^\s]+|\s+(?!\S)|\s+"


class Trainer:
    """The handler of a training process: (kind, vocab_size, special tokens, texts) to tokenizer JSON."""

    def __call__(self, request: tuple[str, int, list[str], list[str]]) -> str:
        kind, vocab_size, special_tokens, texts = request
        tokenizer = TRAINERS[kind](vocab_size, special_tokens, texts)
        return tokenizer.to_str()


def train_bpe(vocab_size: int, special_tokens: list[str], texts: list[str]) -> Tokenizer:
    """Byte-level BPE, the special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_unigram(vocab_size: int, special_tokens: list[str], texts: list[str]) -> Tokenizer:
    """Unigram pieces learned by sentencepiece, in a tokenizer that needs no normalization."""
    import sentencepiece

    pad, bos, eos, unk = special_tokens
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            max_sentence_length=2 * SENTENCE_BYTES,
            num_threads=SENTENCEPIECE_THREADS,
            minloglevel=2,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=pad,
            bos_piece=bos,
            eos_piece=eos,
            unk_piece=unk,
        )
    except RuntimeError as error:
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"data.tokenizer.vocab_size={vocab_size} is below {needed[1]}, which unigram needs for this "
                f"text: 256 bytes, {len(special_tokens)} special tokens, and the text's characters; raise it "
                f"to {needed[1]} or more, or use {{train: bpe}}, which needs only {256 + len(special_tokens)}"
            ) from error
        raise UserError(
            f"data.tokenizer.vocab_size={vocab_size}: sentencepiece could not train on this text "
            f"({str(error).strip()}); change vocab_size, give more text, or use {{train: bpe}}"
        ) from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    vocabulary = [
        (pieces.IdToPiece(i).replace(SPACE_IN_PIECES, " "), pieces.GetScore(i)) for i in range(len(pieces))
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Also keeps a text's own "<0x0A>" from being read as the piece for that byte.
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    return tokenizer


def _sentences(texts: list[str]) -> Iterator[str]:
    """Lines, the long ones cut: sentencepiece drops what is longer than its limit."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), SENTENCE_BYTES // 4):
                yield line[start : start + SENTENCE_BYTES // 4]


TRAINERS: dict[str, Callable[[int, list[str], list[str]], Any]] = {"bpe": train_bpe, "unigram": train_unigram}
