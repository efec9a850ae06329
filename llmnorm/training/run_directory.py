"""The run directory: what a run may find there, and which keys may change when it goes on.

    config.yaml  metrics.jsonl  checkpoints/step_N/  tokenizer/  export/  report.html

A directory that holds another run is never touched. Another run is one whose config differs in a key that
decides the trajectory: data, model, optimizer, seed, batch size, precision. The keys in `FREE` do not, and
those in `SAME_SUMS` change nothing but the rounding of sums. `train.max_steps` and `schedule` may change as
long as every update already made would have had the same learning rate, so a constant or WSD run can be
extended before its decay.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from llmnorm.checkpoint import published_steps
from llmnorm.config import RunConfig
from llmnorm.config.dotted import flatten
from llmnorm.errors import UserError
from llmnorm.optim import Schedule, create_schedule

# Keys that never reach the weights: what is shown, written, evaluated and fetched, and when.
FREE = (
    "output_dir",
    "plugins",  # paths; what the files say is recorded by hash
    "data.validation_files",
    "data.prepared_dir",
    "data.prepare_workers",
    "data.num_workers",
    "train.log_every",
    "train.hang_timeout",
    "train.sample_every",
    "train.sample_prompt",
    "train.sample_tokens",
    "guards",
    "checkpoint",
    "evaluation",
    "diagnostics",
    "tracking",
    "export",
    "paper",
)
# Keys that leave the mathematics as it is and change the order or the kernels of its sums.
SAME_SUMS = (
    "model.attn_implementation",
    "train.micro_batch_size",
    "train.compile",
    "train.activation_checkpointing",
    "parallel",
)
# Seconds for a run that was just killed to leave the directory.
_HANDOVER = 5.0
# Keys that are judged by the learning rates they would have given to the updates already made.
SCHEDULED = ("train.max_steps", "schedule")


class RunDirectory:
    """Paths of a run, and the check that they belong to this run."""

    def __init__(self, config: RunConfig) -> None:
        """Only reads. Raises `UserError` for another run's directory or one that cannot be written."""
        self.config = config
        self.path = Path(config.output_dir).expanduser()
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.tokenizer = self.path / "tokenizer"
        self.lock_file = self.path / ".lock"
        self._lock: IO[str] | None = None
        self._lockable = True
        _require_writable(self.path)
        self.last_step = max(published_steps(self.checkpoints), default=0)
        self._before = self._recorded()
        self.changed = sorted(_differences(self._before, config.to_dict())) if self._before else []
        refused = [key for key in self.changed if not _is_under(key, (*FREE, *SAME_SUMS, *SCHEDULED))]
        if refused:
            raise self._another_run(refused)

    def _recorded(self) -> dict[str, Any]:
        """The config of the run in the directory; empty if there is none."""
        measured = self.metrics_file.exists() and self.metrics_file.stat().st_size > 0
        begun = measured or bool(published_steps(self.checkpoints))
        if self.config_file.exists() and not begun:
            return {}  # an attempt that failed before its first step: there is nothing to lose
        if self.config_file.exists():
            recorded = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
            if isinstance(recorded, dict):
                return _completed(recorded)
            raise UserError(
                f"{self.config_file} is not a run's config; restore it, or set output_dir to a new folder"
            )
        if begun:
            raise UserError(
                f"output_dir={self.path} holds metrics or checkpoints but no config.yaml, so it cannot be "
                "told whose run it is; restore config.yaml, or set output_dir to a new folder"
            )
        return {}

    def _another_run(self, keys: list[str]) -> UserError:
        before, now = flatten(self._before), flatten(self.config.to_dict())
        shown = "; ".join(f"{key} was {before.get(key)!r} and is now {now.get(key)!r}" for key in keys[:5])
        more = f" and {len(keys) - 5} more keys" if len(keys) > 5 else ""
        return UserError(
            f"output_dir={self.path} holds another run: {shown}{more}. Set output_dir to a new folder, or "
            f"go back to the keys of {self.config_file}"
        )

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuse a changed schedule that would have made any of the updates already made differently."""
        keys = [key for key in self.changed if _is_under(key, SCHEDULED)]
        if not keys:
            return
        options = dict(self._before["schedule"])
        before = create_schedule(options.pop("name"), self._before["train"]["max_steps"], **options)
        for update in range(self.last_step):
            if before.multiplier(update) != schedule.multiplier(update):
                raise UserError(
                    f"{', '.join(keys)} changed, and with it the learning rate of update {update + 1}, one "
                    f"of the {self.last_step} that {self.path} has already made. Restore {keys[0]}, or "
                    f"start a new run with model.init_from: {self.path}; a schedule that can be extended is "
                    "constant, or wsd before its decay"
                )

    def release(self) -> None:
        """Let other runs in. Said and not left to the collector: closing the file at any later time would end
        the claim of another run of this process."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def claim(self) -> str | None:
        """Make the directory and keep other runs out until `release`; returns why it cannot.

        A record lock belongs to the process that took it. Children do not inherit it, unlike `flock`'s, so
        the data workers that outlive a killed run for some seconds do not hold it; and it works across
        machines where the file system does.
        """
        deadline = time.monotonic() + _HANDOVER
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self.lock_file.open("a+", encoding="utf-8")
            while True:
                try:
                    fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                    if time.monotonic() > deadline:
                        return self._in_use()
                time.sleep(0.1)
            self._lock.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=self._lock, flush=True)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                return str(_unwritable(self.path, error.strerror or str(error)))
            self._lockable = False
        return self._taken_meanwhile()

    def _taken_meanwhile(self) -> str | None:
        """Why the directory is another run's by now: one may have come and gone while data was prepared."""
        try:
            recorded = self._recorded()
        except UserError as error:
            return str(error)
        if recorded == self._before or not recorded:
            return None
        self._before = recorded
        changed = sorted(_differences(recorded, self.config.to_dict()))
        refused = [key for key in changed if not _is_under(key, (*FREE, *SAME_SUMS))]
        return str(self._another_run(refused)) if refused else None

    def _in_use(self) -> str:
        assert self._lock is not None
        self._lock.seek(0)
        holder = self._lock.read().strip() or "another process"
        return (
            f"output_dir={self.path} is in use by another run ({holder} holds {self.lock_file.name} there), "
            "and two runs would write over each other; wait until that one has ended or stop it, or set "
            "output_dir to another folder"
        )

    def notes(self) -> Iterator[str]:
        """One line about each kind of key that changed since the run was started, and one about no lock."""
        if not self._lockable:
            yield f"{self.path} is on a file system without locks: nothing keeps a second run out of it"
        free = [key for key in self.changed if _is_under(key, (*FREE, *SCHEDULED))]
        sums = [key for key in self.changed if _is_under(key, SAME_SUMS)]
        if free:
            yield f"changed since the run was started: {', '.join(free)}"
        if sums:
            yield f"changed since the run was started, so results are equal up to rounding: {', '.join(sums)}"

    def create(self) -> None:
        """Make the directory and record the config, replacing the recorded one in one step."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = self.config_file.with_name("config.yaml.tmp")
            temporary.write_text(self.config.to_yaml(), encoding="utf-8")
            temporary.replace(self.config_file)
        except OSError as error:
            raise _unwritable(self.path, error.strerror or str(error)) from error

    def overview(self) -> list[Path]:
        """What the run wrote: its files, its checkpoints, and its folders."""
        top = [path for path in sorted(self.path.iterdir()) if path.is_file() and path != self.lock_file]
        checkpoints = [self.checkpoints / f"step_{step}" for step in published_steps(self.checkpoints)]
        return [*top, *checkpoints, *(folder for folder in (self.tokenizer, self.export) if folder.is_dir())]

    def files(self) -> list[Path]:
        """Every file below the run directory."""
        return sorted(path for path in self.path.rglob("*") if path.is_file() and path != self.lock_file)


def _completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded config with today's defaults for keys that did not exist when it was written."""
    try:
        return RunConfig.model_validate(recorded).to_dict()
    except ValueError:
        return recorded  # keys that exist no more: the comparison names them


def _require_writable(path: Path) -> None:
    """Fail before the data is prepared, not after."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise _unwritable(path, f"{existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unwritable(path, f"no permission to write in {existing}")


def _unwritable(path: Path, reason: str) -> UserError:
    return UserError(
        f"output_dir={path} cannot be written ({reason}); choose another folder, or permit writing there"
    )


def _is_under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith((f"{prefix}.", f"{prefix}[")) for prefix in prefixes)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    old, new = flatten(before), flatten(now)
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
