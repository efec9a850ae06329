"""Every norm and attention still trains as it did: 20 losses against the committed ones; twice the same."""

from __future__ import annotations

import json

import pytest
from golden_losses import ATTENTION_LOSSES, ATTENTIONS, LOSSES, losses

from llmnorm.modeling import PRESETS

GOLDEN = json.loads(LOSSES.read_text())
GOLDEN_ATTENTION = json.loads(ATTENTION_LOSSES.read_text())


def test_every_norm_has_golden_losses() -> None:
    assert set(GOLDEN) == set(PRESETS)


@pytest.mark.parametrize("norm", GOLDEN)
def test_losses(norm: str) -> None:
    measured = losses(norm)
    # 1e-3: processors round differently, and 20 steps let that grow; a changed gradient or seed shows.
    assert measured == pytest.approx(GOLDEN[norm], rel=1e-3)
    assert measured == losses(norm)
    assert measured[-1] < measured[0] - 1.0


def test_every_attention_has_golden_losses() -> None:
    assert set(GOLDEN_ATTENTION) == set(ATTENTIONS)


@pytest.mark.parametrize("name", GOLDEN_ATTENTION)
def test_losses_of_attentions(name: str) -> None:
    measured = losses(**ATTENTIONS[name])
    assert measured == pytest.approx(GOLDEN_ATTENTION[name], rel=1e-3)
    assert measured[-1] < measured[0] - 1.0
