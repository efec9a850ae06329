"""Errors a user can cause, and how an entry point reports them.

A user's mistake is one clear paragraph on stderr and exit code 2, never a traceback:

    optimizer.rank=512 exceeds min(out, in)=256 of layers.0.self_attn.k_proj; lower optimizer.rank or
    exclude k_proj
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in a config, a file or a command: names the key, the value, the rule and the remedy."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one paragraph on stderr and exit code 2.

    Every process of a distributed run meets the same mistake, so only the first of each node prints it.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
