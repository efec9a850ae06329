"""train.py on two gloo processes under a real torchrun, and who its processes are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@contextmanager
def torchrun(
    config: Any,
    folder: Path,
    options: tuple[str, ...] = (),
    script: Path = ROOT / "train.py",
    **environment: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """A script on two gloo processes; what they and the launcher print goes to folder/log."""
    file = folder / "config.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    with (folder / "log").open("wb") as output:
        launcher = subprocess.Popen(
            [*command, str(script), "--config", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            start_new_session=True,
        )
    try:
        yield launcher
    finally:
        for pid in [*ranks_of(launcher).values(), launcher.pid] if launcher.poll() is None else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()


def ranks_of(launcher: subprocess.Popen[bytes]) -> dict[int, int]:
    """Process ids of the launcher's processes, by rank."""
    found = {}
    with suppress(OSError):
        for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = int(pid)
    return found
