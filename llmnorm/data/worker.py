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
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from llmnorm.errors import UserError

# By default the C library gives memory back after each batch, and its pages must be made again for the next.
KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}


class Child:
    """One process that holds `handler(*setup)` and answers requests, several at a time.

    handler: "module:class"; its instances are called with a request and return the reply.
    threads: how many requests it works on at a time.
    parallel: whether the tokenizers library may use threads of its own for one request.
    """

    def __init__(self, handler: str, *setup: Any, threads: int, parallel: bool) -> None:
        environment = {
            **os.environ,
            **KEEP_FREED_MEMORY,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # noqa: PTH109
            "TOKENIZERS_PARALLELISM": "true" if parallel else "false",
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
        self._sent = 0
        self._waiting: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._send((handler, setup, threads))
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()

    @property
    def outstanding(self) -> int:
        """Requests that are not answered yet."""
        return len(self._waiting)

    def submit(self, request: Any) -> Future[Any]:
        """Send a request; the child reads it even while it works on others.

        The future holds the handler's reply, or raises its `UserError`, RuntimeError for any other failure of
        the handler, or `UserError` for a child that died.
        """
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                raise self._died()
            number, self._sent = self._sent, self._sent + 1
            self._waiting[number] = future
        self._send((number, request))
        return future

    def call(self, request: Any) -> Any:
        """Send a request and wait for its reply."""
        return self.submit(request).result()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._receiver.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the receiver finds the child's end and says so
            pickle.dump(message, self._process.stdin, protocol=5)
            self._process.stdin.flush()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                number, kind, reply = pickle.load(self._process.stdout)
                future = self._waiting.pop(number)
                if kind == "reply":
                    future.set_result(reply)
                elif kind == "user error":
                    future.set_exception(UserError(reply))
                else:
                    future.set_exception(RuntimeError(f"a tokenizing process failed:\n{reply}"))
        with self._lock:
            self._ended = True
        for future in self._waiting.values():
            future.set_exception(self._died())

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
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the replies
    writing = threading.Lock()
    name, setup, threads = pickle.load(sys.stdin.buffer)
    module, _, attribute = name.partition(":")
    handler = getattr(importlib.import_module(module), attribute)(*setup)

    def answer(number: int, request: Any) -> None:
        try:
            reply = number, "reply", handler(request)
        except UserError as error:
            reply = number, "user error", str(error)
        except Exception:
            reply = number, "bug", traceback.format_exc()
        with writing, suppress(BrokenPipeError):
            pickle.dump(reply, replies, protocol=5)
            replies.flush()

    pool = ThreadPoolExecutor(threads)
    with suppress(EOFError, pickle.UnpicklingError):
        while True:
            pool.submit(answer, *pickle.load(sys.stdin.buffer))
    os._exit(0)  # the parent is gone, and nobody waits for the replies
