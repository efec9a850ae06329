"""The leak meter: how far a token's logits read tokens that come after it, or that are of other sequences.

Statistics over a batch couple all its tokens, so in training mode the future leaks into the past and one
sequence into another; the training loss is then that of another, easier task. Running statistics do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmnorm.evaluation.precision import device_of, unwrap
from llmnorm.modeling.batch_statistics import frozen_statistics


@dataclass(frozen=True)
class FutureLeak:
    """Largest absolute change of a logit when one token changes, in training mode and in eval mode.

    train and eval are over the earlier tokens of the same sequence, train_others and eval_others over the
    other sequences of the batch. A causal model has 0.0 everywhere, exactly on a CPU.
    """

    train: float
    eval: float
    train_others: float
    eval_others: float


@torch.no_grad()
def future_leak(model: nn.Module, input_ids: Tensor, position: int | None = None) -> FutureLeak:
    """Change the token at `position` (default: the last) of the first sequence and compare the logits.

    model: a causal language model; it keeps its modes and running statistics, and dropout draws the same
    numbers both times. input_ids: [B, T], T >= 2.
    """
    module = unwrap(model)
    position = input_ids.shape[1] - 1 if position is None else position
    assert 0 < position < input_ids.shape[1], position
    ids = input_ids.to(device_of(module))
    changed = ids.clone()
    changed[0, position] = (ids[0, position] + 1) % module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    found: dict[str, tuple[float, float]] = {}
    for mode in ("train", "eval"):
        with _mode(module, mode == "train"):
            change = (_logits(module, ids) - _logits(module, changed)).abs()
        others = change[1:].max().item() if len(change) > 1 else 0.0
        found[mode] = (change[0, :position].max().item(), others)
    (train, train_others), (eval_, eval_others) = found["train"], found["eval"]
    return FutureLeak(train, eval_, train_others, eval_others)


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    devices = [ids.device] if ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return module(input_ids=ids, use_cache=False).logits


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        with frozen_statistics(module):
            yield
    finally:
        for part, was_training in before.items():
            part.training = was_training
