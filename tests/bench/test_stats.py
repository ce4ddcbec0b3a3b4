"""The arithmetic behind every figure: orders, quartiles, paired ratios, and how often intervals are right."""

import random

import pytest

from peft_fast.benchmarks import stats


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_every_provider_takes_every_place_equally_often(n):
    for block in range(3):
        orders = [stats.rotation(n, block * n + i) for i in range(n)]
        assert all(sorted(order) == list(range(n)) for order in orders)
        for place in range(n):
            assert sorted(order[place] for order in orders) == list(range(n))


def test_blocks_are_shuffled_anew():
    assert len({tuple(stats.rotation(6, 6 * block)) for block in range(20)}) > 10


def test_median_and_quartiles():
    assert stats.median([3.0, 1.0, 2.0]) == 2.0
    assert stats.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


def test_ratio_of_equal_samples_is_exactly_one():
    assert stats.ratio([2.0, 5.0, 3.0], [2.0, 5.0, 3.0]) == (1.0, 1.0, 1.0)


def test_pairing_cancels_drift():
    # the machine slows down tenfold during the run; each pair still differs by a fifth
    base = [1.0 + 0.5 * i for i in range(20)]
    mid, low, high = stats.ratio([1.2 * b for b in base], base)
    assert (mid, low, high) == pytest.approx((1.2, 1.2, 1.2))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draw = random.Random(0)
    held = 0
    for _ in range(200):
        a = [draw.lognormvariate(0.0, 0.1) for _ in range(20)]
        b = [draw.lognormvariate(0.0, 0.1) for _ in range(20)]
        held += stats.contains(stats.ratio(a, b), 1.0)
    assert 180 <= held <= 200


def test_the_interval_shows_a_small_difference():
    draw = random.Random(1)
    base = [draw.lognormvariate(0.0, 0.02) for _ in range(20)]
    slower = [1.05 * b * draw.lognormvariate(0.0, 0.02) for b in base]
    assert not stats.contains(stats.ratio(slower, base), 1.0)


@pytest.mark.parametrize("a, b", [([1.0], [1.0, 2.0]), ([], [])])
def test_unpaired_samples_are_an_error(a, b):
    with pytest.raises(ValueError, match="paired samples"):
        stats.ratio(a, b)


def test_torch_generator_is_left_alone():
    import torch

    before = torch.get_rng_state()
    stats.ratio([1.0, 2.0, 3.0], [1.0, 2.0, 2.0])
    stats.rotation(4, 9)
    assert torch.equal(torch.get_rng_state(), before)
