"""The checkpoints of one run: published whole or not at all, without stalling the step, kept by a rule."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmnorm.checkpoint.format import (
    DTYPE_NAMES,
    INDEX_NAME,
    STATE_NAME,
    Block,
    FileRecord,
    Index,
    TensorRecord,
    index_to_text,
    sync_directory,
    write_shard,
    write_text,
)
from llmnorm.checkpoint.layout import HostBuffers, local_box, local_tensor, placement_names
from llmnorm.checkpoint.ranks import REMEDIES, Ranks, SaveFailed, logger
from llmnorm.checkpoint.reading import newest_checkpoint, published_steps
from llmnorm.errors import UserError

# Names of unpublished directories: being written, set aside while their replacement is renamed, being
# deleted.
_UNPUBLISHED = re.compile(r"(step_[0-9]+)\.(tmp|old|del)-[0-9a-f]+")


def _unpublished(directory: Path, step: int, kind: str) -> Path:
    return directory / f"step_{step}.{kind}-{uuid.uuid4().hex[:8]}"


def _lower_thread_priority() -> None:
    """Let the training threads win every contest for a core.

    On Linux the nice value belongs to the thread. Where it belongs to the process the training would slow
    down too, so nothing is done there.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What this rank holds of each tensor, as JSON."""
    described = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"{name}: tensors of {tensor.dtype} cannot be saved")
        box = local_box(tensor)
        described[name] = {
            "shape": list(tensor.shape),
            "dtype": DTYPE_NAMES[tensor.dtype],
            "device": tensor.device.type,
            "placements": placement_names(tensor),
            "box": [box.offset, box.shape] if box else None,
        }
    return described


def _shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def _assemble(step: int, descriptions: list[dict[str, Any]]) -> Index:
    """Who writes what: every distinct block is written once, by the lowest rank that holds it.

    So replicas (of plain tensors, of DTensors along a replicated mesh dimension) cost nothing, and a tensor
    that only one rank has (its RNG state) is written by that rank.
    """
    index = Index(step, {})
    taken: set[tuple[str, tuple[int, ...]]] = set()
    for rank, description in enumerate(descriptions):
        file = _shard_name(rank, len(descriptions))
        for name, held in description.items():
            facts = (held["shape"], held["dtype"], held["device"], held["placements"])
            record = index.tensors.setdefault(name, TensorRecord(*facts))
            assert (record.shape, record.dtype) == facts[:2], (
                f"{name} differs between ranks: {record}, {facts}"
            )
            if held["box"] is None:
                continue
            offset, shape = held["box"]
            empty_part = 0 in shape and 0 not in held["shape"]
            if empty_part or (name, tuple(offset)) in taken:
                continue
            taken.add((name, tuple(offset)))
            record.blocks.append(Block(file, name, list(offset), list(shape)))
    return index


class CheckpointStore:
    """Saves and finds the `step_N` folders of `directory` (a run's `checkpoints/`).

    A save writes to a temporary name in the same folder, flushes every file and the folder to the disk, and
    renames; so a folder called `step_N` is always whole, whenever the process is killed. With several
    processes every rank writes its own shard, and a failure of any rank fails the save on all. Older
    checkpoints are deleted only after a newer one is published: the last `keep` stay, and those whose step is
    a multiple of `keep_every`.

    With `asynchronous`, `save` returns after the tensors are copied to host memory; a thread of low priority
    hashes and writes them. Its failure is raised by the next `save` or `wait`. Call `wait` before the process
    ends.

    Every method is collective: all ranks call it, with equal arguments apart from the local parts of tensors.
    Raises UserError where the directory cannot be written or a save fails (disk full, no permission).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        asynchronous: bool = True,
    ) -> None:
        assert keep >= 1 and (keep_every is None or keep_every >= 1), (keep, keep_every)
        self.directory = Path(directory)
        self.keep = keep
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self.ranks = Ranks()
        self._buffers = HostBuffers()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        try:
            self.ranks.together(self._open if self.ranks.rank == 0 else lambda: None)
        except SaveFailed as error:
            raise UserError(
                f"checkpoints cannot be written to {self.directory}: {error}; {self._remedy(error)}"
            ) from error

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        files: Mapping[str, str] | None = None,
    ) -> Path:
        """Save tensors (plain or DTensor, by name), JSON `state` and text `files` as `step_N`: its path.

        `state` and `files` of rank 0 count. A `step_N` that exists is replaced. Waits for the previous save.
        """
        self.wait()
        final = self.directory / f"step_{step}"
        temporary = _unpublished(self.directory, step, "tmp")

        # Serialized here and not in the thread: the caller goes on changing these objects.
        texts = dict(files or {})

        def begin() -> tuple[str, dict[str, Any]]:
            texts[STATE_NAME] = json.dumps(state)
            described = _describe(tensors)
            if self.ranks.rank == 0:
                temporary.mkdir()
            return temporary.name, described

        with self._failing_whole(step, temporary):
            answers = self.ranks.together(begin)
        temporary = self.directory / answers[0][0]
        index = _assemble(step, [described for _, described in answers])
        own = _shard_name(self.ranks.rank, self.ranks.world_size)
        mine = {
            name: local_tensor(tensors[name])
            for name, record in index.tensors.items()
            if any(block.file == own for block in record.blocks)
        }
        if not self.asynchronous:
            self._write(temporary, final, index, mine, texts)
            return final
        mine = self._buffers.copy(mine)
        # Not a daemon: an interpreter that ends without `wait` still finishes the save.
        self._writer = threading.Thread(
            target=self._write_in_background,
            args=(temporary, final, index, mine, texts),
            name=f"checkpoint-{step}",
        )
        self._writer.start()
        return final

    def wait(self) -> None:
        """Return when no save is in flight; raises the failure of the last one."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def newest(self) -> Path | None:
        """The newest checkpoint with every byte intact; damaged ones are named in a warning and skipped."""
        self.wait()
        return newest_checkpoint(self.directory, self.ranks)

    def discard_newer(self, step: int) -> None:
        """Delete the checkpoints after `step`, so that a run that rolled back cannot restart from them."""
        self.wait()
        if self.ranks.rank == 0:
            self._delete([newer for newer in published_steps(self.directory) if newer > step])
        self.ranks.exchange(None)

    def _open(self) -> None:
        """Make the directory, prove that it can be written, and clear what a killed process left."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = _unpublished(self.directory, 0, "tmp")
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise OSError(error.errno, error.strerror, error.filename or str(self.directory)) from error
        for path in sorted(self.directory.iterdir()):
            match = _UNPUBLISHED.fullmatch(path.name)
            if match and match[2] == "old" and not (self.directory / match[1]).exists():
                path.rename(self.directory / match[1])  # killed between the two renames of a replacement
            elif match:
                shutil.rmtree(path, ignore_errors=True)

    def _write_in_background(self, *work: Any) -> None:
        _lower_thread_priority()
        try:
            self._write(*work)
        except BaseException as error:
            self._failure = error

    def _write(
        self,
        temporary: Path,
        final: Path,
        index: Index,
        mine: Mapping[str, Tensor],
        texts: Mapping[str, str],
    ) -> None:
        own = _shard_name(self.ranks.rank, self.ranks.world_size)

        def write_own() -> list[Any]:
            record = write_shard(temporary / own, mine)
            return [own, record.size, record.sha256]

        def publish() -> None:
            if self.ranks.rank == 0:
                index.files = {name: FileRecord(size, sha256) for name, size, sha256 in shards}
                self._publish(temporary, final, index, texts)

        with self._failing_whole(index.step, temporary):
            shards = self.ranks.together(write_own)
            self.ranks.together(publish)
        if self.ranks.rank == 0:
            self._prune(index.step)

    def _publish(self, temporary: Path, final: Path, index: Index, texts: Mapping[str, str]) -> None:
        for name, record in index.files.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != record.size:
                raise OSError(
                    errno.ENOENT,
                    "another process wrote it elsewhere; every process must see one output_dir",
                    name,
                )
        for name, text in texts.items():
            index.files[name] = write_text(temporary / name, text)
        write_text(temporary / INDEX_NAME, index_to_text(index))
        sync_directory(temporary)
        aside = _unpublished(self.directory, index.step, "old")
        replacing = final.exists()
        if replacing:
            final.rename(aside)
        temporary.rename(final)
        sync_directory(self.directory)
        if replacing:
            shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def _failing_whole(self, step: int, temporary: Path) -> Iterator[None]:
        """A save that fails on any rank leaves nothing behind and is one UserError on every rank."""
        try:
            yield
        except BaseException as error:
            if self.ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            if not isinstance(error, SaveFailed):
                raise
            older = [f"step_{kept}" for kept in published_steps(self.directory)]
            survivors = (
                f"the earlier checkpoints ({', '.join(older)}) are untouched" if older else "nothing was lost"
            )
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self.directory}: {error}; "
                f"no half-written one is left and {survivors}; {self._remedy(error)}, then start the same "
                "command again"
            ) from error

    @staticmethod
    def _remedy(error: SaveFailed) -> str:
        numbers = [failure["errno"] for failure in error.failures]
        known = [REMEDIES[number] for number in numbers if number in REMEDIES]
        return known[0] if known else "check that disk, or set output_dir to another one"

    def _prune(self, published: int) -> None:
        """Delete what the rule does not keep among the steps up to the one just published.

        Later steps are leftovers of a run that went back (a damaged newest checkpoint): counting them would
        delete the intact ones, so they wait until their step is saved again.
        """
        steps = [step for step in published_steps(self.directory) if step <= published]
        self._delete(
            [step for step in steps[: -self.keep] if self.keep_every is None or step % self.keep_every != 0]
        )

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            # Renamed first: a kill in the middle of the deletion must not leave a step_N with files missing.
            doomed = _unpublished(self.directory, step, "del")
            try:
                (self.directory / f"step_{step}").rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("the old checkpoint step_%d could not be deleted: %s", step, error)
