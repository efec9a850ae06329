"""Loss-based reweighting: the paper's equations in plain Python, the gradient, and what must not change."""

from __future__ import annotations

import math

import pytest
import torch
from parallel_cases import Case, build, micro_batches

from llmnorm.config import LossReweightingSection
from llmnorm.errors import UserError
from llmnorm.optim import create_optimizer
from llmnorm.training import train
from llmnorm.training.processes import Processes
from llmnorm.training.reweighting import STRATEGIES, sample_weights
from llmnorm.training.update import Update

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
LOSSES = [3.0, 5.5, 4.25, 9.0, 4.2, 3.1]


def by_hand(losses, strategy, r):
    """w of equation (paper, section 3), one sample at a time."""
    low, high = min(losses), max(losses)
    f = []
    for loss in losses:
        h = (2 * loss - (high + low)) / max(high - low, 1e-6)
        f.append({"linear": min(h + 1, 1), "quadratic": 1 - h * h, "extremes": abs(h)}[strategy])
    total = sum(math.exp(value / r) for value in f)
    return [math.exp(value / r) / total for value in f]


def weights(losses, strategy, r, counts=None):
    counts = torch.tensor(counts or [1] * len(losses))
    losses = torch.tensor(losses, dtype=torch.float64)
    return sample_weights(losses * counts, counts, strategy, r)


@pytest.mark.parametrize("r", [0.4, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_o1_weights_equal_the_equations_by_hand(strategy, r):
    expected = by_hand(LOSSES, strategy, r)
    multipliers, entropy = weights(LOSSES, strategy, r, [7, 3, 9, 1, 5, 5])
    assert (multipliers / 6).tolist() == pytest.approx(expected, rel=1e-12)
    assert multipliers.sum().item() == pytest.approx(6, rel=1e-12)
    assert entropy.item() == pytest.approx(-sum(w * math.log(w) for w in expected) / math.log(6), rel=1e-12)
    assert (multipliers.max() / multipliers.min()).item() <= math.exp(1 / r) * (1 + 1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_o2_weights_do_not_depend_on_shift_or_scale_of_the_losses(strategy):
    moved = [4 * loss + 16 for loss in LOSSES]  # exact in binary, so only 1e-15 of rounding remains
    assert torch.allclose(
        weights(LOSSES, strategy, 0.4).multipliers, weights(moved, strategy, 0.4).multipliers, rtol=1e-13
    )


def test_o3_linear_caps_the_upper_half_and_drops_the_easy_ones():
    multipliers = weights([1.0, 2.0, 3.0, 4.0, 5.0], "linear", 0.4).multipliers
    assert multipliers[2] == multipliers[3] == multipliers[4]  # at the middle and above
    assert (multipliers[4] / multipliers[0]).item() == pytest.approx(math.exp(1 / 0.4), rel=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("number", [1, 3, 7])
def test_equal_losses_give_multipliers_of_exactly_one(strategy, number):
    multipliers, entropy = weights([2.5] * number, strategy, 0.4)
    assert multipliers.tolist() == [1.0] * number
    assert entropy.item() == pytest.approx(1.0, abs=1e-15)


def test_a_sample_without_targets_counts_nowhere():
    without = weights([3.0, 5.0, 4.5], "quadratic", 1.0)
    first, *others = without.multipliers.tolist()
    multipliers, entropy = weights([3.0, 0.0, 5.0, 4.5], "quadratic", 1.0, [2, 0, 3, 4])
    assert multipliers.tolist() == pytest.approx([first, 0.0, *others], rel=1e-12)
    assert entropy.item() == pytest.approx(without.entropy.item(), rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_o4_the_gradient_is_that_of_the_weighted_loss_however_the_batch_is_split(size):
    """Rows have 12, 1, 7 and 3 targets; autograd on the definition, over the whole batch at once."""
    options = LossReweightingSection(strategy="extremes", temperature=0.4, warmup_steps=0)
    model = build(Case(), ALONE)
    (whole,) = micro_batches(0, 4, 0, 1)
    logits = model.module(input_ids=whole["input_ids"]).logits
    token_losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), whole["labels"], reduction="none"
    )
    valid = (whole["labels"] != -100).sum(1)
    w = by_hand((token_losses.sum(1) / valid).tolist(), "extremes", 0.4)
    loss = (4 * torch.tensor(w) * token_losses.sum(1)).sum() / 23
    expected = torch.autograd.grad(loss, list(model.module.parameters()))
    update = Update(model, create_optimizer("adamw", model.module, lr=1e-2), None)
    measured = update.measure(micro_batches(0, size, 0, 1), reweighting=options)
    # fp32 sums in another order: 2e-6 of the largest element, as in test_parallel.
    for parameter, gradient in zip(model.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=4e-5 * gradient.abs().max().item())
    assert measured.loss == pytest.approx((token_losses.sum() / 23).item(), rel=2e-6)
    assert measured.weight_entropy == pytest.approx(-sum(x * math.log(x) for x in w) / math.log(4), rel=1e-5)
    assert measured.weight_entropy < 0.999


def test_weights_that_are_all_equal_give_the_same_gradient_to_the_last_bit():
    """A batch of copies: every loss is the same, and so is each bit of each gradient."""
    model = build(Case(), ALONE)
    batches = [micro_batches(0, 1, 0, 1)[0]] * 3
    update = Update(model, create_optimizer("adamw", model.module, lr=1e-2), None)
    update.measure(batches)
    plain = [parameter.grad.clone() for parameter in model.module.parameters()]
    update.drop()
    measured = update.measure(batches, reweighting=LossReweightingSection(warmup_steps=0))
    assert measured.weight_entropy == pytest.approx(1.0, abs=1e-15)
    for parameter, gradient in zip(model.module.parameters(), plain, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_the_warm_up_is_the_plain_run_to_the_last_bit_and_then_it_differs(run_config, rows, tmp_path):
    plain = train(run_config(**{"output_dir": str(tmp_path / "plain"), "train.micro_batch_size": 2}))
    change = {"train.loss_reweighting": {"warmup_steps": 3}, "train.micro_batch_size": 2}
    weighted = train(run_config(**change))
    exact = ("step", "tokens", "loss", "grad_norm")
    ours, theirs = (
        [tuple(row[key] for key in exact) for row in rows(result.output_dir)] for result in (weighted, plain)
    )
    assert ours[:3] == theirs[:3]
    # The same weights before update 4: its unweighted loss agrees to rounding, and its gradient does not.
    assert ours[3][2] == pytest.approx(theirs[3][2], rel=2e-6)
    assert abs(ours[3][3] / theirs[3][3] - 1) > 1e-3
    entropies = [row.get("weight_entropy") for row in rows(weighted.output_dir)]
    assert entropies[:3] == [None] * 3
    assert all(0.5 < value < 1 for value in entropies[3:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train.loss_reweighting": {"warmup_steps": 6}},
            "leaves no update of train.max_steps=6 to reweight",
        ),
        ({"train.loss_reweighting": {"warmup_steps": 0}, "train.global_batch_size": 1}, "does nothing with"),
        ({"train.loss_reweighting": {"strategy": "liner"}}, "did you mean linear"),
        ({"train.loss_reweighting": {"temperature": 0.0}}, "must be a number > 0"),
        ({"train.loss_reweighting": {"temprature": 1.0}}, "did you mean train.loss_reweighting.temperature"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(run_config, change, message):
    with pytest.raises(UserError, match=message):
        run_config(**change)
