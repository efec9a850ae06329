"""Running statistics in a model: moved once whatever is computed again, over the tokens that count, kept in
fp32, and committed or dropped with the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmnorm.modeling import LlmNormForCausalLM, initialize_weights
from llmnorm.modeling.batch_statistics import (
    batch_norms,
    commit_statistics,
    defer_statistics,
    drop_statistics,
    frozen_statistics,
)

ModelMaker = Callable[..., LlmNormForCausalLM]
# With lambda in the middle, and a Unified Norm behind its warm-up, as `make_model` sets their counters to 7.
ROWS: dict[str, dict[str, Any]] = {
    "powernorm": {"norm": "powernorm"},
    "powernorm-running": {"norm": "powernorm", "norm_options": {"statistics": "running"}},
    "powernorm-after": {"norm": "powernorm", "norm_options": {"statistics_warmup": 0}},
    "unified_norm": {"norm": "unified_norm"},
    "unified_norm-after": {"norm": "unified_norm", "norm_options": {"statistics_warmup": 0, "window": 2}},
    "unified_norm-prefix": {
        "norm": "unified_norm",
        "norm_options": {"statistics": "prefix", "statistics_warmup": 0, "window": 2},
    },
    "prepbn": {"norm": "prepbn", "norm_options": {"interpolation_steps": 14}},
    "prepbn-prefix": {"norm": "prepbn", "norm_options": {"interpolation_steps": 14, "statistics": "prefix"}},
}
every_row = pytest.mark.parametrize("changes", list(ROWS.values()), ids=list(ROWS))


def statistics(model: LlmNormForCausalLM) -> dict[str, Tensor]:
    """A copy of every persistent buffer."""
    kept = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: model.state_dict()[name].clone() for name in sorted(kept)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # Sums in fp64, activations in fp32: another order of rows changes their last bits.
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=1e-7, msg=name)


def gradients(model: LlmNormForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_row
@pytest.mark.parametrize(
    "mode", ["full", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("selective", "transformers"))]
)
def test_o12_a_layer_computed_again_counts_once(
    make_model: ModelMaker, tokens: Tensor, changes: dict[str, Any], mode: str
) -> None:
    """Two updates of the statistics, and all gradients, to the last bit, with and without recomputation."""
    results = []
    for again in (False, True):
        model = make_model(**changes).train()
        if again and mode == "transformers":
            model.gradient_checkpointing_enable()
        elif again:
            model.set_activation_checkpointing(mode)
        for rows in (tokens, tokens.flip(0, 1)):
            model(rows, labels=rows, use_cache=False).loss.backward()
        results.append((statistics(model), gradients(model)))
    assert results[0][0]["model.norm.updates"].item() == 9
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


def test_two_forward_passes_before_their_backward_passes(make_model: ModelMaker, tokens: Tensor) -> None:
    """Each is computed again with its own padding mask and its own statistics."""
    short = torch.ones_like(tokens)
    short[:, 7:] = 0
    results = []
    for mode in ("none", "full"):
        model = make_model(norm="powernorm").train()
        model.set_activation_checkpointing(mode)
        defer_statistics(model)
        whole = model(tokens, labels=tokens, use_cache=False).loss
        masked = model(tokens, attention_mask=short, labels=tokens, use_cache=False).loss
        (whole + masked).backward()
        commit_statistics(model)
        results.append((statistics(model), gradients(model)))
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


@every_row
def test_o20_padding_changes_nothing(make_model: ModelMaker, tokens: Tensor, changes: dict[str, Any]) -> None:
    """Right padding, told by the mask or by the labels: the same loss, gradients and statistics."""
    padded = torch.cat([tokens, torch.full((2, 5), 3)], dim=1)
    labels = torch.cat([tokens, torch.full((2, 5), -100)], dim=1)
    inputs = {
        "alone": {"input_ids": tokens, "labels": tokens},
        "mask": {"input_ids": padded, "labels": labels, "attention_mask": (labels != -100).long()},
        "labels": {"input_ids": padded, "labels": labels},
        "shifted": {"input_ids": padded, "shift_labels": labels},
        "shifted alone": {"input_ids": tokens, "shift_labels": tokens},
    }
    results = {}
    for name, given in inputs.items():
        model = make_model(**changes).double().train()
        loss = model(**given, use_cache=False).loss
        loss.backward()
        results[name] = {**statistics(model), **gradients(model), "loss": loss.detach()}
    for name, expected in (("mask", "alone"), ("labels", "alone"), ("shifted", "shifted alone")):
        for key, value in results[name].items():
            # transformers computes the loss in fp32, so gradients agree to that and not to fp64.
            scale = results[expected][key].abs().max().item() or 1.0
            torch.testing.assert_close(value, results[expected][key], rtol=0, atol=1e-5 * scale)


def test_o20_the_padding_would_show(make_model: ModelMaker, tokens: Tensor) -> None:
    """The same padding counted as text moves the statistics by more than a hundred times that tolerance."""
    padded = torch.cat([tokens, torch.full((2, 5), 3)], dim=1)
    found = []
    for rows in (tokens, padded):
        model = make_model(norm="powernorm").train()
        model(rows, use_cache=False)
        found.append(model.model.norm.mean_square)
    assert (found[0] - found[1]).abs().max() > 1e-3 * found[0].abs().max()


@every_row
def test_statistics_wait_for_the_commit(
    make_model: ModelMaker, tokens: Tensor, changes: dict[str, Any]
) -> None:
    """Deferred: forward and backward passes move nothing, `drop` forgets them, and a commit counts one."""
    model = make_model(**changes).train()
    defer_statistics(model)
    before = statistics(model)
    for _ in range(2):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert_equal(statistics(model), before)
    drop_statistics(model)
    commit_statistics(model)
    assert_equal(statistics(model), before)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    commit_statistics(model)
    once = statistics(model)
    assert all(value.item() == 8 for name, value in once.items() if name.endswith("updates"))
    changed = [name for name in once if not torch.equal(once[name], before[name])]
    assert {name.rpartition(".")[2] for name in changed} >= set(model.model.norm.initial_statistics) - {"x"}

    twin = make_model(**changes).train()  # not deferred: one forward and backward pass are one update
    twin(tokens, labels=tokens, use_cache=False).loss.backward()
    assert_equal(statistics(twin), once)


@pytest.mark.parametrize("name", ["powernorm-running", "powernorm-after", "prepbn-prefix"])
def test_accumulation_changes_nothing_where_the_batch_is_not_read(
    make_model: ModelMaker, tokens: Tensor, name: str
) -> None:
    """One batch of two rows or two of one: the same loss, gradients and statistics."""
    results = []
    for parts in ([tokens], list(tokens.split(1))):
        model = make_model(**ROWS[name]).train()
        defer_statistics(model)
        for rows in parts:
            count = tokens.numel()
            model(rows, shift_labels=rows, num_items_in_batch=count, use_cache=False).loss.backward()
        commit_statistics(model)
        results.append({**statistics(model), **gradients(model)})
    for key, value in results[0].items():
        scale = value.abs().max().item() or 1.0
        torch.testing.assert_close(results[1][key], value, rtol=0, atol=1e-5 * scale)


def test_running_statistics_pool_micro_batches_of_unequal_size(
    make_model: ModelMaker, tokens: Tensor
) -> None:
    """The first norm's input is the embedding, so its moments are known: over all tokens of the step that
    count, not the mean of the micro-batches' means.
    """
    model = make_model(norm="prepbn", norm_options={"interpolation_steps": 14}).train()
    defer_statistics(model)
    norm = model.model.layers[0].input_layernorm
    mean, variance = norm.running_mean.clone(), norm.running_variance.clone()
    labels = tokens[1:].clone()
    labels[:, 3:] = -100
    for rows, targets in ((tokens[:1], tokens[:1]), (tokens[1:], labels)):
        model(rows, shift_labels=targets, use_cache=False).loss.backward()
    commit_statistics(model)
    counted = model.model.embed_tokens(torch.cat([tokens[0], tokens[1, :3]])).detach()
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * counted.mean(0))
    torch.testing.assert_close(norm.running_variance, 0.9 * variance + 0.1 * counted.var(0))


def test_a_step_without_tokens_moves_nothing_but_the_counter(
    make_model: ModelMaker, tokens: Tensor, changes: dict[str, Any] | None = None
) -> None:
    for row in ROWS.values():
        model = make_model(**row).train()
        before = statistics(model)
        nothing = torch.full_like(tokens, -100)
        model(tokens, shift_labels=nothing, num_items_in_batch=1, use_cache=False).loss.backward()
        after = statistics(model)
        for name, value in after.items():
            assert torch.isfinite(value).all()
            if not name.endswith(("updates", "mean_squares", "projections")):
                assert torch.equal(value, before[name]), name


@every_row
def test_o15_bf16_models_keep_fp32_statistics(
    make_model: ModelMaker, tokens: Tensor, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = make_model(**changes)
    before = statistics(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one in (model, loaded):
        assert one.model.norm.weight.dtype == torch.bfloat16
        assert_equal(statistics(one), before)
        assert all(value.dtype in (torch.float32, torch.int64) for value in statistics(one).values())
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_o15_a_counter_that_was_loaded_is_the_counter(make_model: ModelMaker, tokens: Tensor) -> None:
    """By state dict, in place, or by moving the model: `step` follows, and a new model counts from 0."""
    trained = make_model(norm="prepbn", norm_options={"interpolation_steps": 14})
    fresh = make_model(plain=True, norm="prepbn", norm_options={"interpolation_steps": 14})
    assert [norm.step for norm in batch_norms(fresh)] == [0] * 7
    fresh.load_state_dict(trained.state_dict())
    assert [norm.step for norm in batch_norms(fresh)] == [7] * 7
    assert torch.equal(fresh(tokens).logits, trained(tokens).logits)
    fresh.model.norm.updates.copy_(torch.tensor([14]))
    assert fresh.model.norm.step == 14
    assert fresh.double().model.norm.token_share == 0.0
    initialize_weights(fresh, seed=0)
    assert fresh.model.norm.token_share == 1.0


def test_a_copy_of_a_model_counts_for_itself(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(norm="powernorm").train()
    other = copy.deepcopy(model)
    before = statistics(model)
    padded = torch.ones_like(tokens)
    padded[:, 6:] = 0
    other(tokens, attention_mask=padded, use_cache=False)
    assert_equal(statistics(model), before)
    assert other.model.norm.step == 8
    assert model.model.norm.tokens is None
    assert other.model.layers[0].input_layernorm.tokens.mask.sum() == 12


def test_frozen_statistics(make_model: ModelMaker, tokens: Tensor) -> None:
    model = make_model(norm="unified_norm").train()
    before = statistics(model)
    with frozen_statistics(model):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert_equal(statistics(model), before)
    model(tokens, use_cache=False)
    assert model.model.norm.step == 8


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("powernorm", {"statistics": "causal"}, "statistics='causal' must be batch, prefix or running"),
        ("powernorm", {"statistics_decay": 1.0}, r"statistics_decay=1\.0 must be a number in \[0, 1\)"),
        ("powernorm", {"window": 4}, "norm_options.window is not an option of norm=powernorm"),
        ("unified_norm", {"window": 0}, "window=0 must be an integer of at least 1"),
        (
            "unified_norm",
            {"outlier_filter": True, "statistics": "prefix"},
            "outlier_filter=true does nothing with norm_options.statistics=prefix",
        ),
        (
            "prepbn",
            {"synchronize": False, "statistics": "running"},
            "synchronize=false does nothing with norm_options.statistics=running",
        ),
        ("prepbn", {"interpolation_steps": 0}, "interpolation_steps=0 must be an integer of at least 1"),
    ],
)
def test_mistakes(make_config: Callable, norm: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(norm=norm, norm_options=options)


def test_rows_of_several_kinds(make_model: ModelMaker, tokens: Tensor) -> None:
    """A list may mix them with any other norm; each layer has its own statistics."""
    model = make_model(norm=["pre_rmsnorm", "powernorm", "prepbn"]).train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    kinds = [type(norm).__name__ for norm in batch_norms(model)]
    assert kinds == ["PowerNorm", "PowerNorm", "PRepBN", "PRepBN", "PRepBN"]
