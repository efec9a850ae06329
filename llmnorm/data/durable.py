"""Files that are whole or absent: atomic writes, and a lock that dies with its holder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from llmnorm.errors import UserError

GRACE_SECONDS = 10.0


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to a temporary name, fsync it, and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        sync(stream)
    temporary.rename(path)


def sync(stream: IO[bytes]) -> None:
    """Force what was written to `stream` onto the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` onto the disk: a rename is durable only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable_folder(folder: Path) -> Path:
    """Create `folder` if need be. Raises `UserError` where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return folder


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The error for a prepared folder that cannot be written; what was finished stays."""
    remedy = (
        "free some space and start the same command again (finished shards are kept)"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "set data.prepared_dir to a folder you may write to"
    )
    return UserError(f"data.prepared_dir: {folder} cannot be written ({error.strerror or error}); {remedy}")


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold `lock` against every other process, on this node or on others that share the file system.

    The operating system drops the lock when its holder dies, even by SIGKILL, so that a waiting process goes
    on with the work instead of waiting for ever. Raises `UserError` where the file system has no locks.
    """
    try:
        with lock.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise UserError(
                f"data.prepared_dir: {lock.parent} is on a file system without file locks; set "
                "data.prepared_dir to a local disk of each node, or mount this one with locks (Lustre: -o "
                "flock)"
            ) from error
        raise


def give_way(lock: Path, done: Callable[[], bool]) -> None:
    """Let the first process of the node begin: wait until it holds `lock`, has finished, or is slow to come.

    Only who does the work, and so who shows progress, depends on this; whoever holds the lock does it right.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and not done():
        with suppress(FileNotFoundError), lock.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        time.sleep(0.05)
