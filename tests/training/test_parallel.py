"""One process, two processes, accumulation, DDP and FSDP2 compute one and the same update."""

import math
import socket

import pytest
import torch
import torch.multiprocessing as mp
from parallel_cases import CAP, CASES, GRAD_CLIP, POISONED, ROW_WISE, SPECTRAL, Case, compute, work

from llmnorm.training.parallel import gradient_norm
from llmnorm.training.processes import Processes

pytestmark = pytest.mark.distributed

ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Results of every case on two gloo processes; one group computes them all."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(2, port, str(folder)), nprocs=2)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name in (*CASES, *POISONED)
    }


@pytest.fixture(scope="module")
def reference():
    """One process, one forward pass over all rows, in fp32."""
    return compute(Case(), ALONE)


def assert_same(result, expected, rtol, weights_atol):
    for (loss, norm, tokens), (its_loss, its_norm, its_tokens) in zip(
        result["measured"], expected["measured"], strict=True
    ):
        assert tokens == its_tokens == 23
        assert loss == pytest.approx(its_loss, rel=rtol)
        assert norm == pytest.approx(its_norm, rel=10 * rtol)
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(result["gradients"][name], gradient, rtol=0, atol=20 * rtol * scale)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=weights_atol)


# fp32 sums in another order differ by a few 1e-7 of their size; Adam's first updates are lr * sign(g), so
# where a gradient is all rounding a weight may differ by a visible part of lr = 1e-2.
FP32 = {"rtol": 2e-6, "weights_atol": 1e-4}


def test_accumulation_changes_nothing(reference):
    assert_same(compute(Case(micro_batch_size=1), ALONE), reference, **FP32)


def test_gradient_is_that_of_the_mean_over_all_valid_tokens(reference):
    """Against plain autograd on the plain definition, so that all backends cannot be wrong together."""
    from parallel_cases import build, rows_of_step

    module = build(Case(), ALONE).module
    inputs, labels = rows_of_step(0)
    logits = module(input_ids=inputs).logits
    valid = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[valid], labels[valid])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), GRAD_CLIP)
    assert reference["measured"][0][0] == pytest.approx(loss.item(), rel=1e-6)
    assert reference["measured"][0][1] == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["accumulating", "whole", "full"])
def test_two_processes_equal_one(pair, reference, strategy, name):
    for result in pair[f"{strategy}-{name}"]:
        assert_same(result, reference, **FP32)


@pytest.mark.parametrize("name", ["ddp-reweighted", "fsdp2-reweighted", "ddp-reweighted_whole"])
def test_two_processes_weigh_the_samples_of_the_whole_batch_as_one_does(pair, reference, name):
    expected = compute(Case(strategy_of_weights="extremes"), ALONE)
    for result in pair[name]:
        assert_same(result, expected, **FP32)
        assert result["noise"][1::2] == pytest.approx(expected["noise"][1::2], rel=1e-5)
    assert expected["measured"][0][1] != pytest.approx(reference["measured"][0][1], rel=1e-3)


@pytest.mark.parametrize("name", POISONED)
def test_o31_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(pair, name):
    """Weights, moments, bases and the limiter's norms stay as they were on both."""
    for result in pair[name]:
        assert math.isfinite(result["loss"]) and not math.isfinite(result["norm"])
        assert result["skipped"] and result["changed"] == []
        assert result["states"] > 50


def test_two_processes_measure_the_variance_of_the_gradient_as_one_does(pair):
    """Four micro-batches, two of them on each process; the variance is a difference of larger sums."""
    expected = compute(Case(micro_batch_size=1, variance=True), ALONE)
    for result in pair["ddp-variance"]:
        assert_same(result, expected, **FP32)
        assert result["noise"][::2] == pytest.approx(expected["noise"][::2], rel=2e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_qk_clip_takes_the_maximum_over_micro_batches_and_processes(pair, strategy):
    """Rows differ in their largest logit, so a maximum of one process alone would clip otherwise."""
    expected = compute(Case(qk_clip=0.01), ALONE)
    plain = compute(Case(qk_clip=1e9), ALONE)
    scaled = "model.layers.0.self_attn.q_proj.weight"
    assert (plain["weights"][scaled] - expected["weights"][scaled]).abs().max().item() > 1e-3
    for result in pair[f"{strategy}-qk_clip"]:
        assert_same(result, expected, **FP32)
        torch.testing.assert_close(result["max_logits"], expected["max_logits"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_tied_embeddings_equal_one_process(pair, strategy):
    assert_same(pair[f"{strategy}-tied"][0], compute(Case(tied=True), ALONE), **FP32)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_compressed_stream_equals_one_process(pair, strategy):
    assert_same(pair[f"{strategy}-compressed"][0], compute(Case(norm="pre_crmsnorm"), ALONE), **FP32)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_constrained_weights_equal_one_process(pair, strategy):
    """nGPT: unit rows and columns after every step, from whole matrices, shards of rows and replicas."""
    expected = compute(Case(norm="ngpt"), ALONE)
    for result in pair[f"{strategy}-constrained"]:
        assert_same(result, expected, **FP32)
        for name, dim in (("q_proj", 1), ("o_proj", 0)):
            lengths = result["weights"][f"model.layers.1.self_attn.{name}.weight"].norm(dim=dim)
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_penalties_of_whole_matrices_equal_one_process(pair, reference, strategy):
    """Before clipping, once for the batch: not once for each process or micro-batch, and not of a shard."""
    expected = compute(Case(penalized=True), ALONE)
    assert expected["measured"][0][0] == reference["measured"][0][0]  # the loss is told without them
    assert expected["measured"][0][1] > 1.003 * reference["measured"][0][1]
    for result in pair[f"{strategy}-penalized"]:
        assert_same(result, expected, **FP32)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("name", "steps"), [("spectral", SPECTRAL), ("rows", ROW_WISE)])
def test_functions_of_stored_weights_equal_one_process(pair, strategy, name, steps):
    """Singular vectors and lengths of rows are of whole matrices, of which each process stores half."""
    expected = compute(Case(norm="pre_rmsnorm", parametrized=steps), ALONE)
    for result in pair[f"{strategy}-{name}"]:
        assert_same(result, expected, **FP32)
        assert result["weights"].keys() == expected["weights"].keys()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_norms_that_are_kept_are_those_of_whole_matrices(pair, reference, strategy):
    expected = compute(Case(kept=True), ALONE)
    moved = "model.layers.0.self_attn.q_proj.weight"
    assert (expected["weights"][moved].norm() / reference["weights"][moved].norm() - 1).abs() > 1e-3
    for result in pair[f"{strategy}-kept"]:
        assert_same(result, expected, **FP32)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["capped", "soft_capped"])
def test_o4_1_spectral_caps_equal_one_process(pair, strategy, name):
    """From shards too each matrix is capped whole; a shard's singular values are smaller than those."""
    constraint = {"capped": "spectral_cap", "soft_capped": "spectral_soft_cap"}[name]
    expected = compute(Case(norm="convex", capped=constraint), ALONE)
    for result in pair[f"{strategy}-{name}"]:
        assert_same(result, expected, **FP32)
        norms = {
            key: float(torch.linalg.matrix_norm(weight.double(), 2))
            * (weight.shape[1] / weight.shape[0]) ** 0.5
            for key, weight in result["weights"].items()
            if key.endswith("proj.weight")
        }
        assert len(norms) == 12
        # A soft cap leaves room for an update larger than any that came.
        assert 0.95 * CAP < max(norms.values()) <= CAP * (1 + 1e-5)
        rows = result["weights"]["model.embed_tokens.weight"].square().mean(-1).sqrt()
        assert 0.999 < rows.max() <= 1 + 1e-6


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_mean_projected_step_equals_one_process(pair, strategy):
    result = pair[f"{strategy}-recentered"][0]
    assert_same(result, compute(Case(norm="pre_rmsnorm", recentered=True), ALONE), **FP32)
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        for tensor in (result["weights"][name], result["gradients"][name]):
            # A mean of rounding: 1e-7 of the largest number.
            assert tensor.mean(0).abs().max() < 1e-7 * tensor.abs().max()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["bf16", "selective"])
def test_bf16_is_the_same_autocast_under_every_strategy(pair, strategy, name):
    """Micro-batches see the same bf16 products, so losses agree far better than bf16's 2^-9."""
    expected = compute(Case(micro_batch_size=1, precision="bf16"), ALONE)
    assert_same(pair[f"{strategy}-{name}"][0], expected, rtol=1e-5, weights_atol=2e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_pure_bf16_agrees_to_bf16_rounding(pair, reference, strategy):
    result = pair[f"{strategy}-bf16_pure"][0]
    assert {weight.dtype for weight in result["weights"].values()} == {torch.bfloat16}
    assert result["measured"][0][0] == pytest.approx(reference["measured"][0][0], rel=2**-8)
    assert result["measured"][0][1] == pytest.approx(reference["measured"][0][1], rel=0.05)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_gradients_summed_in_bf16_lose_bf16_bits_and_no_more(pair, reference, strategy):
    result = pair[f"{strategy}-bf16_sums"][0]
    name = "model.layers.0.mlp.gate_proj.weight"
    error = (result["gradients"][name] - reference["gradients"][name]).norm() / reference["gradients"][
        name
    ].norm()
    assert 2**-16 < error < 2**-4
    assert result["measured"][0][1] == pytest.approx(reference["measured"][0][1], rel=2**-7)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_accumulation_sends_no_more_sums_than_one_micro_batch(pair, strategy):
    once, twice = (pair[f"{strategy}-{name}"][0]["sums"] for name in ("whole", "accumulating"))
    # Valid tokens, loss, and the gradients: one DDP bucket; or one all-reduce of the shards' norm, one of the
    # vectors, and a reduce-scatter for each of two blocks and the root.
    expected = {
        "ddp": {"c10d::allreduce_": 3},
        "fsdp2": {"c10d::allreduce_": 4, "c10d::_reduce_scatter_base_": 3},
    }
    assert once == twice == expected[strategy]


def test_the_norm_of_a_large_gradient_is_right_in_fp32():
    """torch's own norm is 8e-5 off here; shards of such a tensor would then differ from the whole."""
    gradient = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    bias = torch.full((3,), 5.0)
    norm = gradient_norm([gradient, bias], ALONE)
    exact = (gradient.double().square().sum() + bias.double().square().sum()).sqrt()
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(exact.item(), rel=5e-7)


@pytest.mark.parametrize("name", CASES)
def test_processes_end_with_identical_weights(pair, name):
    first, second = (result["weights"] for result in pair[name])
    assert all(torch.equal(first[key], second[key]) for key in first)
