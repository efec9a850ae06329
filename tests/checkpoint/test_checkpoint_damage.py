"""A checkpoint with a truncated, altered or missing file is named, with the reason, and never used."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmnorm.checkpoint import (
    CheckpointStore,
    load_full,
    newest_checkpoint,
    newest_text,
    read_state,
    read_tensors,
)
from llmnorm.errors import UserError

SHARD = "shard-00000-of-00001.safetensors"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "checkpoints", keep=5, asynchronous=False)
    for step in (9, 10, 100):
        tensors = {"model/w": torch.full((64, 8), float(step)), "model/b": torch.zeros(8)}
        store.save(step, tensors, {"step": step}, {"config.yaml": "seed: 0\n"})
    return store.directory


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_middle_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def edit_offset(path: Path) -> None:
    """Still valid JSON with the same length: only the index's own checksum can tell."""
    text = path.read_text()
    assert '"offset": [0, 0]' in text
    path.write_text(text.replace('"offset": [0, 0]', '"offset": [1, 0]'))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (SHARD, truncate, f"{SHARD} is truncated"),
    (SHARD, empty, f"{SHARD} is truncated \\(0 of"),
    (SHARD, extend, f"{SHARD} is altered"),
    (SHARD, flip_last_bit, f"{SHARD} is altered"),
    (SHARD, flip_middle_bit, f"{SHARD} is altered"),
    (SHARD, remove, f"{SHARD} is missing"),
    ("state.json", flip_middle_bit, "state.json is altered"),
    ("state.json", remove, "state.json is missing"),
    ("config.yaml", truncate, "config.yaml is truncated"),
    ("index.json", truncate, "index.json is (truncated|altered)"),
    ("index.json", empty, "index.json is truncated or altered"),
    ("index.json", remove, "index.json cannot be read"),
    ("index.json", edit_offset, "index.json is altered"),
]


@pytest.mark.parametrize(
    ("name", "damage", "reason"), DAMAGE, ids=[f"{d.__name__}-{n}" for n, d, _ in DAMAGE]
)
def test_damage_is_named_and_the_next_older_is_taken(
    checkpoints: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    damage(checkpoints / "step_100" / name)
    # 10 and not 9: steps are numbers, "step_9" sorts after "step_10" as text.
    assert newest_checkpoint(checkpoints) == checkpoints / "step_10"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(checkpoints / "step_100") in record.getMessage()
    assert re.search(reason, record.getMessage()), record.getMessage()


def test_an_index_cut_at_any_byte_is_damage(checkpoints: Path) -> None:
    path = checkpoints / "step_100" / "index.json"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert newest_checkpoint(checkpoints) == checkpoints / "step_10", length


def test_intact_checkpoints_give_the_newest_in_silence(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_checkpoint(checkpoints) == checkpoints / "step_100"
    assert CheckpointStore(checkpoints).newest() == checkpoints / "step_100"
    assert caplog.records == []


def test_all_damaged_names_each(checkpoints: Path) -> None:
    truncate(checkpoints / "step_100" / SHARD)
    remove(checkpoints / "step_10" / "state.json")
    flip_middle_bit(checkpoints / "step_9" / SHARD)
    with pytest.raises(UserError) as caught:
        newest_checkpoint(checkpoints)
    message = str(caught.value)
    for part in (
        f"step_100: {SHARD} is truncated",
        "step_10: state.json is missing",
        f"step_9: {SHARD} is altered",
        "output_dir",
    ):
        assert part in message


def test_several_damaged_files_are_all_named(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncate(checkpoints / "step_100" / SHARD)
    remove(checkpoints / "step_100" / "config.yaml")
    newest_checkpoint(checkpoints)
    assert f"{SHARD} is truncated" in caplog.text and "config.yaml is missing" in caplog.text


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "step_x").mkdir()
    (tmp_path / "step_007").mkdir()
    (tmp_path / "step_5.tmp-abc").mkdir()
    assert newest_checkpoint(tmp_path) is None


def test_an_empty_step_folder_is_damage(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoints / "step_200").mkdir()
    assert newest_checkpoint(checkpoints) == checkpoints / "step_100"
    assert "step_200: index.json cannot be read" in caplog.text


def test_a_later_format_stops_instead_of_losing_the_run(checkpoints: Path) -> None:
    """Taking an older checkpoint would throw steps away that a newer program can read."""
    from llmnorm.checkpoint.format import _checksum

    path = checkpoints / "step_100" / "index.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    body["format"] = 2
    path.write_text(json.dumps({**body, "sha256": _checksum(body)}))
    with pytest.raises(UserError, match="format 2, and this version of llmnorm reads format 1"):
        newest_checkpoint(checkpoints)


def test_reading_a_damaged_index_directly_is_a_user_error(checkpoints: Path) -> None:
    edit_offset(checkpoints / "step_9" / "index.json")
    with pytest.raises(UserError, match=r"step_9 is not an intact checkpoint: index\.json is altered"):
        read_state(checkpoints / "step_9")
    with pytest.raises(UserError, match="not an intact checkpoint"):
        read_tensors(checkpoints / "step_9", {"model/w": torch.zeros(64, 8)})


@pytest.mark.parametrize("damage", [truncate, flip_last_bit, remove])
def test_assembling_whole_tensors_verifies_the_files(
    checkpoints: Path, damage: Callable[[Path], None]
) -> None:
    """What is exported from a named folder is not verified by a search for the newest one."""
    damage(checkpoints / "step_9" / SHARD)
    with pytest.raises(UserError, match=f"step_9 is not an intact checkpoint: {SHARD} is"):
        load_full(checkpoints / "step_9")


def test_a_shard_that_cannot_be_opened_is_a_user_error(checkpoints: Path) -> None:
    for damage, reason in ((truncate, "cannot be read"), (remove, "No such file")):
        damage(checkpoints / "step_9" / SHARD)
        with pytest.raises(UserError, match=f"step_9 is not an intact checkpoint: {SHARD} .*{reason}"):
            read_tensors(checkpoints / "step_9", {"model/w": torch.zeros(64, 8), "model/b": torch.zeros(8)})


def test_a_text_comes_from_the_newest_checkpoint_where_it_is_intact(checkpoints: Path) -> None:
    assert newest_text(checkpoints, "state.json") == '{"step": 100}'
    truncate(checkpoints / "step_100" / SHARD)
    assert newest_text(checkpoints, "state.json") == '{"step": 100}'
    flip_middle_bit(checkpoints / "step_100" / "state.json")
    assert newest_text(checkpoints, "state.json") == '{"step": 10}'
    remove(checkpoints / "step_10" / "index.json")
    assert newest_text(checkpoints, "state.json") == '{"step": 9}'
    assert newest_text(checkpoints, "absent.json") is None


def test_a_damaged_newest_is_replaced_when_its_step_comes_again(checkpoints: Path) -> None:
    """Until then, saves of earlier steps must not count the damaged one among those to keep."""
    truncate(checkpoints / "step_100" / SHARD)
    store = CheckpointStore(checkpoints, keep=1, asynchronous=False)
    store.save(50, {"model/w": torch.ones(1)}, {"step": 50})
    assert store.newest() == checkpoints / "step_50"
    store.save(100, {"model/w": torch.ones(1)}, {"step": 100})
    assert store.newest() == checkpoints / "step_100"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_100"]
