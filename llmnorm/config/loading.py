"""From a YAML file and dotted overrides to a `RunConfig`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmnorm.config import yaml_dialect
from llmnorm.config.checks import warnings_for
from llmnorm.config.describe import catalogue, sections, sections_in, variant_name
from llmnorm.config.explain import Origin, explain, nearest, unknown_key
from llmnorm.config.optimizers import CUSTOM, DEFAULT_OPTIMIZER
from llmnorm.config.presets import PRESETS
from llmnorm.config.schedules import DEFAULT_SCHEDULE, default_warmup
from llmnorm.config.schema import RunConfig
from llmnorm.errors import UserError

_DEFAULT_NAMES = {"optimizer": DEFAULT_OPTIMIZER, "schedule": DEFAULT_SCHEDULE}
_CHOICES = (".name", ".preset", ".norm")  # keys whose value decides what other keys mean


def load_run_config(path: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """The configuration of a run: a YAML file, then overrides, the last of equal keys winning.

    `overrides` are command-line words (`["--train.max_steps", "10", "--model.norm=mix_ln"]`) or a mapping of
    dotted keys to values. Choosing another `optimizer.name`, `schedule.name`, `model.preset` or `model.norm`
    than the file's drops the keys of the file that only the former choice has, and says so in one line on
    stderr.

    Raises `UserError` naming the key, the value, the rule and the remedy.
    """
    values, lines = _read(Path(path)) if path is not None else ({}, {})
    given = dict(overrides) if isinstance(overrides, Mapping) else parse_overrides(overrides)
    if "optimizer.class_path" in given:
        given.setdefault("optimizer.name", CUSTOM)
    origin = Origin(str(path) if path is not None else None, lines, given)
    for key, value in _flattened(given):
        _say_dropped(_drop_former_choice(values, key, value), key, value)
        _set(values, key, value)
    _fill_sections(values)
    _settle_warmup(values)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, values, origin) from None
    for warning in warnings_for(config):
        _say(f"warning: {warning}")
    return config


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`["--a.b", "1", "--c=x"]` as `{"a.b": 1, "c": "x"}`; the last of equal keys wins.

    Values are YAML, except that a key that takes text takes it as it stands: no quotes for `*.txt` or
    `ROMEO: hello`.
    """
    parsed: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(
                f"{word!r} is not an override; write --section.key VALUE, for example --train.max_steps 100"
            )
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise _missing_value(key)
            text = rest.pop(0)
        parsed.pop(key, None)
        parsed[key] = _value(key, text)
    return parsed


def _missing_value(key: str) -> UserError:
    doc = catalogue().get(key)
    if doc is None and key not in sections():
        return unknown_key(key, {}, "")
    kind = f" ({doc.type})" if doc else ""
    return UserError(f"--{key} has no value; write --{key} VALUE{kind}")


def _value(key: str, text: str) -> Any:
    doc = catalogue().get(key)
    takes_text = doc is not None and "text" in doc.type.replace(" of text", "")
    if takes_text and not (text == "null" and "null" in doc.type):  # type: ignore[union-attr]
        if doc.annotation is str or not text.startswith(("[", "{")):  # type: ignore[union-attr]
            return text
        try:
            return yaml_dialect.parse(text, f"--{key}")[0]
        except UserError:
            return text  # a glob such as [ab]*.txt
    return yaml_dialect.parse(text, f"--{key}")[0]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    if not path.exists():
        candidates = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        guess = nearest(str(path), candidates)
        remedy = f"did you mean {guess}?" if guess else "configs/ holds examples"
        raise UserError(f"--config {path}: there is no such file; {remedy}")
    if path.is_dir():
        raise UserError(f"--config {path} is a folder; name a YAML file in it")
    values, lines = yaml_dialect.read(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds a {type(values).__name__}, not a mapping of keys; write `key: value` lines"
        )
    return {str(key): value for key, value in values.items()}, lines


def _flattened(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Overrides of a whole section as overrides of its keys, so that they add to the file instead of
    replacing it.

    The choice by name comes before the keys that belong to it.
    """
    flat: list[tuple[str, Any]] = []
    for key, value in given.items():
        if key in sections() and isinstance(value, Mapping):
            flat += [(f"{key}.{name}", item) for name, item in value.items()]
        else:
            flat.append((key, value))
    return iter(sorted(flat, key=lambda item: not item[0].endswith(_CHOICES)))


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    if parents and parents[0] == "tracking":
        raise UserError(
            f"{key}: tracking is a list; give it whole, for example --tracking '[{{name: wandb}}]'"
        )
    node = values
    for parent in parents:
        below = node.get(parent)
        node[parent] = dict(below) if isinstance(below, dict) else {}
        node = node[parent]
    node[last] = value


def _drop_former_choice(values: dict[str, Any], key: str, value: Any) -> list[str]:
    """Remove from a section what belongs to the choice that `key` replaces; returns the names removed."""
    section, _, name = key.rpartition(".")
    former = values.get(section)
    if not isinstance(former, dict):
        return []
    dropped: list[str] = []
    if name == "name" and section in _DEFAULT_NAMES:
        variants = {variant_name(v): v.model_fields for v in sections_in(sections()[section].annotation)}
        former_name = former.get("name", CUSTOM if "class_path" in former else _DEFAULT_NAMES[section])
        old, new = variants.get(former_name), variants.get(value)
        if old is not None and new is not None:
            dropped = [item for item in former if _belongs(item, former_name, old) and item not in new]
    elif key == "optimizer.class_path" and value != former.get("class_path"):
        custom = next(v for v in sections_in(sections()[section].annotation) if variant_name(v) == CUSTOM)
        dropped = [item for item in former if item not in custom.model_fields]
    elif key == "model.preset" and former.get("preset") in PRESETS and value != former["preset"]:
        restated = PRESETS[former["preset"]].sizes(former.get("paper_exact") is True)
        dropped = [item for item, size in restated.items() if former.get(item) == size]
    elif key == "model.norm" and value != former.get("norm") and former.get("norm_options"):
        dropped = ["norm_options"]
    values[section] = {item: content for item, content in former.items() if item not in dropped}
    return dropped


def _belongs(item: str, name: Any, declared: Mapping[str, Any]) -> bool:
    """Whether a key of a section is the choice `name`'s: a class by its path takes any key."""
    return item in declared or name == CUSTOM


def _fill_sections(values: dict[str, Any]) -> None:
    """Empty sections as mappings, and the default choices by name, so that errors can name the keys "
    "inside."""
    for section, field in sections().items():
        optional = field.annotation is not None and type(None) in getattr(field.annotation, "__args__", ())
        if not optional and not str(field.annotation).startswith("list") and values.get(section) is None:
            values[section] = {}
    for section, name in _DEFAULT_NAMES.items():
        if isinstance(values[section], dict):
            name = CUSTOM if "class_path" in values[section] else name
            values[section] = {"name": name, **values[section]}


def _settle_warmup(values: dict[str, Any]) -> None:
    """The warm-up that the norm needs, where none is given; a refined schedule warms up by itself."""
    schedule, model, train = (values.get(section) for section in ("schedule", "model", "train"))
    if not (isinstance(schedule, dict) and isinstance(model, dict) and isinstance(train, dict)):
        return
    steps = train.get("max_steps")
    if "warmup_steps" in schedule or schedule.get("name") == "refined" or type(steps) is not int:
        return
    warmup = default_warmup(model.get("norm"), model.get("norm_options"), steps)
    if warmup > 0:
        values["schedule"] = {**schedule, "warmup_steps": warmup}
        _say(
            f"note: schedule.warmup_steps={warmup}, a tenth of the run, for model.norm={model['norm']}; give "
            "schedule.warmup_steps for another, 0 for none"
        )


def _say_dropped(dropped: list[str], key: str, value: Any) -> None:
    if dropped:
        section = key.rpartition(".")[0]
        names = ", ".join(f"{section}.{name}" for name in dropped)
        _say(f"note: {key}={value} drops {names}, which belonged to the former choice")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
