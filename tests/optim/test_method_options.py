"""The optimizer section of a run and `create_optimizer` take the same options with the same defaults."""

from __future__ import annotations

from typing import get_args

import pytest
from matrix_cases import groups, make_parameters

from llmnorm.config.describe import sections_in, variant_name
from llmnorm.config.optimizers import CUSTOM, OptimizerSection
from llmnorm.optim import create_optimizer
from llmnorm.optim.registry import MATRIX_METHODS

SECTIONS = {variant_name(section): section for section in sections_in(get_args(OptimizerSection)[0])}
del SECTIONS[CUSTOM]  # whose options are those of a class that only a run knows


def test_every_method_has_a_section_and_every_section_a_method():
    assert sorted(SECTIONS) == create_optimizer.names()


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_options_agree(name):
    section = SECTIONS[name](lr=1e-3)
    assert sorted(section.options(seed=0)) == sorted(create_optimizer.options(name))


@pytest.mark.parametrize("name", sorted(MATRIX_METHODS))
def test_defaults_agree(name):
    configured = SECTIONS[name](lr=1e-3).options(seed=0)
    for key in (
        "qk_clip",
        "fused_backward",
        "lr_multipliers",
    ):  # for create_optimizer, around whatever the class does
        configured.pop(key, None)
    defaults = MATRIX_METHODS[name](groups(make_parameters())).defaults
    assert {key: defaults[key] for key in configured} == configured


@pytest.mark.parametrize(
    "name", [name for name, section in SECTIONS.items() if "seed" in section.model_fields]
)
def test_random_numbers_come_from_the_run_unless_the_method_has_its_own_seed(name):
    assert SECTIONS[name](lr=1e-3).options(seed=7)["seed"] == 7
    assert SECTIONS[name](lr=1e-3, seed=3).options(seed=7)["seed"] == 3


def test_psgd_kron_is_a_method_with_random_numbers():
    assert "seed" in SECTIONS["psgd_kron"].model_fields
