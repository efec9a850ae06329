"""What is saved comes back bit for bit in every data type; a misfit is named before anything changes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmnorm.checkpoint import CheckpointStore, load_full, model_tensors, read_state, read_tensors
from llmnorm.checkpoint import store as store_module
from llmnorm.checkpoint.format import DTYPE_NAMES
from llmnorm.errors import UserError


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bit pattern of the type, NaN payloads and negative zeros among them (booleans: 0 and 1)."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    width = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * width), dtype=torch.uint8).view(dtype)


def every_kind() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {f"t/{dtype}": random_bits(dtype, 3, 5) for dtype in DTYPE_NAMES}
    tensors |= {f"scalar/{dtype}": random_bits(dtype, 1).reshape(()) for dtype in DTYPE_NAMES}
    return tensors | {
        "empty/rows": torch.empty(0, 4),
        "empty/columns": torch.empty(4, 0, dtype=torch.bfloat16),
        "layout/transposed": torch.randn(4, 6).t(),
        "layout/strided": torch.randn(8, 6)[::2, 1::2],
        "layout/expanded": torch.randn(1, 6).expand(3, 6),
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    tensors = every_kind()
    store = CheckpointStore(tmp_path, asynchronous=asynchronous)
    path = store.save(7, tensors, {"step": 7, "loss": 0.1 + 0.2}, {"config.yaml": "seed: 0 # é\n"})
    store.wait()
    assert path == tmp_path / "step_7"
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read_tensors(path, into)
    whole = load_full(path, prefix="")
    for name, tensor in tensors.items():
        assert into[name].dtype == whole[name].dtype == tensor.dtype
        assert bits(into[name]) == bits(whole[name]) == bits(tensor), name
    assert read_state(path) == {"step": 7, "loss": 0.1 + 0.2}
    assert (path / "config.yaml").read_text(encoding="utf-8") == "seed: 0 # é\n"


def test_reading_fills_any_memory_layout(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, asynchronous=False)
    saved = torch.randn(6, 4)
    path = store.save(1, {"t/x": saved}, {})
    memory = torch.zeros(4, 12)
    read_tensors(path, {"t/x": memory.t()[::2]})
    assert torch.equal(memory.t()[::2], saved)
    assert memory.t()[1::2].count_nonzero() == 0


def test_asynchronous_saving_writes_the_same_bytes(tmp_path: Path) -> None:
    tensors = every_kind()
    paths = []
    for asynchronous in (False, True):
        store = CheckpointStore(tmp_path / str(asynchronous), asynchronous=asynchronous)
        paths.append(store.save(3, tensors, {"step": 3}, {"a.txt": "a"}))
        store.wait()
    names = sorted(file.name for file in paths[0].iterdir())
    assert names == ["a.txt", "index.json", "shard-00000-of-00001.safetensors", "state.json"]
    for name in names:
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), name


def test_the_snapshot_is_taken_before_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors and state change while the writer has not begun; the files hold the values at `save`."""
    begin = threading.Event()
    write_shard = store_module.write_shard

    def delayed(*args):
        assert begin.wait(timeout=30)
        return write_shard(*args)

    monkeypatch.setattr(store_module, "write_shard", delayed)
    store = CheckpointStore(tmp_path, asynchronous=True)
    weight, state = torch.ones(100, 10), {"tokens": 5}
    path = store.save(1, {"model/w": weight}, state)
    assert not path.exists()
    weight.zero_()
    state["tokens"] = 6
    begin.set()
    store.wait()
    assert torch.equal(load_full(path)["w"], torch.ones(100, 10))
    assert read_state(path) == {"tokens": 5}
    # The host copies are reused by the next save: it must hold the new values, in the new shapes.
    store.save(2, {"model/w": weight, "model/v": torch.full((3,), 2.0)}, state)
    store.save(3, {"model/w": torch.full((7, 2), 3.0, dtype=torch.bfloat16)}, state)
    store.wait()
    second, third = load_full(tmp_path / "step_2"), load_full(tmp_path / "step_3")
    assert torch.equal(second["w"], torch.zeros(100, 10)) and torch.equal(second["v"], torch.full((3,), 2.0))
    assert torch.equal(third["w"], torch.full((7, 2), 3.0, dtype=torch.bfloat16)) and len(third) == 1


def test_shards_are_plain_safetensors_and_the_index_tells_the_truth(tmp_path: Path) -> None:
    """Any safetensors reader opens a shard; the index's shapes, types and offsets are the file's."""
    tensors = every_kind()
    path = CheckpointStore(tmp_path, asynchronous=False).save(1, tensors, {})
    index = json.loads((path / "index.json").read_text())
    assert index["format"] == 1 and index["step"] == 1
    assert index["tensors"].keys() == tensors.keys()
    assert index["files"].keys() == {"shard-00000-of-00001.safetensors", "state.json"}
    for name, record in index["files"].items():
        assert record["size"] == (path / name).stat().st_size
    with safe_open(path / "shard-00000-of-00001.safetensors", framework="pt") as file:
        assert set(file.keys()) == tensors.keys()
        for name, record in index["tensors"].items():
            (block,) = record["blocks"]
            assert block["offset"] == [0] * tensors[name].ndim
            assert record["shape"] == block["shape"] == list(tensors[name].shape)
            assert DTYPE_NAMES[tensors[name].dtype] == record["dtype"]
            assert bits(file.get_tensor(block["key"])) == bits(tensors[name])


def test_a_model_comes_back_whole_with_tied_weights_once(tmp_path: Path) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.ModuleDict(
            {"embed": nn.Embedding(11, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 11)}
        )
        model["norm"].register_buffer("cache", torch.randn(3), persistent=False)
        model["head"].weight = model["embed"].weight
        return model

    model, fresh = build(0), build(1)
    path = CheckpointStore(tmp_path, asynchronous=False).save(1, model_tensors(model), {})
    names = set(load_full(path))
    assert names == {
        "embed.weight", "head.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked",
    }  # fmt: skip
    read_tensors(path, model_tensors(fresh))
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    assert fresh["head"].weight is fresh["embed"].weight
    assert fresh["head"].weight.requires_grad


def test_wrappers_do_not_change_names() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled = nn.Sequential(torch.compile(plain[0]), plain[1])
    assert model_tensors(compiled).keys() == model_tensors(plain).keys()
    assert model_tensors(torch.compile(plain)).keys() == model_tensors(plain).keys()


# name of the case -> (what the run asks for, words the error must hold)
MISFITS = {
    "shape": (
        {"model/a": torch.zeros(2, 4), "model/b": torch.zeros(5)},
        ["model/a", "[2, 3]", "[2, 4]", "output_dir"],
    ),
    "missing": (
        {"model/a": torch.zeros(2, 3), "model/b": torch.zeros(5), "model/c": torch.zeros(1)},
        ["model/c", "missing", "output_dir"],
    ),
    "unexpected": ({"model/a": torch.zeros(2, 3)}, ["model/b", "unknown", "output_dir"]),
    "dtype": (
        {"model/a": torch.zeros(2, 3), "model/b": torch.zeros(5, dtype=torch.bfloat16)},
        ["model/b", "float32", "bfloat16", "output_dir"],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_named_before_anything_is_read(tmp_path: Path, case: str) -> None:
    store = CheckpointStore(tmp_path, asynchronous=False)
    path = store.save(
        4, {"model/a": torch.ones(2, 3), "model/b": torch.ones(5), "rng/0/x": torch.ones(1)}, {}
    )
    into, words = MISFITS[case]
    into = {name: tensor.clone() for name, tensor in into.items()}
    with pytest.raises(UserError) as caught:
        read_tensors(path, into)
    for word in [*words, str(path)]:
        assert word in str(caught.value)
    assert all(tensor.count_nonzero() == 0 for tensor in into.values())


def test_a_section_can_be_read_alone(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, asynchronous=False).save(
        1, {"model/a": torch.ones(2), "optimizer/a/m": torch.full((2,), 2.0)}, {}
    )
    momentum = torch.zeros(2)
    read_tensors(path, {"optimizer/a/m": momentum})
    assert momentum.tolist() == [2.0, 2.0]
    assert load_full(path).keys() == {"a"}
    with pytest.raises(UserError, match="no tensor whose name starts with 'nothing/'"):
        load_full(path, "nothing/")


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no_such.*index\.json cannot be read.*step_N"):
        load_full(tmp_path / "no_such")


def test_unsupported_types_are_refused_by_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=r"model/z: tensors of torch\.complex64"):
        store.save(1, {"model/z": torch.zeros(2, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []
