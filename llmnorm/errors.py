"""Errors a user can cause, and how an entry point reports them.

A user's mistake is one clear paragraph on stderr and exit code 2, never a traceback:

    optimizer.rank=512 exceeds min(out, in)=256 of layers.0.self_attn.k_proj; lower optimizer.rank or
    exclude k_proj
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmnorm.launcher import tell_once_and_wait


class UserError(ValueError):
    """A mistake in a config, a file or a command: names the key, the value, the rule and the remedy."""


class LostProcess(RuntimeError):
    """Another process of the run died or does not answer: says at which step, and how to go on."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one paragraph on stderr and exit code 2, and a `LostProcess` into one and 1.

    Every process of a distributed run meets the same mistake, so only the first of each node prints it. A
    lost process is reported by each that is left, as the first may be the lost one.
    """
    try:
        yield
    except UserError as error:
        tell_once_and_wait(f"error: {error}")
        sys.exit(2)
    except LostProcess as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
