"""GaLore, Fira and APOLLO: golden runs and the oracles of projection, limiter and rank."""

from __future__ import annotations

import math

import pytest
import torch
from lowrank_cases import gradient, matrix, trajectory, weight

from llmnorm.errors import UserError
from llmnorm.optim import lowrank
from llmnorm.optim.apollo import APOLLO, APOLLOMini
from llmnorm.optim.fira import Fira
from llmnorm.optim.galore import GaLore
from llmnorm.optim.growth_limiter import growth_limit
from llmnorm.optim.lowrank import find_basis, project

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
        ".084754816 .060483098 .006546174; .059178788 -.039730780 -.102985687; .008108799 -.104343409 -.019718936;"
        "-.047712709 -.058850541 .097434746",
    ),
    "paper": (
        (4, 3),
        {"variant": "paper", "eps": 1e-8, "update_proj_gap": NEVER},
        ".084754571 .060483971 .006546001; .059178953 -.039730619 -.102985853; .008108977 -.104343661 -.019718954;"
        "-.047713324 -.058849883 .097434888",
    ),
    "paper, moments kept over a refresh": (
        (4, 3),
        {"variant": "paper", "eps": 1e-8, "update_proj_gap": 2},
        ".084750412 .060366238 .007343624; .059073269 -.039396523 -.102816497; .008065301 -.104512366 -.020319877;"
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
    got, _, _ = trajectory(GaLore, *shape, rank=2, scale=0.25, **options)
    torch.testing.assert_close(got, matrix(expected), **PRINTED)


FIRA = {
    "released": (
        (4, 3),
        ".093013319 .073549020 .021704701; .068185599 -.041315802 -.110985428; .008615651 -.111911378 -.011566924;"
        "-.063939996 -.047144893 .083852644",
        (7.297518586, 7.370493782, 6.926393703),
    ),
    "paper": (
        (4, 3),
        ".086939152 .061781553 .009980639; .058962291 -.039859311 -.103326488; .008618255 -.104041157 -.018918254;"
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
    got, limited, _ = trajectory(
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
    got, norms, _ = trajectory(APOLLO, 4, 3, rank=2, eps=1e-8)
    expected = matrix(
        ".097980656 .072372696 .023821877; .065395197 -.053562210 -.111273671; .015659191 -.122175197 -.006887441;"
        "-.079231241 -.036266343 .077026108"
    )
    torch.testing.assert_close(got, expected, **PRINTED)
    assert [norm.item() for norm in norms] == pytest.approx(
        (15.480971120, 15.635780841, 13.230813679), abs=2e-9
    )


def test_golden_apollo_mini(monkeypatch):
    monkeypatch.setattr(lowrank, "random_basis", fixed_sketch(1))
    got, norms, _ = trajectory(APOLLOMini, 4, 3, eps=1e-8)
    expected = matrix(
        ".201797019 .231483799 .158287133; .216875445 -.069664744 -.231941334; -.019223211 -.193700023 .086014735;"
        "-.160562865 .036630223 .018788733"
    )
    torch.testing.assert_close(got, expected, **PRINTED)
    assert [norm.item() for norm in norms] == pytest.approx((8.243449982, 8.325884492, 8.409143347), abs=2e-9)
