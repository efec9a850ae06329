"""Weights that move in the backward pass: the ordinary step's, bit for bit, one gradient alive at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer, fused_backward_of
from llmnorm.optim.registry import METHODS, UNFUSED

FUSED = sorted(METHODS.keys() - UNFUSED.keys())
# What refreshes, resets and random numbers there are happens within four steps.
OPTIONS: dict[str, dict] = {
    "galore": {"update_proj_gap": 2},
    "fira": {"update_proj_gap": 2},
    "apollo": {"update_proj_gap": 2},
    "spam": {"reset_interval": 3, "warmup_steps": 1, "grace_steps": 1},
    "stable_spam": {"reset_interval": 3},
    "muon": {"ns_dtype": "fp32"},
}
CASES = {
    **{name: (name, OPTIONS.get(name, {}), torch.float32) for name in FUSED},
    "adamw rounded": ("adamw", {"stochastic_rounding": True}, torch.bfloat16),
    "galore rounded": ("galore", {"update_proj_gap": 2, "stochastic_rounding": True}, torch.bfloat16),
    "galore int8": ("galore", {"weights": "int8", "state_bits": 8}, torch.bfloat16),
    "scale cautious": ("scale", {"cautious_weight_decay": True, "weight_decay": 0.1}, torch.float32),
}


def loss_of(model: nn.Module, step: int) -> Tensor:
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def make(
    llama: Callable, case: str, fused: bool, tied: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    name, options, dtype = CASES[case]
    torch.manual_seed(0)
    model = llama(tied).to(dtype)
    return model, create_optimizer(name, model, lr=1e-2, **options, fused_backward=fused)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] / (1 + step)  # as a schedule does
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a.detach().float(), b.detach().float()) for a, b in pairs)


@pytest.mark.parametrize("case", CASES)
def test_o26_the_weights_and_the_state_are_those_of_the_ordinary_step(llama, case):
    plain, fused = make(llama, case, fused=False), make(llama, case, fused=True)
    for model, optimizer in (plain, fused):
        train(model, optimizer, range(4))
    assert equal(plain[0], fused[0])
    for a, b in zip(plain[0].parameters(), fused[0].parameters(), strict=True):
        mine, its = plain[1].state[a], fused[1].state[b]
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in mine)
    assert not equal(fused[0], make(llama, case, fused=False)[0]), "nothing has moved"


@pytest.mark.parametrize("case", ["adamw", "galore", "apollo_mini", "adamw rounded"])
def test_o22_resumed_equals_never_stopped(llama, case):
    model, optimizer = make(llama, case, fused=True)
    train(model, optimizer, range(3))
    resumed, again = make(llama, case, fused=True)
    resumed.load_state_dict(weights(model))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own would share its tensors
    for one in ((model, optimizer), (resumed, again)):
        train(*one, range(3, 6))
    assert equal(model, resumed)


@pytest.mark.parametrize("tied", [False, True])
def test_one_gradient_is_alive_at_a_time(llama, tied):
    """Bytes of all `p.grad` whenever one arrives: never more than the largest parameter's. Also 28 arrivals,
    one for each parameter, a tied weight once with both its uses."""
    model, optimizer = make(llama, "adamw", fused=True, tied=tied)
    parameters = list(model.parameters())
    arrivals: list[int] = []
    fused = fused_backward_of(optimizer)
    assert fused is not None

    def receive(parameter: Tensor) -> None:
        alive = [p for p in parameters if p.grad is not None]
        assert [p is parameter for p in alive] == [True]
        arrivals.append(sum(p.grad.numel() * p.grad.element_size() for p in alive))
        fused.move(parameter)

    with fused.receiving(receive):
        loss_of(model, 0).backward()
    assert all(parameter.grad is None for parameter in parameters)
    assert len(arrivals) == len(parameters)
    assert max(arrivals) == max(p.numel() * p.element_size() for p in parameters)
    plain = make(llama, "adamw", fused=False, tied=tied)
    train(*plain, range(1))
    assert equal(model, plain[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_move_the_same(llama, reentrant):
    plain, fused = make(llama, "adamw", fused=False), make(llama, "adamw", fused=True)
    fused[0].gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused[0].train()
    fused[0].enable_input_require_grads()
    for model, optimizer in (plain, fused):
        train(model, optimizer, range(2))
    assert equal(plain[0], fused[0])


def test_step_moves_nothing_again_and_runs_the_hooks_of_a_step_once(llama):
    model, optimizer = make(llama, "muon", fused=True)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    loss_of(model, 0).backward()
    moved = weights(model)
    assert not calls
    optimizer.step()
    assert calls == ["post"]
    assert all(torch.equal(moved[name], value) for name, value in model.state_dict().items())


def test_a_hook_of_torch_adamw_belongs_to_the_whole_step(llama):
    model, optimizer = make(llama, "adamw", fused=True)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    loss_of(model, 0).backward()
    assert not calls and len(optimizer.param_groups) == 4
    optimizer.step()
    assert calls == ["post"]


def test_an_error_in_an_update_frees_the_gradient_and_reaches_the_caller(llama):
    model, optimizer = make(llama, "adamw", fused=True)

    def fail(parameter: Tensor) -> None:
        raise RuntimeError("no update")

    with fused_backward_of(optimizer).receiving(fail), pytest.raises(RuntimeError, match="no update"):
        loss_of(model, 0).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lanton", "fused_backward=true does not work with lanton: the rate of a layer depends on"),
        ("torch.optim.SGD", "does not work with torch.optim.SGD: nothing says whether"),
    ],
)
def test_methods_that_need_all_gradients_are_refused_by_name(llama, name, words):
    with pytest.raises(UserError, match=words) as error:
        create_optimizer(name, llama(), lr=1e-2, fused_backward=True)
    assert "apollo_mini" in str(error.value)
    assert "lanton" not in str(error.value).partition("choose one of")[2]


def test_without_the_option_nothing_is_hooked(llama):
    model, optimizer = make(llama, "adamw", fused=False)
    assert fused_backward_of(optimizer) is None
    loss_of(model, 0).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
