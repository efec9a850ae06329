"""The papers' biased count, by hand and against a transcription of its equation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llmnorm.errors import UserError
from llmnorm.evaluation import galore_legacy, perplexity

PAD = 0


class Uniform(torch.nn.Module):
    """ln 4 nats for token 1, ln 2 for token 2, ln 4 for token 3, whatever came before."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([1e-30, 0.25, 0.5, 0.25]).log())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool):
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, 4))


def test_the_value_by_hand() -> None:
    rows = [[1, 2, 2], [1, 1, 1, 1], [3, 2], [1, 3, 2, 2, 2, 2]]
    ln2 = math.log(2)
    # Batches of two rows, cut to 4 tokens. First: targets 2 2 | 1 1 1, so (1 + 1 + 2 + 2 + 2) ln 2 / 5.
    # Second: 2 | 3 2 2, so (1 + 2 + 1 + 1) ln 2 / 4. Divided by 2 batches + 1.
    expected = (8 / 5 + 5 / 4) * ln2 / 3
    result = galore_legacy(Uniform(), rows, pad_token_id=PAD, batch_size=2, context_length=4)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.tokens, result.convention) == (9, "galore_legacy")
    assert result.nll_sum == pytest.approx(13 * ln2, rel=1e-6)

    # One row each: 1 ln 2, 2 ln 2, 1 ln 2, 4/3 ln 2 over 4 + 1: another number for the same text.
    by_ones = galore_legacy(Uniform(), rows, pad_token_id=PAD, batch_size=1, context_length=4)
    assert by_ones.loss == pytest.approx((1 + 2 + 1 + 4 / 3) * ln2 / 5, rel=1e-6)
    assert by_ones.nll_sum == pytest.approx(result.nll_sum, rel=1e-6)

    # Two processes take rows 0, 2 and 1, 3; each divides by its own count plus one, then the mean.
    halves = galore_legacy(Uniform(), rows, pad_token_id=PAD, batch_size=1, context_length=4, processes=2)
    assert halves.loss == pytest.approx(((1 + 1) / 3 + (2 + 4 / 3) / 3) * ln2 / 2, rel=1e-6)


def test_a_process_stops_once_it_has_seen_its_share_of_the_target() -> None:
    rows = [[1, 2, 2]] * 10  # 3 tokens a batch, so a process stops before the batch that begins beyond 7
    result = galore_legacy(Uniform(), rows, pad_token_id=PAD, batch_size=1, context_length=4, target_tokens=7)
    assert result.tokens == 2 * 3 and result.loss == pytest.approx(3 * math.log(2) / 4, rel=1e-6)
    result = galore_legacy(
        Uniform(), rows, pad_token_id=PAD, batch_size=1, context_length=4, target_tokens=7, processes=2
    )
    assert result.tokens == 2 * 4, "two processes stop after 3.5 tokens each"


@torch.no_grad()
def test_equals_the_equation_on_a_model(llama: LlamaForCausalLM) -> None:
    generator = np.random.default_rng(3)
    rows = [generator.integers(1, 97, generator.integers(2, 40)).tolist() for _ in range(23)]
    losses: list[list[float]] = [[], []]
    for process in range(2):
        own = rows[process::2]
        for first in range(0, len(own), 5):
            batch = torch.full((len(own[first : first + 5]), 32), PAD)
            for padded, row in zip(batch, own[first : first + 5], strict=True):
                padded[: len(row[:32])] = torch.tensor(row[:32])
            labels = batch[:, 1:].masked_fill(batch[:, 1:] == PAD, -100)
            logits = llama(batch).logits[:, :-1]
            losses[process].append(float(F.cross_entropy(logits.flatten(0, 1), labels.flatten())))
    expected = sum(sum(own) / (len(own) + 1) for own in losses) / 2
    options = {"pad_token_id": PAD, "batch_size": 5, "context_length": 32, "processes": 2}
    assert galore_legacy(llama, rows, **options).loss == pytest.approx(expected, rel=1e-6)


def test_it_is_low_by_n_over_n_plus_one(llama: LlamaForCausalLM, stream: np.ndarray) -> None:
    """On full rows the only other difference is that every row's first token is unscored."""
    rows = stream[1:993].reshape(-1, 32).clip(1).tolist()
    result = galore_legacy(llama, rows, pad_token_id=PAD, batch_size=1, context_length=32)
    exact = result.nll_sum / result.tokens
    assert result.loss == pytest.approx(exact * 31 / 32, rel=1e-9)
    whole = perplexity(llama, np.array(rows).ravel(), 31)
    assert exact == pytest.approx(whole.loss, rel=0.05)


def test_mistakes_are_named() -> None:
    options = {"pad_token_id": PAD, "context_length": 4}
    with pytest.raises(UserError, match="1 documents are too few for the galore_legacy convention with 2"):
        galore_legacy(Uniform(), [[1, 2]], batch_size=1, processes=2, **options)
    with pytest.raises(UserError, match="documents 1 to 1 of a process hold no token to predict"):
        galore_legacy(Uniform(), [[1, 2], [3]], batch_size=1, **options)
    with pytest.raises(UserError, match="batch_size=0"):
        galore_legacy(Uniform(), [[1, 2]], batch_size=0, **options)
