"""What the model reads: text -> tokenizer -> token shards with a manifest -> batches addressed by position.

The names below are imported when first used: the processes that tokenize import this package, and need
neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "PreparedData": "llmnorm.data.pipeline",
    "StepBatch": "llmnorm.data.batches",
    "StreamingSamples": "llmnorm.data.stream",
    "TokenDataset": "llmnorm.data.dataset",
    "TrainingSamples": "llmnorm.data.samples",
    "load_or_train_tokenizer": "llmnorm.data.tokenizer",
    "prepare": "llmnorm.data.preparing",
    "prepare_data": "llmnorm.data.pipeline",
    "resolve_sources": "llmnorm.data.sources",
    "tokenizer_fingerprint": "llmnorm.data.tokenizer",
    "training_loader": "llmnorm.data.loader",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmnorm.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
