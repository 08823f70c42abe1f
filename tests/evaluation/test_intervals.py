"""Intervals against published and hand-worked values."""

import numpy as np
import pytest

from notus.evaluation.intervals import (
    bootstrap_mean,
    bootstrap_ratio,
    normal,
    ratio_stderr,
    share_interval,
    student,
    wilson,
)


def test_wilson_by_hand():
    # Of 10 trials 8 successes, z = 1.959964: centre (0.8 + 0.192073) / 1.384146 = 0.716740,
    # half width 1.959964 / 1.384146 * sqrt(0.016 + 0.0096036) = 0.226578
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=2e-6)
    # Newcombe 1998, table I, method 3: 81 of 263 are 0.2553 to 0.3662; 0 of 20 are 0 to 0.1611; 1 of 29
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_is_symmetric_takes_half_wins_and_knows_nothing_of_nothing():
    low, high = wilson(2.5, 10)
    assert wilson(7.5, 10) == pytest.approx((1 - high, 1 - low))
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(8, 10, level=0.9)[0] > wilson(8, 10)[0]


def test_bootstrap_of_shares_is_the_binomial():
    # The mean of 100 draws from 50 ones and 50 zeros is Binomial(100, 1/2) / 100: quantiles 0.40 and 0.60.
    low, high = bootstrap_mean([0, 1] * 50)
    assert low == pytest.approx(0.40, abs=0.011)
    assert high == pytest.approx(0.60, abs=0.011)


def test_bootstrap_of_a_normal_is_its_standard_error():
    values = np.random.default_rng(7).normal(3.0, 2.0, size=400)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    narrow = bootstrap_mean(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_mean(values) == (low, high)
    assert bootstrap_mean(values, seed=1) != (low, high)


def test_bootstrap_of_more_values_than_a_block_holds():
    assert bootstrap_mean(np.full(2**18 + 1, 0.25), draws=3) == (0.25, 0.25)
    ramp = np.linspace(0, 1, 2**17 - 1)  # two draws a block, the last block with one
    low, high = bootstrap_mean(ramp, draws=5)
    assert 0.495 < low < high < 0.505


def test_bootstrap_of_one_value_is_unknown():
    assert bootstrap_mean([2.5]) is None


@pytest.mark.parametrize("count", [2, 3, 5])
def test_bootstrap_of_few_values_covers_the_true_mean_as_often_as_it_says(count):
    """Mere percentiles do so in 48%, 75% and 82%."""
    draw = np.random.default_rng(count)
    samples = draw.normal(0.3, 1.0, size=(300, count))
    intervals = [bootstrap_mean(values, draws=400) for values in samples]
    covered = np.mean([low <= 0.3 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.04)  # the standard error is 0.013


def test_students_quantiles_are_the_tables():
    found = [student(freedom) for freedom in (1, 2, 3, 9, 30, 100)]
    assert found == pytest.approx([12.7062, 4.30265, 3.18245, 2.26216, 2.04227, 1.98397], abs=1e-4)
    assert student(4, level=0.99) == pytest.approx(4.60409, abs=1e-4)
    assert normal() == pytest.approx(1.959964, abs=1e-6)
    assert student(10_000) == pytest.approx(student(10_001), abs=3e-4)


def test_ratio_of_equal_clusters_is_their_mean():
    values = np.random.default_rng(3).normal(size=50)
    assert bootstrap_ratio(4 * values, np.full(50, 4)) == pytest.approx(bootstrap_mean(values))
    assert ratio_stderr(4 * values, np.full(50, 4)) == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert (bootstrap_ratio([2.0], [3]), ratio_stderr(np.array([2.0]), np.array([3]))) == (None, None)


def test_bootstrap_over_clusters_covers_the_true_mean_as_often_as_it_says():
    """Values of one cluster share most of their spread; an interval over values would cover it in less than 70%."""
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        sizes = draw.integers(1, 7, size=30)
        sums = np.array([size * draw.normal() + draw.normal(0, 0.3, size=size).sum() for size in sizes])
        low, high = bootstrap_ratio(sums, sizes, draws=400)
        covered += low < 0 < high
    assert covered / 200 == pytest.approx(0.95, abs=0.045)


def test_interval_of_a_share_with_an_error():
    low, high = share_interval(0.5, 0.1, 1000)
    assert (low, high) == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=1e-3)
    assert share_interval(0.98, 0.1, 1000)[1] == 1.0
    assert share_interval(1.0, 0.0, 10) == wilson(10, 10)
    assert share_interval(0.5, None, 10) == wilson(5, 10)
