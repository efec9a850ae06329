"""DCT-AdamW and GradNormLoRP: the basis, the choice of frequencies, moments that follow, row norms."""

from __future__ import annotations

import math

import pytest
import torch
from lowrank_cases import gradient

from llmnorm.errors import UserError
from llmnorm.optim.dct_adamw import DCTAdamW, _moved, dct_matrix, strongest
from llmnorm.optim.gradnorm_lorp import GradNormLoRP, split_gradient


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def makhoul(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal DCT-II of each row by one FFT (Makhoul, 1980)."""
    n = x.shape[-1]
    v = torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1)
    k = torch.arange(n, dtype=torch.float64)
    spectrum = (2 * torch.exp(-1j * math.pi * k / (2 * n)) * torch.fft.fft(v)).real
    scale = torch.full((n,), 1 / math.sqrt(2 * n), dtype=torch.float64)
    scale[0] = 1 / math.sqrt(4 * n)
    return spectrum * scale


def test_o12_the_basis_is_the_orthonormal_dct_ii():
    d = dct_matrix(4, gaussian(1))
    rows = [[0.5] * 4, [0.65328148, 0.27059805, -0.27059805, -0.65328148]]
    torch.testing.assert_close(d[:2], torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-8)
    for n in (5, 8):
        d, x = dct_matrix(n, gaussian(1)), gaussian(3, n)
        torch.testing.assert_close(d @ d.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(x @ d.T, makhoul(x), rtol=0, atol=1e-12)


def test_golden_scores_and_frequencies():
    """r = 1 and r = 5 tell the basis from its transpose; r = 3 would not."""
    a = gradient(1, 5, 8)
    spectrum = a @ dct_matrix(8, a).T
    expected = [
        0.70715998,
        0.96217707,
        1.73477525,
        1.57596397,
        0.90821169,
        1.39273483,
        1.43061264,
        0.55162793,
    ]
    torch.testing.assert_close(
        spectrum.abs().sum(0), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8
    )
    assert strongest(spectrum, 1, True).tolist() == [2]
    assert strongest(spectrum, 5, True).tolist() == [1, 2, 3, 5, 6]
    shuffled = spectrum[torch.randperm(5, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(strongest(shuffled, 5, True), strongest(spectrum, 5, True))


@pytest.mark.parametrize("right", [True, False])
def test_o12_moments_follow_their_frequency(right):
    old, new = torch.tensor([1, 3, 4, 7]), torch.tensor([0, 3, 5, 7])
    moment = gaussian(6, 4) if right else gaussian(4, 6)
    moved = _moved(moment, old, new, right)
    moment, moved = (moment, moved) if right else (moment.T, moved.T)
    assert torch.equal(moved[:, [1, 3]], moment[:, [1, 3]])
    assert not moved[:, [0, 2]].any()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_all_frequencies_are_adam_in_the_cosine_basis(shape):
    weight = gaussian(*shape, seed=1).requires_grad_()
    right = shape[0] > shape[1]
    d = dct_matrix(5, weight)
    rotated = (weight.detach() @ d.T if right else d @ weight.detach()).requires_grad_()
    ours, adam = (
        DCTAdamW([("w", weight)], lr=0.01, rank=5),
        torch.optim.AdamW([rotated], lr=0.01, weight_decay=0),
    )
    for seed in range(5):
        grad = gaussian(*shape, seed=10 + seed)
        weight.grad, rotated.grad = grad, grad @ d.T if right else d @ grad
        ours.step()
        adam.step()
    back = rotated.detach() @ d if right else d.T @ rotated.detach()
    torch.testing.assert_close(weight.detach(), back, rtol=0, atol=1e-12)
    assert ours.state[weight]["frequencies"].dtype == torch.int32


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-12), (8, 0.02), (4, 0.2)])
def test_error_feedback_keeps_what_the_projection_dropped(bits, tolerance):
    weight = torch.zeros(64, 80, dtype=torch.float64, requires_grad=True)
    optimizer = DCTAdamW([("w", weight)], lr=0.0, rank=8, error_feedback=bits)
    grad = gaussian(64, 80)
    weight.grad = grad
    optimizer.step()
    state = optimizer.state[weight]
    d = dct_matrix(64, grad)[state["frequencies"].long()]
    dropped = grad - d.T @ (d @ grad)
    if bits == 32:
        kept = state["error"]
    else:
        from llmnorm.optim.quantized_state import Quantized, dequantize

        kept = dequantize(Quantized(state["error_codes"], state["error_absmax"]), bits, True, 80).double()
    assert (kept - dropped).norm() <= tolerance * dropped.norm()


def test_resetting_moments_is_refused():
    with pytest.raises(UserError, match="moments=reset would empty the moments"):
        DCTAdamW([torch.zeros(4, 4)], moments="reset")


def test_gradnorm_lorp_splits_the_gradient_as_autograd_does():
    weight, grad = gaussian(5, 7), gaussian(5, 7, seed=1)
    g = weight.norm(dim=1, keepdim=True).requires_grad_()
    v = weight.clone().requires_grad_()
    (g * v / v.norm(dim=1, keepdim=True)).backward(grad)
    along, tangent = split_gradient(grad, weight)
    torch.testing.assert_close((along, tangent), (g.grad, v.grad), rtol=0, atol=1e-12)
    assert (tangent * weight).sum(1).abs().max() < 1e-12


def test_gradnorm_lorp_moves_norms_by_adam_and_directions_by_galore():
    weight = gaussian(6, 4).requires_grad_()
    optimizer = GradNormLoRP([("w", weight)], lr=0.01, rank=4)
    norms = weight.detach().norm(dim=1, keepdim=True).requires_grad_()
    adam = torch.optim.AdamW([norms], lr=0.01, weight_decay=0.0)
    for seed in range(4):
        grad = gaussian(6, 4, seed=20 + seed)
        norms.grad = split_gradient(grad, weight.detach())[0]
        weight.grad = grad
        adam.step()
        optimizer.step()
        torch.testing.assert_close(weight.detach().norm(dim=1, keepdim=True), norms.detach())
