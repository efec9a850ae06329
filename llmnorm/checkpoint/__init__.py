"""Sharded safetensors with a JSON index, published by a rename, readable by any process count."""

from llmnorm.checkpoint.reading import (
    load_full,
    newest_checkpoint,
    newest_text,
    published_steps,
    read_state,
    read_tensors,
    read_whole,
)
from llmnorm.checkpoint.state import (
    model_tensors,
    optimizer_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)
from llmnorm.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "load_full",
    "model_tensors",
    "newest_checkpoint",
    "newest_text",
    "optimizer_tensors",
    "published_steps",
    "read_state",
    "read_tensors",
    "read_whole",
    "restore_optimizer",
    "restore_rng",
    "rng_tensors",
]
