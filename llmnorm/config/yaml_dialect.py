"""The YAML that runs are written in: the YAML 1.2 core schema, read strictly.

PyYAML follows YAML 1.1, where `1e-3` is text, `no` is false, `010` is eight and `1:30` is ninety, and it
takes the last of two equal keys without a word. Here numbers are numbers, only true and false are booleans,
and a key given twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmnorm.errors import UserError

_CORE_SCALARS = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"^(?:<<)$", "<"),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with nothing but the core schema's scalar rules."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            line = key_node.start_mark.line + 1
            if isinstance(key, str) and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice (first in line {seen[key]})", key_node.start_mark
                )
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Keeps PyYAML's scalar rules beside ours, so that text which either dialect would misread is quoted."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)  # list items indented below their key


def _construct_decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # PyYAML's own constructor reads a leading zero as octal


_Loader.yaml_implicit_resolvers = {}
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_decimal)
for _dialect in (_Loader, _Dumper):
    for _tag, _pattern, _first in _CORE_SCALARS:
        _dialect.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def parse(text: str, where: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML document and the line on which each dotted key stands.

    Raises `UserError` with the line for text that is not YAML or gives a key twice.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return None, {}
        loader = _Loader("")
        value = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}; mend that line") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}; mend the file") from None
    return value, dict(_lines(node, ""))


def _lines(node: yaml.Node, prefix: str) -> Any:
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        dotted = f"{prefix}{key_node.value}"
        yield dotted, key_node.start_mark.line + 1
        yield from _lines(value_node, f"{dotted}.")


def read(path: Path) -> tuple[Any, dict[str, int]]:
    """`parse` of a file; raises `UserError` when it cannot be read or is not UTF-8 text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a readable YAML file") from None
    return parse(text, str(path))


def write(value: Any) -> str:
    """YAML that `parse` reads back unchanged, keys in their own order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
