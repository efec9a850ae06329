"""The generated documentation covers every key, and the committed editor schema is the current one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from llmnorm.config import RunConfig, load_run_config
from llmnorm.config.describe import catalogue, sections_in, type_in_words
from llmnorm.config.help import help_text, json_schema, json_schema_text

ROOT = Path(__file__).parents[2]


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every (dotted key, description) found by walking the classes, independently of the catalogue."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field.description or ""
        brackets = "[]" if str(field.annotation).startswith("list") else ""
        for inner in sections_in(field.annotation):
            yield from leaves(inner, f"{prefix}{name}{brackets}.")


def test_every_key_is_documented_and_listed() -> None:
    text = help_text()
    lines = {line.strip().removeprefix("--") for line in text.splitlines()}
    containers = {"model", "data", "optimizer", "schedule", "train", "guards", "checkpoint", "evaluation"}
    containers |= {"parallel", "diagnostics", "export", "paper"}
    keys = dict(leaves(RunConfig))
    assert len(keys) > 90
    for key, description in keys.items():
        assert description.endswith("."), f"{key} has no description"
        if key not in containers:
            assert key in lines, f"--help does not list {key}"


def test_an_entry_has_type_default_and_meaning() -> None:
    text = " ".join(help_text().split())
    assert "--train.max_steps integer >= 1; required Optimizer updates." in text
    assert "--train.precision fp32 | bf16 | bf16_pure; default bf16 " in text
    assert "--optimizer.betas list of 2 numbers, each number >= 0 and < 1; default [0.9, 0.999]" in text
    assert "--schedule.decay_steps integer >= 1 or null; default null; with wsd only" in text
    assert "default 0.1 for cosine, 0.0 for linear and wsd and refined; with cosine or linear or wsd" in text
    assert "--model.norm pre_ln | post_ln | mix_ln" in text
    assert all(len(line) <= 100 for line in help_text(100).splitlines())


def test_types_in_words() -> None:
    assert type_in_words(int | None) == "integer or null"
    assert catalogue()["data.validation_fraction"].type == "number >= 0 and < 1"
    assert catalogue()["data.tokenizer"].type == "text or mapping"
    assert catalogue()["model.norm"].type.endswith("or a list of these")


def test_the_committed_schema_is_current() -> None:
    committed = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert committed == json_schema_text(), "run: llmnorm schema --output configs/schema.json"


def test_the_schema_accepts_a_run_and_refuses_mistakes(minimal: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    run = load_run_config(minimal, {"tracking": [{"name": "wandb"}], "guards.spike.window": 9}).to_dict()
    run = json.loads(json.dumps(run))
    assert list(validator.iter_errors(run)) == []
    for section, key, value in [
        ("train", "max_step", 1),
        ("train", "max_steps", 0),
        ("model", "norm", "mixln"),
        ("schedule", "decay_steps", 3),
        ("optimizer", "name", "adam"),
    ]:
        broken = {**run, section: {**run[section], key: value}}
        assert list(validator.iter_errors(broken)), f"{section}.{key}={value} passes the schema"
