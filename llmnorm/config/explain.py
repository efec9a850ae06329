"""From a pydantic error to the one paragraph a person needs: the key, the value, the rule and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from llmnorm.config import yaml_dialect
from llmnorm.config.describe import KeyDoc, catalogue, children, keys_of, sections_in, variant_name
from llmnorm.config.schema import RunConfig
from llmnorm.errors import UserError


class Origin:
    """Where each value of a run came from: a line of the file or an option of the command line."""

    def __init__(self, path: str | None, lines: Mapping[str, int], options: Collection[str]) -> None:
        self.path, self.options = path, set(options)
        overridden = tuple(f"{option}." for option in options)
        self.lines = {key: line for key, line in lines.items() if not f"{key}.".startswith(overridden)}

    def of(self, key: str) -> str:
        """` (configs/a.yaml, line 12)`, ` (on the command line)`, or nothing."""
        parts = key.replace("[", ".").split(".")
        for stop in range(len(parts), 0, -1):
            dotted = ".".join(parts[:stop])
            if any(option == dotted or option.startswith(f"{dotted}.") for option in self.options):
                return " (on the command line)"
            if dotted in self.lines:
                return f" ({self.path}, line {self.lines[dotted]})"
        return ""

    def place_for(self, key: str) -> str:
        """How to supply a key that is missing."""
        option = f"pass --{key} VALUE" if "[" not in key else "give it there"
        return f"add it to {self.path} or {option}" if self.path else option


def nearest(word: str, choices: Sequence[str]) -> str | None:
    """The choice that a misspelt word most likely meant."""
    matches = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.6)
    if matches:
        return matches[0]
    inside = [
        choice for choice in choices if len(word) > 2 and (word.lower() in choice or choice in word.lower())
    ]
    return min(inside, key=len) if inside else None


def unknown_key(key: str, values: Mapping[str, Any], where: str) -> UserError:
    """The error for a key that the schema lacks, with the key that was probably meant."""
    section, _, name = key.rpartition(".")
    owners = _variants_with(key)
    chosen = _lookup(values, f"{section}.name")
    if owners and isinstance(chosen, str):
        return UserError(
            f"{key}{where} is not a key of {section}.name={chosen}; it belongs to {' and '.join(owners)}: "
            f"remove it, or set {section}.name: {owners[0]}{_taken(section, chosen)}"
        )
    within = f"section {section}" if section else "a run's configuration"
    siblings = _keys_of(section)
    guess = nearest(name, siblings)
    meant = f"{section}.{guess}" if guess and section else guess
    if meant is None:
        leaves = {known.rpartition(".")[2]: known for known in reversed(catalogue()) if "[]" not in known}
        meant = leaves.get(nearest(name, list(leaves)) or "")
    taken = _taken(section, chosen)
    # A section that is chosen by name has the keys of that name; those of all others would only bury them.
    listed = "" if taken else f"; the keys of {within} are {', '.join(siblings)}"
    suggestion = f"; did you mean {meant}?" if meant else listed
    return UserError(
        f"unknown key {key}{where}: {within} has no such key{suggestion}{taken} "
        f"(`python train.py --help` lists every key)"
    )


def _keys_of(section: str) -> list[str]:
    """The keys of a section, or of the entry of a list of sections that `section[0]` names."""
    listed = re.sub(r"\[\d+\]$", "", section)
    return children(section) or children(f"{listed}[]") or children(listed)


def _variants_with(key: str) -> list[str]:
    """The discriminator values whose section has a key, when the key belongs to a section chosen by name."""
    section, _, name = key.rpartition(".")
    field = RunConfig.model_fields.get(section)
    if field is None:
        return []
    variants = [variant for variant in sections_in(field.annotation) if variant_name(variant)]
    return [str(variant_name(variant)) for variant in variants if name in variant.model_fields]


def _taken(section: str, chosen: Any) -> str:
    """`; optimizer.name=spam takes threshold, ...` for a section whose keys depend on its name."""
    field = RunConfig.model_fields.get(section)
    for variant in sections_in(field.annotation) if field is not None else ():
        if isinstance(chosen, str) and variant_name(variant) == chosen:
            keys = [key for key in variant.model_fields if key != "name"]
            return f"; {section}.name={chosen} takes {', '.join(keys)}"
    return ""


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _is_in(values: Any, key: str) -> bool:
    section, _, name = key.rpartition(".")
    holder = _lookup(values, section) if section else values
    return isinstance(holder, Mapping) and name in holder


def _dotted(location: tuple[int | str, ...], values: Any, kind: str) -> str:
    """The key as the user wrote it: pydantic's location without the names it gives to members of a union."""
    parts: list[str] = []
    node = values
    for index, part in enumerate(location):
        known = isinstance(node, Mapping) and part in node
        known = known or (isinstance(node, list) and isinstance(part, int) and part < len(node))
        if known:
            node = node[part]
        elif not (kind == "missing" and index == len(location) - 1 and isinstance(node, Mapping)):
            continue
        parts.append(f"[{part}]" if isinstance(part, int) else f".{part}" if parts else str(part))
    return "".join(parts)


def _documentation(key: str, values: Any = None) -> KeyDoc | None:
    """The catalogue's entry for a key, or for the nearest key above it; where the key's section is chosen by
    name, what the section of that name says of it."""
    known = {**catalogue(), **_chosen(key.partition(".")[0], values)}
    parts = key.split(".")
    parts = [part.partition("[")[0] + "[]" if "[" in part else part for part in parts]
    while parts:
        for candidate in (".".join(parts), ".".join(parts).removesuffix("[]")):
            if candidate in known:
                return known[candidate]
        parts.pop()
    return None


def _chosen(section: str, values: Any) -> dict[str, KeyDoc]:
    """The keys of the section that `values` chose by name."""
    name, field = _lookup(values, f"{section}.name"), RunConfig.model_fields.get(section)
    variants = sections_in(field.annotation) if field is not None and isinstance(name, str) else []
    return {
        doc.key: doc
        for variant in variants
        if variant_name(variant) == name
        for doc in keys_of(variant, f"{section}.")
        if doc.key != f"{section}.name"
    }


def _wrong_value(key: str, value: Any, origin: Origin, values: Any = None) -> str:
    doc = _documentation(key, values)
    where = origin.of(key)
    shown = yaml_dialect.write({key: value}).strip().partition(": ")[2] if _is_scalar(value) else repr(value)
    assert doc is not None, f"{key} is in no section"
    if doc.choices and isinstance(value, str):
        guess = nearest(value, doc.choices)
        return f"{key}={shown}{where} is not one of {', '.join(doc.choices)}; " + (
            f"did you mean {guess}?" if guess else "choose one of them"
        )
    article = {"integer": "an ", "number": "a ", "list": "a ", "mapping": "a "}.get(doc.type.split()[0], "")
    rule = f"must be {article}{doc.type}" + (" and not empty" if value in ("", []) else "")
    remedy = "change it"
    if isinstance(value, str) and "text" not in doc.type and _is_number(value):
        remedy = "it is text: remove the quotes"
    meaning = doc.meaning[:1].lower() + doc.meaning[1:].rstrip(".")
    return f"{key}={shown}{where} {rule} ({meaning}); {remedy}"


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def explain(error: ValidationError, values: Mapping[str, Any], origin: Origin) -> UserError:
    """The most telling of pydantic's errors as one paragraph, with the number of the others.

    An unknown key comes first, for it is often the reason why another one is missing.
    """
    found: dict[str, tuple[int, str]] = {}
    for detail in error.errors(include_url=False):
        kind = detail["type"]
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            found.setdefault(str(cause), (1, str(cause)))
            continue
        key = _dotted(detail["loc"], values, kind)
        if kind == "extra_forbidden":
            message = (0, str(unknown_key(key, values, origin.of(key))))
        elif kind == "union_tag_not_found":
            message = (2, f"{key}.name is required; {origin.place_for(key)}")
        elif kind == "missing" and _is_in(values, key):  # a list with too few entries
            message = (1, _wrong_value(key, _lookup(values, key), origin, values))
        elif kind == "missing":
            doc = _documentation(key)
            meaning = f" ({doc.meaning.rstrip('.')})" if doc else ""
            message = (2, f"{key} is required{meaning}; {origin.place_for(key)}")
        elif kind == "union_tag_invalid":
            key = f"{key}.name"
            message = (1, _wrong_value(key, detail["ctx"]["tag"], origin))
        else:
            message = (1, _wrong_value(key, detail["input"], origin, values))
        found.setdefault(key, message)
    inner = {key for key in found if not any(other.startswith((f"{key}.", f"{key}[")) for other in found)}
    found = {key: message for key, message in found.items() if key in inner}
    first, *others = sorted(found.items(), key=lambda item: item[1][0])
    more = f" ({len(others)} more to mend: {', '.join(key for key, _ in others)})" if others else ""
    return UserError(first[1][1] + more)
