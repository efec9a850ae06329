"""Optimizers and random generators continue after a restart as if nothing had happened."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmnorm import LlmNormConfig, LlmNormForCausalLM, create_optimizer
from llmnorm.checkpoint import (
    CheckpointStore,
    model_tensors,
    optimizer_tensors,
    read_state,
    read_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)
from llmnorm.checkpoint.format import TensorRecord
from llmnorm.checkpoint.state import _device, _empty_state
from llmnorm.errors import UserError


def build(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on data that depends on the step number alone."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)

        def closure(x=x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).float().square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    tensors, described = optimizer_tensors(model, optimizer)
    store = CheckpointStore(directory, asynchronous=False)
    return store.save(1, {**model_tensors(model), **tensors}, {"optimizer": described})


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    read_tensors(path, model_tensors(model))
    restore_optimizer(model, optimizer, path)


class Odd(torch.optim.Optimizer):
    """State of every kind the format holds: odd shapes and dtypes, containers, numbers, group counters."""

    def __init__(self, params, lr: float = 0.1, rank: int = 2) -> None:
        super().__init__(params, {"lr": lr, "rank": rank})
        for group in self.param_groups:
            group["refreshes"] = 0
            group["seen"] = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            group["refreshes"] += 1
            group["seen"] += 0.1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["row"] = torch.zeros(p.shape[0], dtype=torch.float64)
                    state["momentum"] = torch.zeros_like(p, dtype=torch.bfloat16)
                    state["codes"] = torch.zeros(2, 3, dtype=torch.uint8)
                    state["factors"] = [torch.zeros(2), (torch.zeros(1), None)]
                    state["nested"] = {"mean": torch.zeros(()), "name": "x"}
                    state["updates"] = 0
                    state["scale"] = 0.1
                    state["flag"] = True
                state["row"] += p.grad.double().reshape(p.shape[0], -1).sum(1)
                state["momentum"].mul_(0.9).add_(p.grad)
                state["codes"] += 1
                state["factors"][0] += 0.3
                state["factors"][1][0].sub_(0.7)
                state["nested"]["mean"] += p.mean()
                state["updates"] += 1
                state["scale"] *= 1.1
                p.add_(state["momentum"], alpha=-group["lr"] * state["scale"])
                p.sub_(1e-3 * state["nested"]["mean"] * group["refreshes"] * group["seen"])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "adamw_amsgrad_foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True, foreach=True),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "sgd_momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, initial_accumulator_value=0.3),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-2, centered=True, momentum=0.5),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "asgd": lambda params: torch.optim.ASGD(params, lr=1e-2),
    "rprop": lambda params: torch.optim.Rprop(params, lr=1e-2),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
    "odd": lambda params: Odd(params, lr=1e-2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_continues_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Five steps, a restart and four more equal nine steps in one go; state keeps its type and place."""
    straight = build(dtype=dtype)
    straight_optimizer = OPTIMIZERS[name](straight.parameters())
    train(straight, straight_optimizer, range(9))

    model = build(dtype=dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(5))
    path = save(tmp_path, model, optimizer)

    fresh = build(seed=1, dtype=dtype)
    fresh_optimizer = OPTIMIZERS[name](fresh.parameters())
    restore(path, fresh, fresh_optimizer)
    for before, after in zip(model.parameters(), fresh.parameters(), strict=True):
        assert list(fresh_optimizer.state.get(after, {})) == list(optimizer.state.get(before, {}))
        for key, value in optimizer.state.get(before, {}).items():
            found = fresh_optimizer.state[after][key]
            assert type(found) is type(value), key
            if isinstance(value, torch.Tensor):
                assert (found.dtype, found.shape, found.device) == (value.dtype, value.shape, value.device)
                assert torch.equal(found, value), key
                assert found is not value and not found.requires_grad
    train(fresh, fresh_optimizer, range(5, 9))
    for (parameter, a), b in zip(straight.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), parameter


@pytest.mark.parametrize("name", create_optimizer.names())
def test_every_optimizer_of_ours_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    """With its defaults, on a small model that has every role, over a restart that shares no object."""

    def model_and_optimizer(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
        model = LlmNormForCausalLM(LlmNormConfig(num_attention_heads=2, num_key_value_heads=1, **shape))
        return model, create_optimizer(name, model, lr=1e-2)

    def train_language_model(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for number in steps:
            ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    straight, straight_optimizer = model_and_optimizer(0)
    train_language_model(straight, straight_optimizer, range(6))
    model, optimizer = model_and_optimizer(0)
    train_language_model(model, optimizer, range(3))
    path = save(tmp_path, model, optimizer)
    fresh, fresh_optimizer = model_and_optimizer(1)
    restore(path, fresh, fresh_optimizer)
    train_language_model(fresh, fresh_optimizer, range(3, 6))
    for (parameter, expected), found in zip(straight.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(found, expected), parameter
    for state in ("step", *{key for entries in optimizer.state.values() for key in entries}):
        for before, after in zip(straight.parameters(), fresh.parameters(), strict=True):
            a, b = straight_optimizer.state[before].get(state), fresh_optimizer.state[after].get(state)
            assert type(a) is type(b) and (a is None or torch.equal(a, b)), state


def test_rolling_back_to_before_the_first_step_leaves_no_state(tmp_path: Path) -> None:
    """A live optimizer goes back to a checkpoint that was saved when it had none."""
    model = build()
    optimizer = Odd(model.parameters())
    path = save(tmp_path, model, optimizer)
    train(model, optimizer, range(3))
    assert len(optimizer.state) == 5 and optimizer.param_groups[0]["refreshes"] == 3
    restore(path, model, optimizer)
    assert len(optimizer.state) == 0
    assert (optimizer.param_groups[0]["refreshes"], optimizer.param_groups[0]["seen"]) == (0, 0.0)


def test_state_keeps_its_dtype_where_load_state_dict_would_cast(tmp_path: Path) -> None:
    """fp32 moments of bf16 parameters stay fp32: torch's own loader makes them bf16 (pytorch#43706)."""
    model = build(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(2))
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-6
    path = save(tmp_path, model, optimizer)
    fresh = build(dtype=torch.bfloat16)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    restore(path, fresh, fresh_optimizer)
    for before, after in zip(model.parameters(), fresh.parameters(), strict=True):
        restored = fresh_optimizer.state[after]
        assert restored["exp_avg"].dtype == torch.float32 and restored["step"].dtype == torch.float32
        assert torch.equal(restored["exp_avg"], optimizer.state[before]["exp_avg"])
        assert restored["exp_avg_sq"].dtype == torch.bfloat16


def test_tensor_and_json_names(tmp_path: Path) -> None:
    model = build()
    optimizer = Odd(model[2].parameters())
    train(model, optimizer, range(3))
    tensors, described = optimizer_tensors(model, optimizer)
    stem = "optimizer/2.weight"
    keys = ["row", "momentum", "codes", "factors/0", "factors/1/0", "nested/mean"]
    assert list(tensors) == [f"{stem}/{key}" for key in keys]
    assert json.loads(json.dumps(described)) == described
    assert described["class"] == "Odd"
    assert described["groups"] == [{"refreshes": 3, "seen": 0.1 + 0.1 + 0.1}]
    assert described["state"]["2.weight"]["factors"] == {
        "list": [{"tensor": f"{stem}/factors/0"}, {"tuple": [{"tensor": f"{stem}/factors/1/0"}, None]}]
    }
    assert described["state"]["2.weight"]["updates"] == 3


def test_hyperparameters_come_from_the_config_and_counters_from_the_checkpoint(tmp_path: Path) -> None:
    model = build()
    optimizer = Odd(model.parameters(), lr=0.5, rank=2)
    optimizer.param_groups[0]["initial_lr"] = 0.5
    train(model, optimizer, range(3))
    path = save(tmp_path, model, optimizer)
    fresh_optimizer = Odd(model.parameters(), lr=0.25, rank=3)
    fresh_optimizer.param_groups[0]["initial_lr"] = 0.25
    restore_optimizer(model, fresh_optimizer, path)
    (group,) = fresh_optimizer.param_groups
    assert (group["lr"], group["initial_lr"], group["rank"]) == (0.25, 0.25, 3)
    assert (group["refreshes"], group["seen"]) == (3, optimizer.param_groups[0]["seen"])


def test_keywords_of_an_open_constructor_are_hyperparameters() -> None:
    class Open(torch.optim.SGD):
        def __init__(self, params, **shared) -> None:
            super().__init__(params, lr=0.1)
            for group in self.param_groups:
                group["counted"] = 4
            self.defaults |= shared

    model = build()
    optimizer = Open(model.parameters(), momentum_scale=0.5)
    optimizer.param_groups[0]["momentum_scale"] = 0.5
    _, described = optimizer_tensors(model, optimizer)
    assert described["groups"] == [{"counted": 4}]


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    path = save(tmp_path, model, optimizer)
    with pytest.raises(UserError, match=r"saved by AdamW, and this run's optimizer is SGD.*output_dir"):
        restore_optimizer(model, torch.optim.SGD(model.parameters()), path)
    halves = [{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
    with pytest.raises(UserError, match="has 1 parameter groups, and this run has 2"):
        restore_optimizer(model, torch.optim.AdamW(halves), path)
    with pytest.raises(
        UserError, match=r"holds state of 0\.bias \(4 in all\), which this run does not train"
    ):
        restore_optimizer(model, torch.optim.AdamW(model[2].parameters()), path)
    wider = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 7, bias=False))
    with pytest.raises(UserError, match=r"2\.weight/exp_avg has shape \[4, 5\] there and \[7, 5\]"):
        restore_optimizer(wider, torch.optim.AdamW(wider.parameters()), path)


def test_state_that_is_not_data_is_refused_by_name() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(1))
    optimizer.state[model[2].weight]["projector"] = object()
    with pytest.raises(TypeError, match=r"optimizer/2\.weight/projector: .* type object cannot be saved"):
        optimizer_tensors(model, optimizer)
    del optimizer.state[model[2].weight]["projector"]
    optimizer.state["global"] = {"step": 3}
    with pytest.raises(TypeError, match="optimizer state under 'global', no parameter, cannot be saved"):
        optimizer_tensors(model, optimizer)


# (saved state: device, shape; saved parameter's device; group options) -> device beside a parameter on "meta"
PLACES = {
    "moments follow the parameter to another device": (("cpu", [4]), "cpu", {}, "meta"),
    "moments stay beside the parameter": (("cuda", [4]), "cuda", {}, "meta"),
    "moments offloaded to the host stay there": (("cpu", [4]), "cuda", {}, "cpu"),
    "a step count stays on the host": (("cpu", []), "cpu", {}, "cpu"),
    "a step count of a fused optimizer is on the device": (("cpu", []), "cpu", {"fused": True}, "meta"),
    "a step count of a capturable optimizer too": (("cpu", []), "cpu", {"capturable": True}, "meta"),
}


@pytest.mark.parametrize("case", PLACES)
def test_state_goes_to_the_device_where_the_optimizer_expects_it(case: str) -> None:
    """The meta device stands for an accelerator: the rule needs no memory."""
    (device, shape), parameter_device, group, expected = PLACES[case]
    record = TensorRecord(shape, "F32", device, None)
    saved_parameter = TensorRecord([4], "F32", parameter_device, None)
    parameter = torch.empty(4, device="meta")
    target = _empty_state(
        record, saved_parameter, parameter, _device(record, saved_parameter, parameter, group)
    )
    assert target.device.type == expected
    assert list(target.shape) == shape


def test_frozen_and_unstepped_parameters_have_no_state(tmp_path: Path) -> None:
    model = build()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    path = save(tmp_path, model, optimizer)
    fresh = build(seed=3)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters())
    restore(path, fresh, fresh_optimizer)
    assert set(fresh_optimizer.state) == {fresh[1].weight, fresh[1].bias, fresh[2].weight}


def draw() -> list[Any]:
    return [torch.randn(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


def test_random_generators_continue(tmp_path: Path) -> None:
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)
    # One Gaussian each leaves the second of the pair cached, in Python and in NumPy.
    draw()
    path = CheckpointStore(tmp_path, asynchronous=False).save(1, rng_tensors(0), {})
    after = [draw(), draw()]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    restore_rng(path, 0)
    assert [draw(), draw()] == after


def test_generators_of_an_unknown_rank_stay_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = CheckpointStore(tmp_path, asynchronous=False).save(1, rng_tensors(0), {})
    torch.manual_seed(11)
    expected = torch.randn(2)
    torch.manual_seed(11)
    with caplog.at_level(logging.WARNING):
        restore_rng(path, 1)
    assert torch.equal(torch.randn(2), expected)
    assert "rng/1/torch" in caplog.text and "keep their seeds" in caplog.text
    caplog.clear()
    restore_rng(path, 2)
    assert caplog.text == "", "one process tells of all"


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_state_on_a_gpu_continues_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    """Saved through pinned memory while training goes on; fused keeps its step count on the GPU."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).cuda()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    model = build().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    store = CheckpointStore(tmp_path, asynchronous=True)
    for number in range(6):
        steps(model, optimizer, range(number, number + 1))
        tensors, described = optimizer_tensors(model, optimizer)
        store.save(number, {**model_tensors(model), **tensors, **rng_tensors(0)}, {"optimizer": described})
    drawn = torch.randn(3, device="cuda")
    steps(model, optimizer, range(6, 9))
    path = store.newest()
    fresh = build(seed=1).cuda()
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2, fused=fused)
    restore(path, fresh, fresh_optimizer)
    restore_rng(path, 0)
    assert torch.equal(torch.randn(3, device="cuda"), drawn)
    for parameter in fresh.parameters():
        state = fresh_optimizer.state[parameter]
        assert state["step"].is_cuda == fused and state["exp_avg"].is_cuda and state["step"] == 6
    steps(fresh, fresh_optimizer, range(6, 9))
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    """The whole folder is JSON, text and safetensors; torch and pickle would refuse all of it."""
    model = build()
    optimizer = Odd(model.parameters())
    train(model, optimizer, range(1))
    path = save(tmp_path, model, optimizer)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert read_state(path)["optimizer"]["class"] == "Odd"
    sources = (Path(__file__).parents[2] / "llmnorm" / "checkpoint").glob("*.py")
    for source in sources:
        text = source.read_text(encoding="utf-8")
        assert "import pickle" not in text and "torch.save" not in text and "torch.load(" not in text
        assert "object_list" not in text and "gather_object" not in text
