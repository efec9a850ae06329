"""The YAML dialect: what a person writes is what the run gets."""

from __future__ import annotations

import pytest
import yaml

from llmnorm.config import yaml_dialect
from llmnorm.errors import UserError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+2", -250.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("10", 10),
        ("+3", 3),
        ("010", 10),
        ("true", True),
        ("false", False),
        ("null", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("0x1f", "0x1f"),
        ("'1e-3'", "1e-3"),
        ("[1e-3, a]", [1e-3, "a"]),
    ],
)
def test_scalars_are_read_as_yaml_1_2(written: str, meant: object) -> None:
    value, _ = yaml_dialect.parse(f"key: {written}", "f.yaml")
    assert value == {"key": meant}
    assert type(value["key"]) is type(meant)


AMBIGUOUS = [
    "1e-3",
    "on",
    "no",
    "010",
    "1:30",
    "2020-01-01",
    "",
    "null",
    "~",
    "true",
    "0x1f",
    "a: b",
    "*a",
    "[x",
]


@pytest.mark.parametrize(
    "value", [*AMBIGUOUS, 1e-6, 3.0, 7, True, None, [1, [2]], {"a": {}}, "ünï ☃", "a\nb"]
)
def test_written_values_are_read_back(value: object) -> None:
    text = yaml_dialect.write({"key": value})
    assert yaml_dialect.parse(text, "f.yaml")[0] == {"key": value}


@pytest.mark.parametrize("value", AMBIGUOUS)
def test_text_is_quoted_wherever_a_yaml_1_1_reader_would_misread_it(value: str) -> None:
    assert yaml.safe_load(yaml_dialect.write({"key": value})) == {"key": value}


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3", "'a' is given twice (first in line 1)"),
        ("s:\n  a: 1\n  a: 2\n", "line 3", "'a' is given twice (first in line 2)"),
        ("a: [1\n", "line 2", "expected ',' or ']'"),
        ("a: b: c\n", "line 1", "mapping values are not allowed here"),
        ("a: 1\n\tb: 2\n", "line 2", "cannot start any token"),
        ("a: *nothing\n", "line 1", "undefined alias"),
        ("a: !!python/object/apply:os.system [echo]\n", "line 1", "could not determine a constructor"),
    ],
)
def test_errors_name_the_file_the_line_and_the_reason(text: str, line: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        yaml_dialect.parse(text, "some/run.yaml")
    message = str(caught.value)
    assert message.startswith("some/run.yaml, ")
    assert line in message
    assert reason in message
    assert "\n" not in message


def test_lines_of_nested_keys() -> None:
    _, lines = yaml_dialect.parse("a: 1\nb:\n  c: 2\n  d: {e: 3}\n", "f.yaml")
    assert lines == {"a": 1, "b": 2, "b.c": 3, "b.d": 4, "b.d.e": 4}
