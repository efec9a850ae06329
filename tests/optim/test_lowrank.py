"""GaLore, Fira and APOLLO: golden runs and the oracles of projection, limiter and rank."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from lowrank_cases import gradient, matrix, trajectory

from llmnorm.errors import UserError
from llmnorm.optim import lowrank
from llmnorm.optim.apollo import APOLLO, APOLLOMini
from llmnorm.optim.fira import Fira
from llmnorm.optim.galore import GaLore
from llmnorm.optim.growth_limiter import growth_limit
from llmnorm.optim.lowrank import find_basis, project, random_basis, turn_of

# The golden numbers have nine decimals; those of released code had a basis found in fp32.
PRINTED = {"rtol": 0, "atol": 2e-9}
NEVER = 1000


def gaussians(count: int, *shape: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_golden_basis():
    hyper = {"projection": "svd", "name": "w"}
    for t, expected in (
        (1, ".845083109 -.007758231 -.534578665; -.156124772 .952730002 -.260634993"),
        (3, ".920944999 .257315999 -.292658137; -.258171161 .965412965 .036406852"),
    ):
        basis = find_basis(gradient(t, 4, 3), True, 2, hyper, 0, None)
        torch.testing.assert_close(basis, matrix(expected), **PRINTED)


GALORE = {
    "released": (
        (4, 3),
        {"eps": 1e-6, "update_proj_gap": NEVER},
        ".084754816 .060483098 .006546174; .059178788 -.039730780 -.102985687;"
        " .008108799 -.104343409 -.019718936;"
        "-.047712709 -.058850541 .097434746",
    ),
    "paper": (
        (4, 3),
        {"variant": "paper", "eps": 1e-8, "update_proj_gap": NEVER},
        ".084754571 .060483971 .006546001; .059178953 -.039730619 -.102985853;"
        " .008108977 -.104343661 -.019718954;"
        "-.047713324 -.058849883 .097434888",
    ),
    "paper, moments kept over a refresh": (
        (4, 3),
        {"variant": "paper", "eps": 1e-8, "update_proj_gap": 2},
        ".084750412 .060366238 .007343624; .059073269 -.039396523 -.102816497;"
        " .008065301 -.104512366 -.020319877;"
        "-.048086648 -.059253451 .097839429",
    ),
    "released, left": (
        (3, 4),
        {"eps": 1e-6, "update_proj_gap": NEVER},
        ".085122802 .056370647 .011171345 -.039017884; .056516680 -.040883965 -.103944956 -.068230311;"
        ".007077985 -.104407145 -.019100675 .096777740",
    ),
}


@pytest.mark.parametrize("case", GALORE)
def test_golden_galore(case):
    shape, options, expected = GALORE[case]
    got, _ = trajectory(GaLore, *shape, rank=2, scale=0.25, **options)
    torch.testing.assert_close(got, matrix(expected), **PRINTED)


FIRA = {
    "released": (
        (4, 3),
        ".093013319 .073549020 .021704701; .068185599 -.041315802 -.110985428;"
        " .008615651 -.111911378 -.011566924;"
        "-.063939996 -.047144893 .083852644",
        (7.297518586, 7.370493782, 6.926393703),
    ),
    "paper": (
        (4, 3),
        ".086939152 .061781553 .009980639; .058962291 -.039859311 -.103326488;"
        " .008618255 -.104041157 -.018918254;"
        "-.049482796 -.059900919 .094652879",
        (0.908508674, 0.917593771, 0.699215299),
    ),
    "released, left": (
        (3, 4),
        ".090886886 .069950611 .019299655 -.031070838; .069994975 -.040759224 -.113455185 -.069264199;"
        ".009164300 -.111468094 -.008280165 .094346272",
        None,
    ),
    "paper, left": (
        (3, 4),
        ".087287190 .057353659 .011627217 -.038462210; .058808892 -.039842730 -.103471407 -.067642069;"
        ".008324552 -.103841273 -.018901254 .097097994",
        None,
    ),
}


@pytest.mark.parametrize("case", FIRA)
def test_golden_fira(case):
    shape, expected, norms = FIRA[case]
    got, limited = trajectory(
        Fira, *shape, rank=2, scale=0.25, eps=1e-8, update_proj_gap=NEVER, variant=case.split(",")[0]
    )
    torch.testing.assert_close(got, matrix(expected), **PRINTED)
    if norms:
        assert [norm.item() for norm in limited] == pytest.approx(norms, abs=2e-9)


def fixed_sketch(rank: int):
    rows = [[math.cos(1.1 * (a + 1) * (j + 1)) / math.sqrt(rank) for j in range(3)] for a in range(rank)]
    return lambda grad, right, r, seed: torch.tensor(rows, dtype=torch.float64)


def test_golden_apollo(monkeypatch):
    monkeypatch.setattr(lowrank, "random_basis", fixed_sketch(2))
    got, norms = trajectory(APOLLO, 4, 3, rank=2, eps=1e-8)
    expected = matrix(
        ".097980656 .072372696 .023821877; .065395197 -.053562210 -.111273671;"
        " .015659191 -.122175197 -.006887441;"
        "-.079231241 -.036266343 .077026108"
    )
    torch.testing.assert_close(got, expected, **PRINTED)
    assert [norm.item() for norm in norms] == pytest.approx(
        (15.480971120, 15.635780841, 13.230813679), abs=2e-9
    )


def test_golden_apollo_mini(monkeypatch):
    monkeypatch.setattr(lowrank, "random_basis", fixed_sketch(1))
    got, norms = trajectory(APOLLOMini, 4, 3, eps=1e-8)
    expected = matrix(
        ".201797019 .231483799 .158287133; .216875445 -.069664744 -.231941334;"
        " -.019223211 -.193700023 .086014735;"
        "-.160562865 .036630223 .018788733"
    )
    torch.testing.assert_close(got, expected, **PRINTED)
    assert [norm.item() for norm in norms] == pytest.approx((8.243449982, 8.325884492, 8.409143347), abs=2e-9)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_o1_full_rank_galore_is_adam_in_the_rotated_coordinates(shape):
    """W' = W V^T (left: U^T W) moves as Adam moves it, and back again."""
    grads = gaussians(5, *shape)
    start = gaussians(1, *shape, seed=9)[0]
    ours = start.clone().requires_grad_()
    optimizer = GaLore(
        [("w", ours)], lr=0.01, rank=4, scale=1.0, update_proj_gap=NEVER, variant="paper", eps=1e-8
    )
    right = shape[0] > shape[1]
    x = grads[0] if right else grads[0].T
    v = lowrank.canonical(torch.linalg.svd(x, full_matrices=False)[2])
    rotated = (start @ v.T if right else v @ start).requires_grad_()
    adam = torch.optim.AdamW([rotated], lr=0.01, weight_decay=0.0)
    for grad in grads:
        ours.grad = grad.clone()
        optimizer.step()
        rotated.grad = grad @ v.T if right else v @ grad
        adam.step()
    back = rotated.detach() @ v if right else v.T @ rotated.detach()
    torch.testing.assert_close(ours.detach(), back, rtol=0, atol=1e-12)


@pytest.mark.parametrize("projection", ["svd", "gram", "randomized", "power"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_o4_bases_are_orthonormal_and_o5_find_a_low_rank_gradient(projection, shape):
    a, b = gaussians(1, shape[0], 3)[0], gaussians(1, 3, shape[1], seed=1)[0]
    grad, right = (a @ b).float(), shape[0] > shape[1]
    basis = find_basis(grad, right, 3, {"projection": projection, "name": "w"}, 7, None)
    assert (basis @ basis.T - torch.eye(3)).abs().max() < 1e-5
    rebuilt = lowrank.back(project(grad, basis, right), basis, right)
    assert torch.linalg.norm(rebuilt - grad) < 1e-4 * torch.linalg.norm(grad)


def test_power_iteration_from_a_warm_start_approaches_the_leading_subspace():
    u, _, vh = torch.linalg.svd(gaussians(1, 30, 12)[0], full_matrices=False)
    grad = u @ torch.diag(torch.logspace(0, -3, 12, dtype=torch.float64)) @ vh
    hyper = {"projection": "power", "name": "w"}
    basis = torch.linalg.qr(gaussians(1, 12, 3, seed=4)[0])[0].T
    energies = []
    for _ in range(4):
        basis = find_basis(grad, True, 3, hyper, 0, basis)
        energies.append(project(grad, basis, True).square().sum().item())
    best = (torch.linalg.svdvals(grad)[:3] ** 2).sum().item()
    assert energies == sorted(energies)
    assert energies[-1] == pytest.approx(best, rel=1e-6)


def test_o3_signs_of_the_basis_do_not_matter_but_rotations_do(monkeypatch):
    def run(change: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(lowrank, "find_basis", lambda *args: change @ find_basis(*args))
        return trajectory(GaLore, 4, 3, rank=2, update_proj_gap=NEVER)[0]

    plain = run(torch.eye(2, dtype=torch.float64))
    flipped = run(torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64)))
    c, s = math.cos(0.7), math.sin(0.7)
    rotated = run(torch.tensor([[c, -s], [s, c]], dtype=torch.float64))
    torch.testing.assert_close(plain, flipped, rtol=0, atol=1e-15)
    assert (plain - rotated).abs().max() > 1e-4


def test_o6_fira_variants_agree_on_the_first_step_at_scale_1():
    runs = [
        trajectory(Fira, 4, 3, steps=1, rank=2, scale=1.0, eps=1e-12, variant=variant)[0]
        for variant in ("released", "paper")
    ]
    torch.testing.assert_close(*runs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_o7_fira_without_a_residual_is_fira_with_one(shape):
    """The one-product form against the residual written out, three steps with a limiter at work."""
    ours = gaussians(1, *shape, seed=3)[0].requires_grad_()
    optimizer = Fira([("w", ours)], lr=0.01, rank=2, scale=0.25, eps=1e-8, update_proj_gap=NEVER)
    naive, right = ours.detach().clone(), shape[0] > shape[1]
    first = second = 0.0
    kept, basis = None, None
    for t, grad in enumerate(gaussians(4, *shape), 1):
        grad = grad * 3**t  # so that the limiter limits
        ours.grad = grad.clone()
        optimizer.step()
        basis = find_basis(grad, right, 2, {"projection": "svd", "name": "w"}, 0, None) if t == 1 else basis
        low = project(grad, basis, right)
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        adam = first / (second.sqrt() + 1e-8)
        dim = 1 if right else 0
        phi = adam.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
        s = phi * (grad - 0.25 * lowrank.back(low, basis, right))
        norm = s.norm()
        if kept is not None:
            s = s / (max(norm / (kept + 1e-8), 1.01) / 1.01)
        kept = s.norm()
        c = (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        naive -= 0.01 * c * (0.25 * lowrank.back(adam, basis, right) + s)
        torch.testing.assert_close(ours.detach(), naive, rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[ours]["limiter_norm"].squeeze(), kept, rtol=1e-12, atol=0)


def test_o8_limiter_bounds_growth_scales_and_survives_a_zero():
    norms = torch.tensor([3.0, 9.0, 1.0, 0.0, 50.0, 50.0], dtype=torch.float64)
    passed = {}
    for scale in (1.0, 1e3):
        state: dict = {}
        passed[scale] = [(n * growth_limit(n, state)).item() for n in (scale * norms).reshape(-1, 1, 1)]
    for before, after in itertools.pairwise(p for p in passed[1.0] if p > 0):
        assert after <= 1.01 * (before + 1e-8) * (1 + 1e-12)
    assert passed[1.0][0] == 3.0 and passed[1.0][2] == 1.0 and passed[1.0][3] == 0.0
    assert passed[1.0][4] == pytest.approx(1.01, rel=1e-6)
    assert passed[1e3] == pytest.approx([1e3 * p for p in passed[1.0]], rel=1e-6)


def test_o9_apollo_with_an_identity_sketch_has_the_row_norms_of_adam(monkeypatch):
    monkeypatch.setattr(
        lowrank, "random_basis", lambda grad, right, r, seed: torch.eye(5, dtype=torch.float64)
    )
    weight, grad = torch.zeros(8, 5, dtype=torch.float64, requires_grad=True), gaussians(1, 8, 5)[0]
    weight.grad = grad
    APOLLO([("w", weight)], lr=1.0, rank=5, eps=1e-12).step()
    # Adam's first step is sign(g): rows of norm sqrt(5), along g.
    rows = weight.detach().norm(dim=1)
    torch.testing.assert_close(rows, torch.full_like(rows, math.sqrt(5)), rtol=1e-6, atol=0)
    cosine = torch.nn.functional.cosine_similarity(-weight.detach(), grad, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_o10_sketch_keeps_lengths_on_average_and_comes_from_the_seed():
    grad = torch.ones(1, 512, dtype=torch.float64)
    lengths = [project(grad, random_basis(grad, True, 16, seed), True).square().sum() for seed in range(400)]
    # The mean of 400 chi-squared values over 16 has a standard deviation of 9.
    assert torch.stack(lengths).mean().item() == pytest.approx(512, abs=45)
    same, other = random_basis(grad, True, 4, 3), random_basis(grad, True, 4, 4)
    assert torch.equal(same, random_basis(grad, True, 4, 3)) and not torch.equal(same, other)


@pytest.mark.parametrize("right", [True, False])
def test_transport_moves_moments_into_the_new_basis(right):
    old, new = (torch.linalg.qr(gaussians(1, 9, 3, seed=s)[0])[0].T for s in (1, 2))
    space = lowrank.Subspace(new, right, new @ old.T)
    first, second = (gaussians(1, *((6, 3) if right else (3, 6)), seed=s)[0] for s in (3, 4))
    moved, spread = space.carry(first, second.square())
    expected = project(lowrank.back(first, old, right), new, right)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)
    assert (spread >= 0).all()
    same, kept = lowrank.Subspace(old, right, old @ old.T).carry(first, second.square())
    torch.testing.assert_close((same, kept), (first, second.square()), rtol=0, atol=1e-12)


def test_o32_a_zero_gradient_at_a_refresh_keeps_the_basis():
    weight = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    optimizer = GaLore([("w", weight)], lr=0.01, rank=2, update_proj_gap=1)
    for grad in (gaussians(1, 6, 4)[0], torch.zeros(6, 4, dtype=torch.float64)):
        weight.grad = grad
        optimizer.step()
        basis = optimizer.state[weight]["basis"].clone()
        if grad.any():
            found = basis
    assert torch.equal(basis, found)
    fresh = torch.zeros(6, 4, requires_grad=True)
    fresh.grad = torch.zeros_like(fresh)
    GaLore([("w", fresh)], lr=0.01, rank=2).step()
    assert torch.equal(fresh.detach(), torch.zeros(6, 4))


def test_refreshes_follow_the_gap_and_stagger_by_name():
    def refreshes(name: str, **options) -> list[int]:
        weight = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
        optimizer = GaLore([(name, weight)], lr=0.01, rank=2, update_proj_gap=5, **options)
        seen, old = [], None
        for step, grad in enumerate(gaussians(16, 6, 4), 1):
            weight.grad = grad
            optimizer.step()
            basis = optimizer.state[weight]["basis"].clone()
            if old is None or not torch.equal(basis, old):
                seen.append(step)
            old = basis
        return seen

    assert refreshes("a") == [1, 6, 11, 16]
    turns = {tuple(refreshes(name, stagger=True)[1:]) for name in "abcdef"}
    assert len(turns) > 1
    assert all(b - a == 5 for turn in turns for a, b in itertools.pairwise(turn))


def test_a_lazy_refresh_doubles_its_gap_while_the_subspace_stands_still():
    weight = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    optimizer = GaLore([("w", weight)], lr=0.0, rank=2, update_proj_gap=2, lazy_refresh=True)
    grad = gaussians(1, 6, 4)[0]
    for _ in range(12):
        weight.grad = grad
        optimizer.step()
    # Refreshes at 1, 3, ..., 11; the fifth overlap is that of step 11.
    assert int(optimizer.state[weight]["refresh_gap"]) == 4
    assert int(optimizer.state[weight]["next_refresh"]) == 15
    torch.testing.assert_close(optimizer.state[weight]["overlaps"], torch.ones(5))


def test_lazy_refreshes_take_turns_too():
    def second_refresh(name: str, stagger: bool) -> int:
        weight = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
        options = {"update_proj_gap": 5, "lazy_refresh": True, "stagger": stagger}
        optimizer = GaLore([(name, weight)], lr=0.01, rank=2, **options)
        weight.grad = gaussians(1, 6, 4)[0]
        optimizer.step()
        return int(optimizer.state[weight]["next_refresh"])

    assert {second_refresh(name, stagger=False) for name in "abcdef"} == {6}
    for name in "abcdef":
        assert second_refresh(name, stagger=True) == 6 - turn_of(name, 5)
    assert len({turn_of(name, 5) for name in "abcdef"}) > 1


def test_a_rank_above_the_smaller_side_is_refused_by_name():
    members = [
        ("layers.0.k_proj.weight", torch.zeros(4, 12)),
        ("layers.0.up_proj.weight", torch.zeros(24, 12)),
    ]
    with pytest.raises(
        UserError, match=r"optimizer.rank=8 exceeds min\(out, in\)=4 of layers.0.k_proj.weight"
    ):
        GaLore(members, rank=8)
    assert GaLore(members).default_rank == 3
    with pytest.raises(UserError, match="projection=random has no orthonormal rows, which Fira needs"):
        Fira(members, projection="random")
    with pytest.raises(UserError, match="moments=transport would do nothing"):
        APOLLO(members, moments="transport")
