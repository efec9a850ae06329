"""The live line of a long preparation."""

from __future__ import annotations

from typing import Any


class Progress:
    """A bar over bytes read, with tokens written and the time left. Use as a context manager.

    total: bytes on disk to read. shown: whether there is a line at all.
    """

    def __init__(self, title: str, total: int, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            tokens = TextColumn("{task.fields[tokens]:,} tokens")
            console = Console(stderr=True)
            self._bar = Bar(
                "{task.description}",
                BarColumn(),
                DownloadColumn(),
                tokens,
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, tokens=0)

    def update(self, read: int, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=read, tokens=tokens)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
