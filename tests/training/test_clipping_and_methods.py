"""Ways to clip and matrix methods inside a run: what they change, and that an interrupted run is the same."""

import pytest
import torch

from llmnorm.checkpoint import load_full
from llmnorm.errors import UserError
from llmnorm.modeling import LlmNormForCausalLM, initialize_weights
from llmnorm.optim import create_optimizer
from llmnorm.optim.clipping import ZClip
from llmnorm.training import train
from llmnorm.training.plan import planned_model_config

QUIET = {"evaluation.at_start": False, "schedule.name": "constant", "schedule.warmup_steps": 0}
SHORT_RESETS = {"optimizer.reset_interval": 3, "optimizer.warmup_steps": 1, "optimizer.grace_steps": 1}


def exact(rows):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def steps(run_config, rows, folder, **changes):
    return exact(rows(train(run_config(output_dir=str(folder), **{**QUIET, **changes})).output_dir))


@pytest.mark.parametrize("mode, limit", [("per_parameter", 1e-3), ("agc", 1e-4)])
def test_a_mode_clips_and_the_log_keeps_the_norm_before_it(run_config, rows, tmp_path, mode, limit):
    """Adam hardly minds small gradients, so a method that does, with a step proportional to them."""
    method = {"optimizer.name": "novograd", "optimizer.eps": 1.0, "train.max_steps": 2}
    free = steps(run_config, rows, tmp_path / "free", **{"train.grad_clip": None, **method})
    clipped = {"train.grad_clip_mode": mode, "train.grad_clip": limit}
    clipped = steps(run_config, rows, tmp_path / "clipped", **clipped, **method)
    assert clipped[0] == free[0]
    assert clipped[1] != free[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"train.grad_clip_mode": "zclip", "train.grad_clip": 0.1},
        {"optimizer.name": "muon"},
        {"optimizer.name": "psgd_kron"},
        {"optimizer.name": "muon", "optimizer.qk_clip": 0.01},
        {"optimizer.name": "galore", "optimizer.update_proj_gap": 2, "optimizer.projection_bits": 4},
        {"optimizer.name": "apollo", "optimizer.update_proj_gap": 2},
        {"optimizer.name": "galore", "optimizer.weights": "int8", "train.precision": "bf16_pure"},
        {"optimizer.name": "spam", "optimizer.density": 0.5, **SHORT_RESETS},
        {"optimizer.name": "stable_spam", "optimizer.reset_interval": 3},
        {"model.quantization": {"group_size": 16, "rounding": "stochastic"}},
        {"optimizer.name": "muon", "model.weight_constraint": {"name": "spectral_soft_cap", "max_norm": 0.5}},
        {"model.weight_parametrization": {"name": "sigma_reparam", "method": "power"}},
        {"model.weight_parametrization": [{"name": "weight_norm"}, {"name": "spectral_norm"}]},
        {"model.architecture": "lipschitz", "model.norm": "convex", "optimizer.name": "muon"},
        {"model.weight_constraint": {"name": "normalize_and_project"}},
    ],
    ids=[
        "zclip",
        "muon",
        "psgd_kron",
        "qk_clip",
        "galore",
        "apollo",
        "int8",
        "masked_spam",
        "stable_spam",
        "4bit_rounding",
        "soft_cap",
        "sigma_reparam",
        "composed",
        "lipschitz",
        "normalize_and_project",
    ],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    run_config, rows, tmp_path, monkeypatch, changes
):
    monkeypatch.setattr(ZClip, "warmup", 2)
    whole = steps(run_config, rows, tmp_path / "whole", **{"train.max_steps": 6, **changes})
    steps(run_config, rows, tmp_path / "parts", **{"train.max_steps": 4, **changes})
    assert steps(run_config, rows, tmp_path / "parts", **{"train.max_steps": 6, **changes}) == whole


def test_psgd_kron_draws_from_the_seed_of_the_run(run_config, tmp_path):
    """Same weights, same gradients, other noise in the fit of the preconditioner: other weights."""
    seeds = {}
    for seed, own in ((1, None), (2, None), (2, 1)):
        config = run_config(**{"seed": seed, "optimizer.name": "psgd_kron", "optimizer.seed": own})
        model = LlmNormForCausalLM(planned_model_config(config))
        initialize_weights(model, 0)
        optimizer = create_optimizer("psgd_kron", model, lr=1e-2, **config.optimizer.options(config.seed))
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        seeds[seed, own] = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    assert torch.equal(seeds[1, None], seeds[2, 1])
    assert not torch.equal(seeds[1, None], seeds[2, None])


def test_a_mode_without_a_limit_is_refused(run_config):
    with pytest.raises(UserError, match=r"train\.grad_clip_mode=agc does nothing"):
        run_config(**{"train.grad_clip": None, "train.grad_clip_mode": "agc"})


def test_a_rank_that_no_matrix_has_is_refused_before_anything_is_written(run_config, tmp_path):
    config = run_config(
        output_dir=str(tmp_path / "run"), **{"optimizer.name": "galore", "optimizer.rank": 4096}
    )
    with pytest.raises(UserError, match=r"optimizer.rank=4096 exceeds min\(out, in\)"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.quantization": {"group_size": 16}}, "does not work with model.quantization"),
        ({"model.weight_constraint": {"name": "stiefel"}}, "does not work with model.weight_constraint"),
        ({"train.compile": True}, "does not work with train.compile=true"),
        ({"parallel.strategy": "fsdp2"}, "does not work with parallel.strategy=fsdp2"),
        ({"model.norm": "ngpt"}, "of model.norm=ngpt needs to be exact after each step"),
    ],
)
def test_int8_weights_with_another_owner_are_refused_before_anything_is_written(
    run_config, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message):
        train(run_config(**{"optimizer.name": "galore", "optimizer.weights": "int8", **changes}))
    assert not (tmp_path / "run").exists()


def test_stochastic_rounding_of_4_bits_is_not_compiled(run_config):
    quantization = {"group_size": 16, "rounding": "stochastic"}
    with pytest.raises(UserError, match=r"rounding=stochastic has other constants in each update"):
        run_config(**{"model.quantization": quantization, "train.compile": True})


@pytest.mark.parametrize("source", ["export", "."])
def test_evaluation_in_a_run_with_int8_weights_is_that_of_what_it_leaves(run_config, rows, tmp_path, source):
    options = {"optimizer.name": "galore", "optimizer.weights": "int8", "optimizer.state_bits": 8}
    first = train(run_config(**options, **{"export.at_end": source == "export"}))
    saved = load_full(first.output_dir / "checkpoints" / "step_6")
    codes = [key for key, tensor in saved.items() if tensor.dtype == torch.uint8]
    assert len(codes) == 14 and all(f"{key}.int8_scale" in saved for key in codes)
    start = {"model.init_from": str(first.output_dir / source), "output_dir": str(tmp_path / "second")}
    second = train(run_config(**start, **{"train.max_steps": 1}))
    # The same weights to the last bit; only the batches of the two evaluations may be summed in other order.
    assert rows(second.output_dir, "eval/loss")[0]["eval/loss"] == pytest.approx(
        first.evaluation["eval/loss"], rel=1e-7
    )


def test_an_infeasible_soft_cap_is_refused_before_anything_is_written(run_config, tmp_path):
    constraint = {"name": "spectral_soft_cap", "max_norm": 0.01}
    config = run_config(
        **{"optimizer.name": "muon", "optimizer.lr": 0.1, "model.weight_constraint": constraint}
    )
    with pytest.raises(UserError, match="the largest feasible learning rate here is"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_saves_capped_weights_and_its_soft_cap_sees_the_step(run_config, rows, tmp_path):
    """Without the step's rate a soft cap would cut exactly, as `spectral_cap` does."""
    method = {"optimizer.name": "muon", "optimizer.lr": 0.02, "train.max_steps": 3, "checkpoint.every": 3}
    losses = {}
    for name in ("spectral_cap", "spectral_soft_cap"):
        constraint = {"model.weight_constraint": {"name": name, "max_norm": 0.3}}
        losses[name] = steps(run_config, rows, tmp_path / name, **method, **constraint)
        weights = load_full(tmp_path / name / "checkpoints" / "step_3")
        norms = [
            torch.linalg.matrix_norm(weight.double(), 2) * (weight.shape[1] / weight.shape[0]) ** 0.5
            for key, weight in weights.items()
            if key.endswith("proj.weight")
        ]
        assert len(norms) == 14 and max(norms) <= 0.3 * (1 + 1e-5)
    assert losses["spectral_cap"][0] == losses["spectral_soft_cap"][0]
    assert losses["spectral_cap"][1] != losses["spectral_soft_cap"][1]
