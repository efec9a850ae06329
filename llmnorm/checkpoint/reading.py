"""Reading a checkpoint back, under any number of processes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmnorm.checkpoint.format import (
    DTYPE_NAMES,
    DTYPES,
    STATE_NAME,
    Block,
    DamagedIndex,
    Index,
    TensorRecord,
    file_damage,
    read_index,
)
from llmnorm.checkpoint.layout import Box, local_box, local_tensor
from llmnorm.checkpoint.ranks import Ranks
from llmnorm.errors import UserError

logger = logging.getLogger("llmnorm.checkpoint")

_STEP_NAME = re.compile(r"step_(0|[1-9][0-9]*)")


def published_steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in `directory`, ascending; intact or not."""
    if not directory.is_dir():
        return []
    names = (_STEP_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in names if match)


def find_damage(checkpoint: Path, ranks: Ranks | None = None) -> list[str]:
    """What is wrong with a checkpoint's files, one phrase each, naming the file; empty if every byte is
    intact.

    Reads and hashes all the files, with several ranks each its share.
    """
    rank, world_size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    damage: list[str] = []
    try:
        files = sorted(read_index(checkpoint).files.items())
    except DamagedIndex as error:
        files, damage = [], [str(error)] if rank == 0 else []
    for name, record in files[rank::world_size]:
        problem = file_damage(checkpoint / name, record)
        if problem:
            damage.append(problem)
    return [problem for part in ranks.exchange(damage) for problem in part] if ranks else damage


def newest_checkpoint(directory: str | Path, ranks: Ranks | None = None) -> Path | None:
    """The newest intact `step_N` in `directory`, or None if there is no checkpoint at all.

    A damaged one is named in a warning, with the file and the reason, and passed over. Raises UserError if
    all are damaged: starting from nothing would then throw away a run that may be repairable. Collective if
    `ranks` is given.
    """
    directory = Path(directory)
    steps = published_steps(directory)
    if ranks:
        steps = ranks.exchange(steps)[0]
    damaged: list[str] = []
    for step in reversed(steps):
        checkpoint = directory / f"step_{step}"
        damage = find_damage(checkpoint, ranks)
        if not damage:
            return checkpoint
        damaged.append(f"{checkpoint}: {', '.join(damage)}")
        if ranks is None or ranks.rank == 0:
            logger.warning("skipping the damaged checkpoint %s", damaged[-1])
    if damaged:
        raise UserError(
            f"no intact checkpoint is left in {directory}: {'; '.join(damaged)}; restore one from a copy, or "
            f"delete {directory} (or set output_dir to a new folder) to train from the start"
        )
    return None


def newest_text(directory: str | Path, name: str) -> str | None:
    """The text file `name` of the newest checkpoint in which it is intact, without reading the shards."""
    for step in reversed(published_steps(Path(directory))):
        checkpoint = Path(directory) / f"step_{step}"
        try:
            record = read_index(checkpoint).files.get(name)
        except DamagedIndex:
            continue
        if record is not None and file_damage(checkpoint / name, record) is None:
            return (checkpoint / name).read_text(encoding="utf-8")
    return None


def _not_intact(checkpoint: Path, reason: str) -> UserError:
    return UserError(
        f"{checkpoint} is not an intact checkpoint: {reason}; name a folder checkpoints/step_N of a run, or "
        "the run itself for its newest intact one"
    )


def open_index(checkpoint: str | Path) -> Index:
    """The index of a checkpoint that the user named; UserError where there is none."""
    try:
        return read_index(Path(checkpoint))
    except DamagedIndex as error:
        raise _not_intact(Path(checkpoint), str(error)) from error


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The `state` that was given to `CheckpointStore.save`."""
    open_index(checkpoint)
    return json.loads((Path(checkpoint) / STATE_NAME).read_text(encoding="utf-8"))


def _overlaps(record: TensorRecord, wanted: Box) -> Iterable[tuple[Block, Box, Box]]:
    for block in record.blocks:
        saved = Box(tuple(block.offset), tuple(block.shape))
        common = saved.intersect(wanted)
        if not common.is_empty:
            yield block, saved, common


@torch.no_grad()
def copy_from_checkpoint(checkpoint: Path, index: Index, into: Mapping[str, Tensor]) -> None:
    """Fill this process's part of every tensor, reading no more bytes than that part holds (in place)."""
    jobs: dict[str, list[tuple[str, Tensor, Box, Box, Box]]] = {}
    for name, target in into.items():
        wanted = local_box(target)
        if wanted is None:
            continue
        for block, saved, common in _overlaps(index.tensors[name], wanted):
            jobs.setdefault(block.file, []).append((block.key, local_tensor(target), wanted, saved, common))
    for file_name, parts in jobs.items():
        try:
            with safe_open(checkpoint / file_name, framework="pt", device="cpu") as file:
                for key, target, wanted, saved, common in parts:
                    if common == saved:
                        source = file.get_tensor(key)
                    else:
                        source = file.get_slice(key)[common.slices(saved)]
                    target[common.slices(wanted)].copy_(source)
        except (OSError, SafetensorError) as error:
            raise _not_intact(checkpoint, f"{file_name} cannot be read ({error})") from error


def _several(phrases: list[str], limit: int = 3) -> str:
    more = f" and {len(phrases) - limit} more" if len(phrases) > limit else ""
    return ", ".join(phrases[:limit]) + more


def read_tensors(checkpoint: str | Path, into: Mapping[str, Tensor], elsewhere: Collection[str] = ()) -> None:
    """Fill plain tensors or DTensors (any mesh and placement) in place from a checkpoint of any process
    count.

    The names must be exactly the checkpoint's names below the same first component (`model/`, `optimizer/`),
    but for those that other processes keep (`elsewhere`), and shapes and dtypes must be the saved ones.
    Raises UserError, before anything is changed, naming what differs.
    """
    copy_from_checkpoint(Path(checkpoint), _index_that_fits(Path(checkpoint), into, elsewhere), into)


def read_whole(checkpoint: str | Path, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of `like` as the checkpoint has it, whole and on the CPU, one in memory at a time.

    `like` (meta tensors do) gives names, shapes and dtypes, under the rules and errors of `read_tensors`.
    """
    index = _index_that_fits(Path(checkpoint), like)
    for name, tensor in like.items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        copy_from_checkpoint(Path(checkpoint), index, {name: whole})
        yield name, whole


def _index_that_fits(checkpoint: Path, into: Mapping[str, Tensor], elsewhere: Collection[str] = ()) -> Index:
    index = open_index(checkpoint)
    sections = {name.split("/", 1)[0] for name in into}
    saved = {name for name in index.tensors if name.split("/", 1)[0] in sections}
    remedy = (
        f"a run resumes only with the model and optimizer that saved {checkpoint}: restore those keys, or "
        "set output_dir to a new folder"
    )
    shapes = [
        f"{name} has shape {index.tensors[name].shape} there and {list(tensor.shape)} in this run"
        for name, tensor in into.items()
        if name in saved and index.tensors[name].shape != list(tensor.shape)
    ]
    if shapes:
        raise UserError(f"the checkpoint's tensors do not fit: {_several(shapes)}; {remedy}")
    absent, surplus = sorted(into.keys() - saved), sorted(saved - into.keys() - set(elsewhere))
    if absent or surplus:
        problems = [f"this run's {_several(absent)} missing in the checkpoint"] if absent else []
        problems += [f"the checkpoint's {_several(surplus)} unknown to this run"] if surplus else []
        raise UserError(f"the checkpoint's tensors do not fit: {'; '.join(problems)}; {remedy}")
    dtypes = [
        f"{name} is {DTYPES[index.tensors[name].dtype]} there and {tensor.dtype} in this run"
        for name, tensor in into.items()
        if index.tensors[name].dtype != DTYPE_NAMES.get(tensor.dtype)
    ]
    if dtypes:
        raise UserError(
            f"the checkpoint's tensors do not fit (train.precision?): {_several(dtypes)}; {remedy}"
        )
    return index


def load_full(checkpoint: str | Path, prefix: str = "model/") -> dict[str, Tensor]:
    """Whole CPU tensors in their saved dtypes, keyed by the name after `prefix`; verifies the files first."""
    checkpoint = Path(checkpoint)
    index = open_index(checkpoint)
    if damage := find_damage(checkpoint):
        raise _not_intact(checkpoint, ", ".join(damage))
    names = [name for name in index.tensors if name.startswith(prefix)]
    if not names:
        raise UserError(f"{checkpoint} holds no tensor whose name starts with {prefix!r}")
    tensors = {
        name: torch.empty(index.tensors[name].shape, dtype=DTYPES[index.tensors[name].dtype], device="cpu")
        for name in names
    }
    copy_from_checkpoint(checkpoint, index, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
