"""The minutes of one call of a benchmark on a borrowed GPU: what would begin after them is left out, and
named."""

from __future__ import annotations

import argparse
import math
import time

GPU_MINUTES = 9.0


class Budget:
    """`if budget.allows(name):` before each part; a part that has begun is finished."""

    def __init__(self, minutes: float | None, device: str) -> None:
        if minutes is None:
            minutes = GPU_MINUTES if device == "cuda" else math.inf
        self.end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, name: str) -> bool:
        """Whether there is time left to begin; the name is kept if not."""
        if time.monotonic() < self.end:
            return True
        self.left_out.append(name)
        return False

    def report(self) -> None:
        """Print what was left out, if anything was."""
        if self.left_out:
            print(f"not begun within the budget: {', '.join(self.left_out)}", flush=True)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The option --budget, in minutes."""
    text = f"minutes after which nothing more is begun; default: {GPU_MINUTES:g} on a GPU, no limit on a CPU"
    parser.add_argument("--budget", type=float, help=text)
