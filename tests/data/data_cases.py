"""Texts that the data tests share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

SHAKESPEARE = Path(__file__).parents[2] / "samples" / "tinyshakespeare"


def write_jsonl(path: Path, documents: Iterable[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in documents), encoding="utf-8")
    return path


def any_text(generator: random.Random, length: int) -> str:
    """Any characters that UTF-8 can hold: half of them printable ASCII, spaces, line ends and digits."""
    common = [chr(code) for code in range(32, 127)] + list("  \n\n\t\r0123456789")
    anything = [range(0, 0xD800), range(0xE000, 0x110000)]
    return "".join(
        generator.choice(common)
        if generator.random() < 0.5
        else chr(generator.choice(generator.choice(anything)))
        for _ in range(length)
    )


def naive_tokens(tokenizer, documents: Iterable[str]) -> np.ndarray:
    """What a prepared set must hold: each document encoded by itself, then EOS."""
    tokens: list[int] = []
    for text in documents:
        tokens += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return np.array(tokens)
