"""`create_optimizer`: AdamW is torch's, step for step; groups, errors and the routing table."""

import copy

import pytest
import torch
import torch.nn as nn

from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer, format_routing_table, routing_table

OPTIONS = [
    {},
    {"betas": (0.8, 0.95), "eps": 1e-6},
    {"weight_decay": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "betas", "decay"])
def test_adamw_equals_torch_step_for_step(llama, options):
    """Against torch's plain loop; the fused kernel orders products otherwise: a few units of rounding."""
    ours, theirs = llama(), llama()
    theirs.load_state_dict(ours.state_dict())
    optimizer = create_optimizer("adamw", ours, lr=3e-3, **options)
    decay = options.get("weight_decay", 0.0)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    plain = {key: value for key, value in options.items() if key != "weight_decay"}
    reference = torch.optim.AdamW(groups, lr=3e-3, foreach=False, fused=False, **plain)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        before = [parameter.grad.clone() for parameter in ours.parameters()]
        optimizer.step()
        reference.step()
        for grad, parameter in zip(before, ours.parameters(), strict=True):
            assert torch.equal(grad, parameter.grad), "step() wrote p.grad"
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)


def test_adamw_equals_torch_fused_to_the_last_bit(llama):
    ours, theirs = llama(), llama()
    theirs.load_state_dict(ours.state_dict())
    optimizer = create_optimizer("adamw", ours, lr=3e-3)
    reference = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_zero_gradient_leaves_every_weight_as_it_was(llama):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    optimizer = create_optimizer("adamw", model, lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_one_optimizer_holds_every_parameter_in_exactly_one_named_group(llama, tied):
    model = llama(tied)
    optimizer = create_optimizer("adamw", model, lr=1e-3, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    by_name = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert [by_name[name] is p for name, p in zip(group["param_names"], group["params"], strict=True)]
        assert group["initial_lr"] == group["lr"] == 1e-3
        assert group["weight_decay"] == (0.0 if group["role"] == "vector" else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_has_the_dtype_of_the_weights_and_keeps_it_through_load_state_dict(llama, dtype):
    model = llama().to(dtype)
    optimizer = create_optimizer("adamw", model, lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    again = create_optimizer("adamw", model, lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        for state in (optimizer.state[parameter], again.state[parameter]):
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
            assert state["step"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_table_counts_what_the_optimizer_really_keeps(llama, dtype):
    model = llama().to(dtype)
    optimizer = create_optimizer("adamw", model, lr=1e-3)
    routes = routing_table(optimizer)
    assert {route.role: route.parameters for route in routes} == {
        "hidden_matrix": 14,
        "embedding": 1,
        "lm_head": 1,
        "vector": 13,
    }
    assert sum(route.elements for route in routes) == sum(p.numel() for p in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
    )
    assert sum(route.state_bytes for route in routes) == kept
    assert [line.split()[0] for line in format_routing_table(routes).splitlines()] == [
        "role",
        "hidden_matrix",
        "embedding",
        "lm_head",
        "vector",
        "total",
    ]


@pytest.mark.parametrize(
    ("name", "lr", "options", "words"),
    [
        ("adamv", 1e-3, {}, ["adamv", "choose one of", "adamw"]),
        ("adamw", 0.0, {}, ["optimizer.lr=0.0", "greater than 0"]),
        ("adamw", -1.0, {}, ["optimizer.lr=-1.0"]),
        ("adamw", 1e-3, {"beta": (0.9, 0.99)}, ["optimizer.beta=", "betas, eps", "did you mean"]),
        ("adamw", 1e-3, {"rank": 4}, ["optimizer.rank=4", "betas, eps, weight_decay"]),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_remedy(name, lr, options, words):
    with pytest.raises(UserError) as error:
        create_optimizer(name, nn.Linear(2, 2), lr, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(UserError, match="requires_grad"):
        create_optimizer("adamw", nn.Linear(2, 2).requires_grad_(False), lr=1e-3)


def test_names_lists_every_method():
    assert "adamw" in create_optimizer.names()
    assert create_optimizer.names() == sorted(create_optimizer.names())


@pytest.mark.parametrize("name", ["adamw", "muon", "torch.optim.Adagrad"])
def test_a_role_has_its_multiple_of_the_rate_under_any_method(llama, name):
    plain = create_optimizer(name, llama(), lr=1e-2)
    scaled = create_optimizer(name, llama(), lr=1e-2, lr_multipliers={"embedding": 4.0, "vector": 0.5})
    factors = {"embedding": 4.0, "vector": 0.5, "lm_head": 1.0, "hidden_matrix": 1.0}
    for before, after in zip(plain.param_groups, scaled.param_groups, strict=True):
        assert after["lr"] == after["initial_lr"] == before["lr"] * factors[before["role"]]
    assert {group["role"] for group in scaled.param_groups} == set(factors)


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        (
            {"norms": 2.0},
            "names the role 'norms', which no parameter of this model has; its roles are embedding",
        ),
        ({"embedding": 0.0}, "lr_multipliers.embedding=0.0 must be greater than 0"),
    ],
)
def test_multipliers_that_cannot_be_met(llama, multipliers, message):
    with pytest.raises(UserError, match=message):
        create_optimizer("adamw", llama(), lr=1e-2, lr_multipliers=multipliers)
