"""Values that an option cannot have are refused by name, given to the class or to one of its groups."""

from __future__ import annotations

import math

import pytest
import torch

from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer
from llmnorm.optim.option_ranges import RANGES
from llmnorm.optim.registry import MATRIX_METHODS

MISTAKES = [
    ("galore", "lr", "x"),
    ("galore", "lr", None),
    ("galore", "lr", math.nan),
    ("galore", "lr", math.inf),
    ("galore", "lr", torch.tensor(-1.0)),
    ("galore", "weight_decay", math.nan),
    ("galore", "rank", 0),
    ("galore", "rank", 0.5),
    ("galore", "rank", 2.5),
    ("galore", "rank", True),
    ("galore", "rank", "4"),
    ("galore", "update_proj_gap", -1),
    ("galore", "update_proj_gap", math.inf),
    ("galore", "update_proj_gap", None),
    ("galore", "scale", -0.25),
    ("galore", "scale", math.inf),
    ("galore", "projection", "qr"),
    ("galore", "state_bits", 3),
    ("galore", "betas", (0.9,)),
    ("galore", "betas", (0.9, 0.99, 0.999)),
    ("galore", "betas", 0.9),
    ("galore", "betas", (0.9, math.nan)),
    ("galore", "stagger", "yes"),
    ("galore", "lazy_refresh", "no"),
    ("galore", "variant", "published"),
    ("apollo", "granularity", "row"),
    ("dct_adamw", "moments", "reset"),
    ("dct_adamw", "error_feedback", 3),
    ("adamw8bit", "state_bits", 32),
    ("adamw8bit", "quantize_embeddings", "x"),
    ("spam", "warmup_steps", 500),
    ("spam", "grace_steps", 500),
    ("spam", "threshold", math.inf),
    ("stable_spam", "gammas", (0.7, 0.9)),
    ("stable_spam", "gammas", 0.7),
    ("stable_spam", "cosine_steps", 2.5),
    ("stable_spam", "variant", "published"),
]


@pytest.mark.parametrize(("name", "key", "value"), MISTAKES)
def test_a_mistake_is_named_with_its_value(name, key, value):
    weight = torch.zeros(32, 16, requires_grad=True)
    method = MATRIX_METHODS[name]
    for build in (
        lambda: method([weight], **{"lr": 0.01, key: value}),
        lambda: method([{"params": [weight], key: value}], lr=0.01),
    ):
        with pytest.raises(UserError) as error:
            build()
        shown = value if key in ("warmup_steps", "grace_steps", "moments") else repr(value)
        assert f"optimizer.{key}={shown}" in str(error.value)


@pytest.mark.parametrize("lr", ["x", None, math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("name", ["adamw", "galore", "torch.optim.SGD"])
def test_create_optimizer_wants_a_rate_that_is_a_positive_number(name, lr):
    with pytest.raises(UserError, match=rf"optimizer.lr={lr}"):
        create_optimizer(name, torch.nn.Linear(16, 32), lr=lr)


def test_clocks_of_the_released_code_are_not_an_option():
    weight = torch.zeros(4, 4, requires_grad=True)
    with pytest.raises(UserError, match=r"optimizer.reset_clock=global would do nothing"):
        MATRIX_METHODS["stable_spam"]([weight], variant="released", reset_clock="global")


@pytest.mark.parametrize("name", sorted(MATRIX_METHODS))
def test_every_default_is_in_its_range(name):
    defaults = MATRIX_METHODS[name]([torch.zeros(8, 8, requires_grad=True)]).defaults
    for key in defaults.keys() & RANGES.keys():
        rule, holds = RANGES[key]
        assert holds(defaults[key]), f"{key}={defaults[key]!r} must be {rule}"
