"""The order of samples is a keyed permutation."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from llmnorm.data.order import permute


def test_is_a_bijection_for_any_size_seed_and_epoch():
    generator = random.Random(0)
    sizes = [1, 2, 3, 4, 5, 9, 16, 17, 255, 256, 257] + [generator.randint(1, 5000) for _ in range(30)]
    for n in sizes:
        seed, epoch = generator.randint(-5, 1 << 70), generator.randint(0, 1000)
        order = permute(np.arange(n), n, seed, epoch)
        assert np.array_equal(np.sort(order), np.arange(n)), (n, seed, epoch)


def test_depends_on_nothing_but_its_arguments():
    whole = permute(np.arange(1000), 1000, 7, 3)
    shuffled = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(permute(shuffled, 1000, 7, 3), whole[shuffled])
    assert [int(permute(np.array([i]), 1000, 7, 3)[0]) for i in range(50)] == whole[:50].tolist()
    # Written down so that a change of the order, which would break the resumption of runs, is noticed.
    assert permute(np.arange(8), 1000, 0, 0).tolist() == [411, 836, 604, 197, 823, 624, 506, 232]


def test_seeds_and_epochs_give_unrelated_orders():
    orders = [permute(np.arange(2000), 2000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for i, one in enumerate(orders):
        for other in [np.arange(2000), *orders[:i]]:
            # Two random permutations agree at one place on average (Poisson: 8 or more has p = 1e-5), and
            # their correlation has a standard deviation of 1/sqrt(2000) = 0.022.
            assert (one == other).sum() < 8
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_every_order_of_a_small_set_is_as_likely():
    counts = Counter(tuple(permute(np.arange(4), 4, seed, 0).tolist()) for seed in range(6000))
    assert len(counts) == 24
    # Binomial with mean 250 and standard deviation 15.5: five of them.
    assert min(counts.values()) > 250 - 78 and max(counts.values()) < 250 + 78


def test_a_very_large_set_needs_no_memory():
    n = 10**15
    order = permute(np.arange(n - 1000, n), n, 0, 0)
    assert len(np.unique(order)) == 1000 and order.min() >= 0 and order.max() < n
    assert order.std() > 0.2 * n  # a uniform distribution has 0.289 n
