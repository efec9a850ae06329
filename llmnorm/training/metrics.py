"""metrics.jsonl: one JSON object per line, one line per optimizer step, plus evaluation and event rows.

A row is one `write` of one whole line to a file opened for appending, so a killed process leaves whole
lines; the file is flushed to the disk before a checkpoint is published, so it always covers the
checkpoint's steps. A machine that dies may still tear the last line: opening the file drops torn lines and
the rows after the step a run resumes from.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmnorm.errors import UserError

# Keys of the rows that are written beside a step's own; a restart at that step must not write them again.
ONCE_PER_STEP = ("eval/loss", "sample", "diagnostics/stream_rms")


class MetricsLog:
    """Appends rows to `path`; every row has a `step`. Only the main process makes one."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Open for a fresh run (None: the file starts empty) or one that goes on after `resume_step`."""
        self.path = path
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        try:
            lines = {} if resume_step is None else _lines_up_to(self.path, resume_step)
            _rewrite(self.path, "".join(line + "\n" for line in lines))
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        self._once = {(row["step"], key) for row in lines.values() for key in ONCE_PER_STEP if key in row}

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; numbers that are not finite become null, which JSON has and NaN is not."""
        self._once |= {(row["step"], key) for key in ONCE_PER_STEP if key in row}
        line = (_encode(row) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def has(self, step: int, key: str) -> bool:
        """Whether a row of this step with this key, one of `ONCE_PER_STEP`, is already in the file."""
        return (step, key) in self._once

    def cut_after(self, step: int) -> None:
        """Drop the rows after `step`, for a run that rolled back to it."""
        os.close(self._file)
        self._open(step)

    def sync(self) -> None:
        """Return when every row is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written ({error.strerror}); free space or permit writing there; the same "
            "command started again goes on from the newest checkpoint"
        )


def _lines_up_to(path: Path, step: int) -> dict[str, dict[str, Any]]:
    """The whole lines of steps 0 to `step`, each with the row that it encodes."""
    if not path.exists():
        return {}
    lines = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            lines[line] = row
    return lines


def _rewrite(path: Path, text: str) -> None:
    """Replace the file's text without a moment at which neither the old nor the new one is there."""
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") == text:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _encode(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(dict(row)), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
