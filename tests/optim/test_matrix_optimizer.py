"""What every matrix method owes its user, whatever it computes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from matrix_cases import HIDDEN, SHAPES, gradients, groups, make_parameters, run

import llmnorm.optim
from llmnorm.checkpoint import CheckpointStore, model_tensors, optimizer_tensors, restore_optimizer
from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer, group_by_role, route_parameters, routing_table
from llmnorm.optim.matrix_optimizer import MatrixOptimizer
from llmnorm.optim.muon import Muon
from llmnorm.optim.registry import MATRIX_METHODS

METHODS = sorted(MATRIX_METHODS)


def build(name: str, parameters: dict[str, torch.Tensor], **options) -> MatrixOptimizer:
    return MATRIX_METHODS[name](groups(parameters), **{"lr": 1e-2, **options})


def values(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_never_written_and_state_never_aliases_them(name, dtype):
    parameters = make_parameters(dtype=dtype)
    optimizer = build(name, parameters)
    for grads in gradients(3):
        for key, parameter in parameters.items():
            parameter.grad = grads[key].to(dtype)
        optimizer.step()
        for key, parameter in parameters.items():
            assert torch.equal(parameter.grad, grads[key].to(dtype)), key
            storages = {value.untyped_storage().data_ptr() for value in optimizer.state[parameter].values()}
            assert parameter.grad.untyped_storage().data_ptr() not in storages
            assert parameter.untyped_storage().data_ptr() not in storages
            assert parameter.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradient_on_a_fresh_optimizer_moves_nothing(name, dtype):
    parameters = make_parameters(dtype=dtype)
    before = values(parameters)
    optimizer = build(name, parameters, weight_decay=0.0)
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for key, parameter in parameters.items():
        assert torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_parameters_without_gradient_rest(name):
    parameters = make_parameters()
    before = values(parameters)
    optimizer = build(name, parameters, weight_decay=0.1)
    parameters[HIDDEN[0]].grad = torch.ones_like(parameters[HIDDEN[0]])
    optimizer.step()
    for key, parameter in parameters.items():
        assert torch.equal(parameter, before[key]) is (key != HIDDEN[0])
        assert parameter not in optimizer.state or key == HIDDEN[0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "dtype, state_dtype", [("float32", "param"), ("bfloat16", "param"), ("bfloat16", "fp32")]
)
def test_resumed_equals_never_stopped_and_loads_without_pickle(name, dtype, state_dtype):
    parameters = make_parameters(dtype=getattr(torch, dtype))
    optimizer = build(name, parameters, state_dtype=state_dtype)
    run(optimizer, parameters, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = {key: value.detach().clone().requires_grad_() for key, value in parameters.items()}
    again = build(name, resumed, state_dtype=state_dtype)
    again.load_state_dict(saved)
    for key in parameters:
        kept, loaded = optimizer.state.get(parameters[key], {}), again.state.get(resumed[key], {})
        assert {k: v.dtype for k, v in kept.items()} == {k: v.dtype for k, v in loaded.items()}
    run(optimizer, parameters, 3, seed=2)
    run(again, resumed, 3, seed=2)
    for key in parameters:
        assert torch.equal(parameters[key], resumed[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_a_run_s_checkpoint_holds_all_of_the_state(name, llama, tmp_path):
    model = llama().bfloat16()
    optimizer = create_optimizer(name, model, lr=1e-2, state_dtype="fp32")
    step_on_noise(model, optimizer, seed=0)
    store = CheckpointStore(tmp_path, asynchronous=False)
    tensors, state = optimizer_tensors(model, optimizer)
    store.save(1, {**model_tensors(model), **tensors}, {"optimizer": state}, {})
    path = store.newest()

    resumed = llama().bfloat16()
    resumed.load_state_dict(model.state_dict())
    again = create_optimizer(name, resumed, lr=1e-2, state_dtype="fp32")
    restore_optimizer(resumed, again, path)
    for pair in ((model, optimizer), (resumed, again)):
        step_on_noise(*pair, seed=1)
    for mine, its in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, its)


def step_on_noise(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("state_dtype", ["param", "fp32"])
def test_state_bytes_are_known_before_the_first_step(name, state_dtype):
    parameters = make_parameters(dtype=torch.bfloat16)
    optimizer = build(name, parameters, state_dtype=state_dtype)
    planned = {
        parameter: optimizer.state_bytes(group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    run(optimizer, parameters, 1)
    for key, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        kept = sum(value.numel() * value.element_size() for value in state.values())
        assert planned[parameter] == kept, key


@pytest.mark.parametrize("name", METHODS)
def test_stacked_equal_shapes_move_as_they_do_one_by_one(name, monkeypatch):
    alone, stacked = make_parameters(), make_parameters()
    run(build(name, alone), alone, 3)
    monkeypatch.setattr(MatrixOptimizer, "stack_devices", frozenset({"cpu"}))
    optimizer = build(name, stacked)
    run(optimizer, stacked, 3)
    for key in alone:
        # One batched product may round in another order than one product per matrix.
        torch.testing.assert_close(stacked[key], alone[key], rtol=0, atol=1e-4, msg=key)
    for state in optimizer.state.values():
        for value in state.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.parametrize("name", METHODS)
def test_decay_shrinks_matrices_by_the_bare_learning_rate_and_spares_vectors(name):
    parameters = make_parameters()
    before = values(parameters)
    optimizer = build(name, parameters, lr=0.1, weight_decay=0.5)
    if any(optimizer.rule(group).decays for group in optimizer.param_groups):
        pytest.skip("the method has its own weight decay, tested with it")
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for key, parameter in parameters.items():
        shrunk = 1.0 if SHAPES[key][0] == "vector" else (1 - 0.1 * 0.5) ** 3
        torch.testing.assert_close(parameter.detach(), before[key] * shrunk, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_regression_is_learned(name):
    """y = W* x with unit inputs: the method removes most of the error within 150 steps."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 16, generator=generator) * 0.3
    weight = (torch.randn(8, 16, generator=generator) * 0.3).requires_grad_()
    optimizer = MATRIX_METHODS[name]([("weight", weight)], **LEARNING.get(name, {"lr": 0.02}))
    peak = optimizer.param_groups[0]["lr"]
    start = ((weight.detach() - target) ** 2).mean()
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = peak * (1 - step / 150)
        x = torch.randn(64, 16, generator=generator)
        loss = ((x @ (weight - target).T) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((weight.detach() - target) ** 2).mean() < 0.05 * start


# Learning rates by the size of each method's update; 0.02 suits an update of RMS 0.2 to 1.
# The low-rank methods learn all directions where the rank leaves none out.
LEARNING: dict[str, dict[str, float]] = {
    "conda": {"lr": 0.2},
    "dct_adamw": {"lr": 0.02, "rank": 8},
    "fira": {"lr": 0.02, "rank": 8},
    "galore": {"lr": 0.1, "rank": 8},
    "gradnorm_lorp": {"lr": 0.1, "rank": 8},
    "lamb": {"lr": 0.1},
    "lanton": {"lr": 0.1},
    "muon": {"lr": 0.1},
    "normuon": {"lr": 0.1},
    "novograd": {"lr": 0.4},
    "sinkgd": {"lr": 0.4},
    "swan": {"lr": 0.4},
}


@pytest.mark.parametrize("name", METHODS)
def test_create_optimizer_routes_a_model_and_its_table_is_true(name, llama):
    model = llama()
    options = {"adamw_lr": 2e-3} if "adamw_lr" in create_optimizer.options(name) else {}
    optimizer = create_optimizer(name, model, lr=1e-3, weight_decay=0.1, **options)
    routes = {route.role: route for route in routing_table(optimizer)}
    assert {role: route.parameters for role, route in routes.items()} == {
        "hidden_matrix": 14,
        "embedding": 1,
        "lm_head": 1,
        "vector": 13,
    }
    assert routes["hidden_matrix"].method == name
    for group in optimizer.param_groups:
        expected = options.get("adamw_lr", 1e-3) if group["method"] == "adamw" else 1e-3
        assert group["initial_lr"] == group["lr"] == expected
        assert group["weight_decay"] == (0.0 if group["role"] == "vector" else 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
    assert sum(route.state_bytes for route in routes.values()) == kept


def test_adamw_on_the_other_roles_is_torch_adamw():
    ours, theirs = make_parameters(), make_parameters()
    others = [name for name in SHAPES if name not in HIDDEN]
    optimizer = Muon(groups(ours), lr=0.02, weight_decay=0.1, adamw_lr=3e-3, adamw_betas=(0.8, 0.95))
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[name] for name in others if SHAPES[name][0] != "vector"], "weight_decay": 0.1},
            {"params": [theirs[name] for name in others if SHAPES[name][0] == "vector"], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.8, 0.95),
        foreach=False,
    )
    run(optimizer, ours, 5)
    run(reference, theirs, 5)
    for name in others:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_cautious_decay_touches_only_weights_that_the_update_shrinks():
    plain, cautious = make_parameters(), make_parameters()
    before = values(plain)
    grads = next(gradients(1))
    for parameters, flag in ((plain, False), (cautious, True)):
        optimizer = build("muon", parameters, lr=0.1, weight_decay=0.5, cautious_weight_decay=flag)
        for key, parameter in parameters.items():
            parameter.grad = grads[key]
        optimizer.step()
    for key in HIDDEN:
        update = before[key] * (1 - 0.1 * 0.5) - plain[key].detach()
        decay = 0.1 * 0.5 * before[key] * (update * before[key] > 0)
        torch.testing.assert_close(cautious[key].detach(), before[key] - decay - update, rtol=1e-5, atol=1e-7)


def test_shared_options_exist_only_where_they_do_something():
    takers = {
        option: sorted(name for name in METHODS if option in create_optimizer.options(name))
        for option in ("adamw_lr", "adamw_betas", "cautious_weight_decay", "state_dtype")
    }
    low_rank = ["apollo", "apollo_mini", "dct_adamw", "fira", "galore", "gradnorm_lorp"]
    with_adamw = sorted([*low_rank, "conda", "lawn", "muon", "normuon", "scale", "sinkgd", "swan"])
    assert takers["adamw_lr"] == takers["adamw_betas"] == with_adamw
    plain_decay = ["adamw8bit", "dct_adamw", "lanton", "muon", "normuon", "psgd_kron", "scale", "sinkgd"]
    plain_decay += ["stable_spam", "swan"]
    assert takers["cautious_weight_decay"] == plain_decay
    assert takers["state_dtype"] == METHODS
    with pytest.raises(UserError, match="cautious_weight_decay"):
        build("lamb", make_parameters(), cautious_weight_decay=True)


def test_groups_without_a_role_are_split_by_shape():
    matrix, row, gain = (torch.zeros(shape, requires_grad=True) for shape in ((4, 6), (1, 6), (4,)))
    optimizer = Muon([matrix, row, gain], lr=1.0)
    roles = {group["role"]: group["params"] for group in optimizer.param_groups}
    assert [p is q for p, q in zip(roles["hidden_matrix"], [matrix], strict=True)] == [True]
    assert [p is q for p, q in zip(roles["vector"], [row, gain], strict=True)] == [True, True]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"lr": -1.0}, "optimizer.lr=-1.0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"adamw_betas": (0.9, 1.0)}, "optimizer.adamw_betas"),
        ({"lr_mode": "adam"}, "rms_to_rms"),
        ({"row_blocks": {"q_proj": 5}}, "12 rows of layers.0.q_proj.weight"),
        ({"ns_coefficients": "aol"}, "optimizer.ns_coefficients='aol'"),
    ],
)
def test_mistakes_name_the_key(options, word):
    with pytest.raises(UserError, match=word):
        build("muon", make_parameters(), **options)


@pytest.mark.parametrize("shape", [(4,), (4, 3, 2, 2)])
def test_what_is_not_a_matrix_is_refused_among_the_hidden_matrices(shape):
    with pytest.raises(UserError, match="role=vector"):
        Muon([{"params": [torch.zeros(shape, requires_grad=True)], "role": "hidden_matrix"}])


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = Muon([{"params": [("embed", embedding.weight)], "role": "embedding"}])
    with pytest.raises(UserError, match="embed has a sparse"):
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_goes_on_like_the_original(name):
    parameters = make_parameters()
    optimizer = build(name, parameters)
    run(optimizer, parameters, 2)
    copied, twin = copy.deepcopy((parameters, optimizer))
    run(optimizer, parameters, 2, seed=2)
    run(twin, copied, 2, seed=2)
    assert all(torch.equal(parameters[key], copied[key]) for key in parameters)


@pytest.mark.parametrize("name", METHODS)
def test_by_itself_it_does_what_create_optimizer_does(name, llama):
    ours, theirs = llama(), llama()
    theirs.load_state_dict(ours.state_dict())
    alone = MATRIX_METHODS[name](group_by_role(route_parameters(ours)), lr=1e-2)
    assert getattr(llmnorm.optim, type(alone).__name__) is type(alone)
    created = create_optimizer(name, theirs, lr=1e-2)
    for seed in range(2):
        step_on_noise(ours, alone, seed)
        step_on_noise(theirs, created, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_tied_embedding_is_treated_as_the_head(llama):
    model = llama(tied=True)
    optimizer = create_optimizer("scale", model, lr=1e-3)
    step_on_noise(model, optimizer, seed=0)
    assert list(optimizer.state[model.model.embed_tokens.weight]) == ["momentum_buffer"]
    assert {route.role for route in routing_table(optimizer)} == {"hidden_matrix", "lm_head", "vector"}


def test_the_closure_sees_gradients_and_its_loss_comes_back():
    for name in ("muon", "lanton"):
        weight = torch.ones(4, 3, requires_grad=True)
        optimizer = MATRIX_METHODS[name]([("w", weight)], lr=0.1)

        def closure(weight=weight, optimizer=optimizer):
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 12.0
        assert weight.square().sum().item() < 12.0
