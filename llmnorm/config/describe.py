"""The catalogue of keys: what each one is, its type in words, its default and its meaning.

`train.py --help` prints it, error messages quote it, and overrides use it to tell text from YAML.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llmnorm.config.schema import RunConfig

_SCALARS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class KeyDoc:
    """One key: dotted name, type in words, choices, default (None when required) and meaning.

    `variants` names the choices of the section's discriminator that have the key; empty when all sections do.
    """

    key: str
    type: str
    choices: tuple[str, ...]
    default: str | None
    meaning: str
    variants: tuple[str, ...]
    annotation: Any


def type_in_words(annotation: Any, constraints: tuple[Any, ...] = ()) -> str:
    """`int | None` with ge=1 becomes `integer >= 1 or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return type_in_words(annotation.__origin__, (*constraints, *_flat(annotation.__metadata__)))
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        words = [type_in_words(member, constraints) for member in arguments]
        return " or ".join(dict.fromkeys(words))
    if origin is list:
        return "a list of these" if _choices(annotation) else f"list of {type_in_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} numbers, each {type_in_words(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of name to {type_in_words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return _SCALARS[annotation] + (_bounds(constraints) if annotation in (int, float) else "")


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _bounds(constraints: tuple[Any, ...]) -> str:
    signs: tuple[tuple[type, str, str], ...] = (
        (annotated_types.Ge, ">=", "ge"),
        (annotated_types.Gt, ">", "gt"),
        (annotated_types.Le, "<=", "le"),
        (annotated_types.Lt, "<", "lt"),
    )
    bounds = [
        f"{sign} {getattr(constraint, attribute):g}"
        for kind, sign, attribute in signs
        for constraint in constraints
        if isinstance(constraint, kind)
    ]
    return " " + " and ".join(bounds) if bounds else ""


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes an annotation mentions: the members of a union, or the one class."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    members = (found for argument in get_args(annotation) for found in sections_in(argument))
    return list(dict.fromkeys(members))  # `Section | list[Section]` mentions one


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(get_args(annotation))
    return tuple(dict.fromkeys(c for argument in get_args(annotation) for c in _choices(argument)))


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "the defaults below"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if value == "" else str(list(value) if isinstance(value, tuple) else value)


def variant_name(section: type[BaseModel]) -> str | None:
    """The discriminator value of a section class, None for one that is not chosen by name."""
    name = section.model_fields.get("name")
    return _choices(name.annotation)[0] if name is not None and _choices(name.annotation) else None


def keys_of(section: type[BaseModel], prefix: str) -> Iterator[KeyDoc]:
    """Every key of a section and of those below it."""
    for name, field in section.model_fields.items():
        annotation, key = field.annotation, f"{prefix}{name}"
        variants = sections_in(annotation)
        is_list = get_origin(annotation) is list
        is_optional = type(None) in get_args(annotation)
        if not variants or is_list or is_optional or len(variants) == 1:
            yield KeyDoc(
                key,
                type_in_words(annotation, tuple(_flat(tuple(field.metadata)))),
                _choices(annotation),
                _default(field),
                field.description or "",
                (),
                annotation,
            )
        if variants:
            yield from _merge(
                [list(keys_of(v, f"{key}[]." if is_list else f"{key}.")) for v in variants], variants
            )


def _merge(documents: list[list[KeyDoc]], variants: list[type[BaseModel]]) -> Iterator[KeyDoc]:
    """The keys of a union's members, each once, with the members that have it."""
    names = [variant_name(variant) or "" for variant in variants]
    by_key: dict[str, list[tuple[str, KeyDoc]]] = {}
    for name, documentation in zip(names, documents, strict=True):
        for doc in documentation:
            by_key.setdefault(doc.key, []).append((name, doc))
    for key, holders in sorted(
        by_key.items(), key=lambda item: (not item[0].endswith(".name"), -len(item[1]))
    ):
        first = holders[0][1]
        if key.endswith(".name"):
            choices = tuple(c for _, doc in holders for c in doc.choices)
            yield KeyDoc(
                key, " | ".join(choices), choices, first.default, first.meaning, (), first.annotation
            )
            continue
        by_default: dict[str | None, list[str]] = {}
        for name, doc in holders:
            by_default.setdefault(doc.default, []).append(name)
        default = first.default
        if len(by_default) > 1:
            default = ", ".join(f"{value} for {' and '.join(who)}" for value, who in by_default.items())
        only = () if len(holders) == len(variants) else tuple(name for name, _ in holders)
        yield KeyDoc(key, first.type, first.choices, default, first.meaning, only, first.annotation)


@cache
def catalogue() -> dict[str, KeyDoc]:
    """Every key of a run by its dotted name, in the order of the schema."""
    return {doc.key: doc for doc in keys_of(RunConfig, "")}


def sections() -> dict[str, FieldInfo]:
    """The top-level keys that hold a section or a list of them."""
    return {name: field for name, field in RunConfig.model_fields.items() if sections_in(field.annotation)}


def children(prefix: str) -> list[str]:
    """Names of the keys right below a dotted prefix ("" for the top level)."""
    start = f"{prefix}." if prefix else ""
    below = (key[len(start) :] for key in catalogue() if key.startswith(start))
    return list(dict.fromkeys(name.split(".")[0].removesuffix("[]") for name in below))
