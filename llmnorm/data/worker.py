"""Work in a fresh Python process, so that the training process keeps no threads and no memory of it.

`multiprocessing` is not used: its fork copies the threads' locks of torch and tokenizers, and its spawn
imports the user's script again. A child here imports only what its handler needs, and ends when its pipe
closes, also when the parent was killed.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from typing import Any

from llmnorm.errors import UserError


class Child:
    """One process that holds `handler(*setup)` and answers calls of it.

    handler: "module:class"; its instances are called with a request and return the reply.
    threads: whether the tokenizers library may use threads of its own in the child.
    """

    def __init__(self, handler: str, *setup: Any, threads: bool) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # noqa: PTH109
            "TOKENIZERS_PARALLELISM": "true" if threads else "false",
        }
        command = [sys.executable, "-c", "from llmnorm.data.worker import serve; serve()"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        except OSError as error:
            raise UserError(
                f"a tokenizing process could not be started ({error.strerror or error}); lower "
                "data.prepare_workers"
            ) from error
        self._send((handler, setup))

    def call(self, request: Any) -> Any:
        """The handler's reply. Raises the handler's `UserError`; RuntimeError for anything else it raised."""
        self._send(request)
        assert self._process.stdout is not None
        try:
            kind, reply = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._died() from None
        if kind == "user error":
            raise UserError(reply)
        if kind == "bug":
            raise RuntimeError(f"a tokenizing process failed:\n{reply}")
        return reply

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin, protocol=5)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _died(self) -> UserError:
        status = self._process.wait()
        ending = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
        return UserError(
            f"a tokenizing process {ending}; if the machine ran out of memory, lower data.prepare_workers, "
            "then start the same command again (finished shards are kept)"
        )


def available_cpus() -> int:
    """The CPUs this process may use, where the system tells; else those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serve() -> None:
    """The child's side: build the handler, then answer requests until the parent's end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the replies
    with suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):
        name, setup = pickle.load(requests)
        module, _, attribute = name.partition(":")
        handler = getattr(importlib.import_module(module), attribute)(*setup)
        while True:
            reply = _answer(handler, pickle.load(requests))
            pickle.dump(reply, replies, protocol=5)
            replies.flush()


def _answer(handler: Any, request: Any) -> tuple[str, Any]:
    try:
        return "reply", handler(request)
    except UserError as error:
        return "user error", str(error)
    except Exception:
        return "bug", traceback.format_exc()
