"""The line a person watches: live on a terminal, one plain line per report elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

_SMOOTHING = 0.9  # of the seconds per update, from which the time left is guessed


class ProgressLine:
    """Shows step, loss, learning rate, gradient norm, tokens/s, MFU, memory and time left.

    Silent everywhere but on the main process. On a terminal the line is redrawn in place; otherwise one
    line is printed every `log_every` steps, so that log files stay readable.
    """

    def __init__(
        self, max_steps: int, *, log_every: int = 1, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self.max_steps = max_steps
        self.log_every = log_every
        self.enabled = enabled
        self.stream = sys.stdout if stream is None else stream
        self._seconds: float | None = None
        self._live: Live | None = None
        if enabled and self.stream.isatty():
            # Text and not a progress bar: it wraps on a narrow terminal, where a bar would be cut off.
            self._live = Live(Text("starting"), console=Console(file=self.stream), refresh_per_second=4)

    def note(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        if not self.enabled:
            return
        if self._live is not None and self._live.is_started:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def update(self, row: Mapping[str, Any]) -> None:
        """Show the metrics row of one step."""
        if not self.enabled:
            return
        seconds = row["seconds"]
        self._seconds = (
            seconds if self._seconds is None else _SMOOTHING * self._seconds + (1 - _SMOOTHING) * seconds
        )
        step = row["step"]
        if self._live is not None:
            self._live.start()
            self._live.update(Text(self._describe(row)))
        elif step % self.log_every == 0 or step == self.max_steps:
            print(self._describe(row), file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the last line standing and give the terminal back."""
        if self._live is not None:
            self._live.stop()

    def _describe(self, row: Mapping[str, Any]) -> str:
        left = timedelta(seconds=round((self._seconds or 0.0) * (self.max_steps - row["step"])))
        parts = [
            f"step {row['step']}/{self.max_steps}",
            f"loss {_number(row['loss'])}",
            f"lr {row['lr']:.2e}",
            f"grad norm {_number(row['grad_norm'])}",
            f"{_thousands(row['tokens_per_second'])} tokens/s",
        ]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        parts += [f"{row['memory_gib']:.1f} GiB", f"ETA {left}"]
        if row.get("skipped"):
            parts.append("update skipped")
        return "  ".join(parts)


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _thousands(rate: float) -> str:
    return f"{rate / 1000:,.1f}k" if rate >= 1000 else f"{rate:.0f}"
