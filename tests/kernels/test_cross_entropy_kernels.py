"""The cross-entropy kernels, plain and behind the output projection, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from comparing import assert_matches_reference, outputs_and_gradients, relative_error
from torch.utils.checkpoint import checkpoint

import llmnorm_kernels as kernels
from llmnorm_kernels import use_backend

OPS = torch.ops.llmnorm_kernels
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "z_loss": {"z_loss": 1e-2},
    "soft_cap": {"softcap": 3.0},
    "everything": {"z_loss": 1e-2, "softcap": 5.0, "reduction": "sum", "ignore_index": 3},
    "each": {"reduction": "none", "z_loss": 1e-3},
}


def targets(shape, vocabulary, device, ignore_index=-100):
    target = torch.randint(0, vocabulary, shape, device=device)
    target.view(-1)[::4] = ignore_index
    target.view(-1)[1] = vocabulary - 1
    return target


def options(name, target, device):
    given = dict(OPTIONS[name])
    if name in ("everything", "each"):
        given["weights"] = torch.rand(target.shape, device=device)
    return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy(device, name, dtype):
    logits = (3 * torch.randn(3, 7, 1001, device=device)).to(dtype)
    target = targets((3, 7), 1001, device, OPTIONS[name].get("ignore_index", -100))
    given = options(name, target, device)
    # The loss itself is a float32 sum over exact inputs; only the gradient is rounded to the logits' dtype.
    assert_matches_reference(
        lambda logits: kernels.cross_entropy(logits, target, **given),
        logits,
        tolerance=2e-6,
        gradient_tolerance={torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 8e-4}[dtype],
    )


@pytest.mark.parametrize("vocabulary", [1, 2, 257, 5000, pytest.param(50257, marks=pytest.mark.slow)])
def test_vocabularies(device, vocabulary):
    """5,000 and 50,257 columns take several blocks; the last is not full."""
    logits = torch.randn(5, vocabulary, device=device)
    target = torch.tensor([0, vocabulary - 1, -100, 0, vocabulary // 2], device=device)
    assert_matches_reference(
        lambda x: kernels.cross_entropy(x, target, reduction="sum"), logits, tolerance=2e-6
    )


def test_huge_logits_and_minus_infinity(device):
    logits = torch.randn(4, 300, device=device)
    logits[0] *= 1e4
    logits[1, 5:200] = float("-inf")
    logits[2] = 3e38 * torch.randn(300, device=device).sign()
    target = torch.tensor([int(logits[0].argmax()), 2, int(logits[2].argmax()), 7], device=device)
    assert_matches_reference(
        lambda x: kernels.cross_entropy(x, target, reduction="none"), logits, tolerance=2e-6
    )


def test_all_ignored(device):
    logits = torch.randn(4, 50, device=device, requires_grad=True)
    target = torch.full((4,), -100, device=device)
    loss = kernels.cross_entropy(logits, target, reduction="sum")
    loss.backward()
    assert loss.item() == 0.0 and logits.grad.eq(0).all()
    assert kernels.cross_entropy(logits, target).isnan()


def test_target_outside_the_vocabulary_is_not_silent(device):
    logits = torch.randn(2, 50, device=device)
    losses = kernels.cross_entropy(logits, torch.tensor([50, 3], device=device), reduction="none")
    assert losses[0].isnan() and losses[1].isfinite()


def test_strided_logits_and_no_rows(device):
    wide = torch.randn(4, 6, 128, device=device).bfloat16()
    target = targets((4, 6), 101, device)
    assert_matches_reference(
        lambda x: kernels.cross_entropy(x, target), wide[..., 7:108], tolerance=2e-6, gradient_tolerance=3e-3
    )
    empty = kernels.cross_entropy(wide[:0], target[:0], reduction="sum")
    assert empty.item() == 0.0


def test_rows_beyond_32_bit_offsets(device):
    logits = torch.empty_strided((3, 64), (2**30, 1), dtype=torch.bfloat16, device=device)
    logits.copy_(torch.randn(3, 64))
    target = torch.tensor([1, 2, 3], device=device)
    with use_backend("torch"):
        expected = kernels.cross_entropy(logits.contiguous(), target)
    assert relative_error(kernels.cross_entropy(logits, target), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk", [4, 100])
def test_linear_cross_entropy(device, chunk, name, dtype):
    """Chunks that do not divide the tokens, and one that holds them all, against the full logits in
    float64."""
    x, weight = torch.randn(2, 9, 24, device=device).to(dtype), torch.randn(130, 24, device=device).to(dtype)
    bias = torch.randn(130, device=device).to(dtype) if name == "everything" else None
    target = targets((2, 9), 130, device, OPTIONS[name].get("ignore_index", -100))
    given = options(name, target, device)

    def call(x, weight, *bias):
        if x.dtype == torch.float64:
            logits = torch.nn.functional.linear(x, weight, *bias)
            return kernels.cross_entropy(logits, target, **given)
        return kernels.linear_cross_entropy(x, weight, target, *bias, chunk=chunk, **given)

    # bfloat16 logits of size about 15 are rounded to 2^-9 of themselves, which moves each probability by some
    # percent.
    loose = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert_matches_reference(call, x, weight, *(() if bias is None else (bias,)), tolerance=loose)


def test_gradients_are_those_of_the_rounded_logits(device):
    """With the rounding of the logits shared, the chunked bfloat16 gradients are exact to their own
    rounding."""
    x, weight = torch.randn(16, 24, device=device).bfloat16(), torch.randn(130, 24, device=device).bfloat16()
    target = targets((16,), 130, device)
    _, gradients, _ = outputs_and_gradients(
        lambda *g: kernels.linear_cross_entropy(*g, target, chunk=5), (x, weight)
    )
    logits = (x @ weight.t()).double().requires_grad_()
    with use_backend("torch"):
        (slope,) = torch.autograd.grad(kernels.cross_entropy(logits, target), logits)
    up = (
        torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        .float()
        .double()
        .to(device)
    )
    assert relative_error(gradients[0], up * slope @ weight.double()) < 5e-3
    assert relative_error(gradients[1], up * slope.t() @ x.double()) < 5e-3


def test_partial_gradients_and_none(device):
    x, weight = torch.randn(6, 8, device=device), torch.randn(20, 8, device=device)
    target = targets((6,), 20, device)
    with torch.no_grad():
        assert kernels.linear_cross_entropy(x, weight, target, chunk=4).isfinite()
    weight.requires_grad_()
    kernels.linear_cross_entropy(x, weight, target, chunk=4).backward()
    assert weight.grad is not None and x.grad is None


def test_retained_graph_gives_the_same_gradient(device):
    x, weight = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(20, 8, device=device)
    loss = kernels.linear_cross_entropy(x, weight, targets((6,), 20, device), chunk=4)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


def test_gradcheck(device):
    x = torch.randn(3, 2, device=device, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 2, device=device, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, -100], device=device)

    def loss(x, weight, bias):
        # float64 operands, but the scalars reach a kernel as float32: both values are exact there.
        return kernels.linear_cross_entropy(x, weight, target, bias, chunk=2, softcap=4.0, z_loss=0.125)

    assert torch.autograd.gradcheck(loss, (x, weight, bias))


def test_opcheck(device):
    logits, target = torch.randn(5, 40, device=device), torch.tensor([0, -100, 2, 3, 39], device=device)
    torch.library.opcheck(OPS.cross_entropy_forward.default, (logits, target, -100, 2.0, 0.1))
    losses, lse = OPS.cross_entropy_forward(logits, target, -100, 2.0, 0.1)
    torch.library.opcheck(OPS.cross_entropy_backward.default, (losses, logits, target, lse, -100, 2.0, 0.1))
    x, weight = torch.randn(5, 8, device=device), torch.randn(40, 8, device=device)
    for gradient in (True, False):
        given = (x, weight, None, target, None, -100, 0.0, 0.0, 2, gradient, True)
        torch.library.opcheck(OPS.linear_cross_entropy.default, given)


def test_compile_checkpoint_autocast(device):
    x, weight = torch.randn(6, 8, device=device), torch.randn(20, 8, device=device)
    target = targets((6,), 20, device)

    def loss(x, weight):
        return kernels.linear_cross_entropy(x, weight, target, chunk=4) + kernels.cross_entropy(x, target % 8)

    eager = outputs_and_gradients(loss, (x, weight))
    torch._dynamo.reset()
    for other in (
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
        lambda *given: checkpoint(loss, *given, use_reentrant=False),
    ):
        same = outputs_and_gradients(other, (x, weight))
        assert all(torch.equal(a, b) for a, b in zip(eager[0] + eager[1], same[0] + same[1], strict=True))

    def product_only(x, weight):
        return kernels.linear_cross_entropy(x, weight, target)

    with torch.autocast(device, torch.bfloat16):
        cast = outputs_and_gradients(product_only, (x, weight))
    rounded = outputs_and_gradients(product_only, (x.bfloat16(), weight.bfloat16()))
    assert torch.equal(cast[0][0], rounded[0][0])
    # The gradient leaves autocast in the dtype of the float32 parameter.
    assert cast[1][1].dtype == torch.float32 and torch.equal(cast[1][1], rounded[1][1].float())
