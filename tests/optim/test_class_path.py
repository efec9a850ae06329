"""`optimizer.class_path`: any torch optimizer class, by role, or a reason why not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer, format_routing_table, routing_table
from llmnorm.optim.custom import require_separable

MODULE = '''
import torch
from torch.optim import Optimizer


class SignDescent(Optimizer):
    """w <- w - lr (sign(g) + weight_decay w), lr drawn a little larger if `noise`."""

    def __init__(self, params, lr, weight_decay=0.0, scales=(1.0, 1.0), noise=0.0):
        if scales[0] <= 0:
            raise ValueError(f"invalid scales {scales}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "scales": scales, "noise": noise})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    factor = group["scales"][0] + group["noise"] * torch.rand(())
                    p.add_(p.grad.sign() * factor, alpha=-group["lr"])
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1


class GlobalUnitStep(Optimizer):
    """w <- w - lr g / ||g||, the norm over all parameters."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        chosen = [(p, g["lr"]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, _ in chosen]).norm()
        for p, lr in chosen:
            p.sub_(lr * p.grad / norm)


class KeepsAFunction(SignDescent):
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["callback"] = print


class NoRate(Optimizer):
    def __init__(self, params, momentum=0.9):
        super().__init__(params, {"momentum": momentum})

    def step(self, closure=None):
        pass


class Averaging(SignDescent):
    def train(self):
        pass

    def eval(self):
        pass
'''


@pytest.fixture(scope="module", autouse=True)
def my_opt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "my_test_opt.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("my_test_opt", None)


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_by_its_path_is_adamw(llama: Callable) -> None:
    """The same updates, groups and state bytes as the method of that name: decay off on vectors included."""
    ours, theirs = llama(), llama()
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 3e-3, "betas": [0.8, 0.95], "weight_decay": 0.1}
    custom = create_optimizer("torch.optim.AdamW", ours, **options, fused=True)
    named = create_optimizer("adamw", theirs, **{**options, "betas": (0.8, 0.95)})
    for step in range(4):
        for model, optimizer in ((ours, custom), (theirs, named)):
            gradients(model, step)
            optimizer.step()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its)
    rows, expected = routing_table(custom), routing_table(named)
    assert [(r.role, r.elements, r.state_bytes) for r in rows] == [
        (r.role, r.elements, r.state_bytes) for r in expected
    ]
    assert {r.method for r in rows} == {"AdamW"} and "AdamW" in format_routing_table(rows)


def test_adafactor_passes_its_options_and_counts_its_factored_state(llama: Callable) -> None:
    model = llama()
    optimizer = create_optimizer("torch.optim.Adafactor", model, lr=1e-2, eps=[None, 1e-4], d=2.0)
    assert all((group["eps"], group["d"]) == ((None, 1e-4), 2.0) for group in optimizer.param_groups)
    gradients(model, 0)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert sum(route.state_bytes for route in routing_table(optimizer)) == held


def test_a_class_of_the_users_own(llama: Callable) -> None:
    model = llama()
    optimizer = create_optimizer(
        "my_test_opt.SignDescent", model, lr=0.1, weight_decay=0.5, scales=[2.0, 1.0]
    )
    before = copy.deepcopy(model)
    gradients(model, 0)
    optimizer.step()
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        decay = 1 - 0.1 * 0.5 if old.ndim == 2 else 1.0
        torch.testing.assert_close(new, old * decay - 0.2 * new.grad.sign())
    assert all(group["initial_lr"] == 0.1 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (
            "torch.optim.AdamX",
            {},
            "AdamX is no torch.optim.Optimizer class; did you mean torch.optim.Adam",
        ),
        ("torch.nn.Linear", {}, "torch.nn.Linear is no torch.optim.Optimizer class"),
        (
            "absent_module.Lion",
            {},
            r"module absent_module cannot be imported .*\[absent_module.py\]",
        ),
        (
            "torch.optim.Adafactor",
            {"beta": 0.9},
            "beta=0.9 is not an option of torch.optim.Adafactor",
        ),
        ("torch.optim.AdamW", {"beta": 0.9}, "it takes betas, .*; did you mean betas"),
        ("torch.optim.AdamW", {"betas": [2.0, 0.9]}, "does not take these options: Invalid beta"),
        (
            "torch.optim.Rprop",
            {"weight_decay": 0.1},
            "weight_decay=0.1 is not an option of torch.optim.Rprop",
        ),
        ("torch.optim.LBFGS", {}, "needs a closure"),
        ("torch.optim.SparseAdam", {}, "cannot make a step on a matrix and a vector with dense gradients"),
        ("torch.optim.Muon", {}, "does not take these options: Muon only supports 2D"),
        ("my_test_opt.SignDescent", {"scales": [-1.0, 0.0]}, "invalid scales"),
        ("my_test_opt.KeepsAFunction", {}, "keeps a builtin_function_or_method as 'callback'"),
        ("my_test_opt.NoRate", {}, "takes no lr, which schedules multiply"),
        ("my_test_opt.Averaging", {}, "keeps other weights for training than for evaluation"),
    ],
)
def test_what_cannot_train_is_refused_by_name(
    llama: Callable, path: str, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        create_optimizer(path, llama(), lr=1e-3, **options)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_cannot_work_on_shards_is_refused_by_name(llama: Callable, mesh: Any) -> None:
    """Elementwise classes may; Adafactor's row and column means would be those of a shard."""
    model = llama()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = DTensor.from_local(parameter.detach(), mesh, [Shard(0)])
            setattr(module, name, nn.Parameter(sharded))
    for path in ("torch.optim.AdamW", "torch.optim.SGD", "my_test_opt.SignDescent"):
        create_optimizer(path, model, lr=1e-3)
    with pytest.raises(UserError, match=r"Adafactor looks beyond the rows of a shard .*fsdp2"):
        create_optimizer("torch.optim.Adafactor", model, lr=1e-3)


def test_what_couples_parameters_is_refused_by_name_where_each_has_an_owner(llama: Callable) -> None:
    """Adafactor looks at one parameter at a time, a step along the global unit vector at all of them."""
    for path in ("torch.optim.Adafactor", "torch.optim.SGD", "my_test_opt.SignDescent"):
        require_separable(create_optimizer(path, llama(), lr=1e-3))
    require_separable(create_optimizer("muon", llama(), lr=1e-3))
    coupled = create_optimizer("my_test_opt.GlobalUnitStep", llama(), lr=1e-3)
    with pytest.raises(UserError, match=r"GlobalUnitStep updates one parameter by .*deepspeed.* ddp"):
        require_separable(coupled)


def test_shared_randomness_is_refused_where_processes_would_differ(
    llama: Callable, mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_optimizer("my_test_opt.SignDescent", llama(), lr=1e-3, noise=0.5)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)
    create_optimizer("my_test_opt.SignDescent", llama(), lr=1e-3)
    with pytest.raises(UserError, match="draws random numbers from torch's global generator"):
        create_optimizer("my_test_opt.SignDescent", llama(), lr=1e-3, noise=0.5)
