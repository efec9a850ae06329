"""An option of a norm or an attention: its default, the rule its value must pass, and that rule in words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Option:
    """A key of `norm_options` or `attention_options`. The words of its rule follow the name in an error.

    An option with `needs` exists only beside one of these values of other options.
    """

    default: Any
    accepts: Callable[[Any, int], bool]  # (value, num_layers)
    rule: str
    needs: tuple[tuple[str, Any], ...] = ()

    def has_place(self, options: Options) -> bool:
        """Whether `options` have a value that it needs, if it needs any."""
        return not self.needs or any(options.get(name) == value for name, value in self.needs)


def is_number(value: Any) -> bool:
    """A finite int or float; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_switch(value: Any, num_layers: int) -> bool:
    return isinstance(value, bool)


def nearest(word: object, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known one, or else all of them."""
    names = list(known)
    match = difflib.get_close_matches(str(word).lower(), names, n=1)
    return f"did you mean {match[0]}?" if match else f"known are {', '.join(names)}"
