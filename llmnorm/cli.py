"""The `llmnorm` command: everything around a training run that is not training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llmnorm.errors import exit_on_user_error

Words = list[str]


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="file to write; without it the schema is printed")


def _schema(options: argparse.Namespace, overrides: Words) -> None:
    from llmnorm.config.help import json_schema_text

    if options.output is None:
        print(json_schema_text(), end="")
    else:
        options.output.write_text(json_schema_text(), encoding="utf-8")
        print(f"wrote {options.output}")


class Command(NamedTuple):
    """One subcommand: what it does in a line, its arguments, its action, and whether it takes overrides."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Words], None]
    takes_overrides: bool


COMMANDS: dict[str, Command] = {
    "schema": Command(
        "write the JSON schema of a run's YAML, for editors", _schema_arguments, _schema, False
    ),
}


def main(words: Words | None = None) -> None:
    """Run one subcommand; a user's mistake is one paragraph and exit code 2."""
    parser = argparse.ArgumentParser(prog="llmnorm", description=__doc__, allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.summary, description=command.summary, allow_abbrev=False
        )
        command.arguments(subparser)
    options, rest = parser.parse_known_args(sys.argv[1:] if words is None else words)
    command = COMMANDS[options.command]
    if rest and not command.takes_overrides:
        parser.error(f"llmnorm {options.command} does not take {' '.join(rest)}")
    with exit_on_user_error():
        command.run(options, rest)


if __name__ == "__main__":
    main()
