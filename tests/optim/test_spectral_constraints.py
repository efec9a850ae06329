"""`weight_constraint` on a model: every rule with its optimizer, by role, on shards, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormConfig, LlmNormForCausalLM, initialize_weights
from llmnorm.optim import Role, check_feasible, create_optimizer, project_weights, route_parameters
from llmnorm.optim.muon import JORDAN, orth
from llmnorm.optim.spectral_constraints import ROUNDING, largest_output

WORLD = 2
SHARDED = ("spectral_cap", "spectral_soft_cap")
SIZES: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,  # above the caps, so that the start has something to do
}


def build(constraint: Any, **changes: Any) -> LlmNormForCausalLM:
    model = LlmNormForCausalLM(LlmNormConfig(**{**SIZES, **changes}, weight_constraint=constraint))
    initialize_weights(model, 0)
    return model


def norms(model: nn.Module) -> torch.Tensor:
    """sigma_1 over sqrt(m/n) of every hidden matrix, by SVD in fp64."""
    found = []
    for _, parameter, role in route_parameters(model):
        if role is Role.HIDDEN_MATRIX:
            m, n = parameter.shape
            weight = parameter.detach().double()
            found.append(torch.linalg.svdvals(weight)[0] / math.sqrt(m / n))
    return torch.stack(found)


def steps(model: LlmNormForCausalLM, optimizer: torch.optim.Optimizer, count: int) -> Any:
    """Train on noise; yields after every projected step."""
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - number / count) if "initial_lr" in group else group["lr"]
        ids = torch.randint(SIZES["vocab_size"], (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        project_weights(model, optimizer)
        optimizer.zero_grad()
        yield number


CAPPING = [
    ("spectral_cap", "adamw", {"lr": 0.05}),
    ("spectral_cap", "muon", {"lr": 0.2}),
    ("spectral_normalize", "adamw", {"lr": 0.05}),
    ("spectral_soft_cap", "muon", {"lr": 0.1, "lr_mode": "rms_to_rms", "ns_dtype": "fp32"}),
    ("spectral_soft_cap", "muon", {"lr": 0.1, "lr_mode": "rms_to_rms", "weight_decay": 1.0}),
    ("spectral_soft_cap", "muon", {"lr": 0.05, "row_blocks": {"q_proj": 8}}),
]


@pytest.mark.parametrize(("name", "method", "options"), CAPPING)
@pytest.mark.parametrize("max_norm", [1.0, 3.0])
def test_o4_1_no_singular_value_above_the_cap_after_any_step(
    name: str, method: str, options: dict[str, Any], max_norm: float
) -> None:
    model = build({"name": name, "max_norm": max_norm})
    assert norms(model).max() > max_norm or max_norm > 2
    project_weights(model)
    optimizer = create_optimizer(method, model, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # falls from step to step, and alpha with it
    largest = [norms(model).max().item()]
    largest += [norms(model).max().item() for _ in steps(model, optimizer, 8)]
    assert max(largest) <= max_norm * (1 + 1e-5)
    if max_norm == 1.0 and name != "spectral_soft_cap":
        assert largest[-1] > 0.99  # the cap acts


def test_o4_1_in_bf16_the_excess_is_rounding() -> None:
    model = build("spectral_cap").to(torch.bfloat16)
    project_weights(model)
    excess = norms(model).max().item() - 1
    assert excess <= 0.01  # 2^-8 for each entry, which adds up to less in the largest singular value


@pytest.mark.parametrize("coefficients", [JORDAN, "you", "polar_express"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_o4_5_muons_update_is_within_its_bound(coefficients: Any, dtype: str) -> None:
    bound = largest_output(coefficients, 5, ROUNDING[dtype])
    hyper = {
        "ns_coefficients": coefficients,
        "ns_steps": 5,
        "eps": 1e-7,
        "ns_dtype": dtype,
        "ns_method": "standard",
        "ns_preconditioner": "none",
    }
    largest = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        spread = torch.logspace(0, -seed, 24)
        update = orth(torch.randn(32, 24) * spread, hyper).double()
        largest = max(largest, torch.linalg.matrix_norm(update, 2).item())
    assert 0.7 * bound < largest <= bound


def test_the_bound_of_jordans_coefficients_is_the_published_one() -> None:
    assert largest_output(JORDAN, 5, 0.0) == pytest.approx(1.2024, abs=1e-3)
    assert largest_output("you", 5, 0.0) == pytest.approx(1.14502, abs=1e-4)


def test_stiefel_has_equal_singular_values_after_a_step() -> None:
    model = build({"name": "stiefel", "max_norm": 2.0})
    project_weights(model)
    for _ in steps(model, create_optimizer("adamw", model, lr=0.01), 2):
        for _, parameter, role in route_parameters(model):
            if role is Role.HIDDEN_MATRIX:
                m, n = parameter.shape
                values = torch.linalg.svdvals(parameter.detach().double()) / (2 * math.sqrt(m / n))
                torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)


def test_spectral_weight_decay_moves_the_largest_value_by_rate_times_decay() -> None:
    model = build({"name": "spectral_weight_decay", "decay": 0.5})
    project_weights(model)
    optimizer = create_optimizer("adamw", model, lr=0.2)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = torch.linalg.svdvals(weight.detach().double())
    project_weights(model, optimizer)
    after = torch.linalg.svdvals(weight.detach().double())
    expected = torch.cat([before[:1] * 0.9, before[1:]]).sort(descending=True).values
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)  # stored in fp32


def test_o4_10_rows_of_embedding_and_head_in_storage() -> None:
    model = build({"name": "spectral_cap", "embedding_max_rms": 0.4, "head_max_rms": 0.3})
    with torch.no_grad():
        model.model.embed_tokens.weight[3] *= 0.01
    before = model.model.embed_tokens.weight[3].clone()
    project_weights(model)
    for weight, limit in ((model.model.embed_tokens.weight, 0.4), (model.lm_head.weight, 0.3)):
        rms = weight.detach().double().square().mean(-1).sqrt()
        assert limit * (1 - 1e-6) < rms.max() <= limit * (1 + 1e-6)
    assert torch.equal(model.model.embed_tokens.weight[3], before)


def test_nothing_moves_without_the_key() -> None:
    model = build(None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    project_weights(model, create_optimizer("muon", model, lr=10.0))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_largest_feasible_learning_rate_is_told_and_feasible() -> None:
    model = build({"name": "spectral_soft_cap", "max_norm": 1.0})
    options = {"lr_mode": "rms_to_rms", "weight_decay": 0.1}
    with pytest.raises(
        UserError, match=r"infeasible at optimizer\.lr=0\.5 and optimizer\.weight_decay=0\.1"
    ) as told:
        check_feasible(model, create_optimizer("muon", model, lr=0.5, **options))
    largest = float(str(told.value).split()[-1])
    check_feasible(model, create_optimizer("muon", model, lr=largest, **options))
    with pytest.raises(UserError, match="infeasible"):
        check_feasible(model, create_optimizer("muon", model, lr=1.01 * largest, **options))
    bound = largest_output(JORDAN, 5, ROUNDING["bf16"])
    # With M the bound of an update, and decay: lr (M - 0.1) = 19/62.
    assert largest == pytest.approx(19 / 62 / (bound - 0.1), rel=4e-3)  # rounded down


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("adamw", {}, "AdamW's depends on the data"),
        ("muon", {"ns_coefficients": "cans"}, "ns_coefficients=cans gives updates of no useful bound"),
        ("muon", {"cautious_weight_decay": True}, "cautious"),
    ],
)
def test_a_soft_cap_needs_updates_of_known_norm(method: str, options: dict[str, Any], match: str) -> None:
    model = build("spectral_soft_cap")
    with pytest.raises(UserError, match=match):
        check_feasible(model, create_optimizer(method, model, lr=1e-3, weight_decay=0.1, **options))


@pytest.mark.parametrize(
    ("constraint", "changes", "match"),
    [
        ("spectral_cap", {"tie_word_embeddings": True}, "tied weight of tie_word_embeddings=true"),
        ("spectral_cap", {"quantization": {"group_size": 8}}, "quantization.weights=int4"),
        ("spectral_cap", {"norm": "ngpt"}, "norm=ngpt"),
        ("spectral_cap", {"norm_options": {"recentered": True}}, "recentered"),
        ("spectral_lid", {}, "weight_constraint.name='spectral_lid' must be one of"),
        ({"name": "spectral_cap", "max_norm": 0}, {}, "max_norm=0 must be a number above 0"),
        ({"name": "spectral_cap", "method": "fast"}, {}, "method='fast' must be one of"),
        ({"name": "spectral_weight_decay", "max_norm": 2.0}, {}, "max_norm=2.0 does nothing"),
        ({"name": "stiefel", "method": "exact"}, {}, "method='exact' does nothing"),
        ({"max_norm": 1.0}, {}, "must be null or a mapping"),
    ],
)
def test_what_cannot_be_met_is_refused_by_name(constraint: Any, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LlmNormConfig(**{**SIZES, **changes}, weight_constraint=constraint)


def test_none_and_defaults_are_settled() -> None:
    assert LlmNormConfig(**SIZES, weight_constraint={"name": "none"}).weight_constraint is None
    settled = LlmNormConfig(**SIZES, weight_constraint={"name": "spectral_hammer", "max_norm": None})
    rows = {"embedding_max_rms": 1.0, "head_max_rms": 1.0}
    assert settled.weight_constraint == {"name": "spectral_hammer", "max_norm": 1.0, **rows}


def _sharded(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in SHARDED:
        model = build(name)
        for module in list(model.modules()):
            for attribute, parameter in list(module.named_parameters(recurse=False)):
                shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(module, attribute, nn.Parameter(shard))
        project_weights(model, create_optimizer("muon", model, lr=0.1))
        whole = {key: parameter.detach().full_tensor() for key, parameter in model.named_parameters()}
        torch.save(whole, f"{out}.{name}.{rank}")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_shards_of_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(_sharded, args=(str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=WORLD)
    for name in SHARDED:
        alone = build(name)
        before = alone.model.layers[0].mlp.up_proj.weight.detach().clone()
        project_weights(alone, create_optimizer("muon", alone, lr=0.1))
        assert not torch.equal(before, alone.model.layers[0].mlp.up_proj.weight)
        for rank in range(WORLD):
            result = torch.load(tmp_path / f"out.{name}.{rank}", weights_only=True)
            for key, weight in alone.named_parameters():
                assert torch.equal(result[key], weight), (name, key)
