"""The documentation that is generated from the schema: `--help` and the JSON schema for editors."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from llmnorm.config.describe import KeyDoc, catalogue, sections
from llmnorm.config.schema import RunConfig

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def help_text(width: int = 100) -> str:
    """Every key grouped by section, each with its type, default and meaning."""
    groups: dict[str, list[KeyDoc]] = {"": []}
    for doc in catalogue().values():
        section = doc.key.partition(".")[0].removesuffix("[]")
        groups.setdefault(section if section in sections() else "", []).append(doc)
    lines: list[str] = []
    for section, docs in groups.items():
        meaning = RunConfig.model_fields[section].description if section else "The run as a whole."
        lines += ["", f"{section or 'top level'}: {meaning}"]
        for doc in docs:
            if doc.key != section or section == "tracking":
                lines += _entry(doc, width)
    return "\n".join(lines[1:]) + "\n"


def _entry(doc: KeyDoc, width: int) -> Iterator[str]:
    default = "required" if doc.default is None else f"default {doc.default}"
    only = f"; with {' or '.join(doc.variants)} only" if doc.variants else ""
    yield f"  {'' if '[]' in doc.key else '--'}{doc.key}"
    for text in (f"{doc.type}; {default}{only}", doc.meaning):
        yield from (" " * 6 + line for line in textwrap.wrap(text, width - 6, break_on_hyphens=False))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a run's YAML, for completion and checking in an editor."""
    schema = RunConfig.model_json_schema()
    return {"$schema": SCHEMA_DIALECT, **_without_titles(schema), "title": "llmnorm run"}


def _without_titles(node: Any) -> Any:
    """The schema without the titles that pydantic derives from field names."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_titles(value)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str))
    }


def json_schema_text() -> str:
    """`json_schema()` as the text of configs/schema.json."""
    return json.dumps(json_schema(), indent=2) + "\n"
