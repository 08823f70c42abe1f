"""Breakdowns by hand: groups, ties, and how margins go with length."""

import math

import numpy as np
import pytest

from notus.evaluation.intervals import bootstrap_mean, wilson
from notus.evaluation.preferences.breakdowns import by_length, by_longer, by_source, compare, length_bias

MARGINS = np.array([2.0, -1.0, 0.0, 3.0])


def test_compare():
    found = compare(MARGINS)
    # right: 1, 0, 1/2, 1: mean 0.625, squares about it 0.140625 + 0.390625 + 0.015625 + 0.140625 = 0.6875
    assert found["count"] == 4
    assert found["accuracy"] == 0.625
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(0.6875 / 3 / 4))
    assert found["accuracy_interval"] == wilson(2.5, 4)
    assert found["margin"] == 1.0
    # squares about 1: 1 + 4 + 1 + 4 = 10
    assert found["margin_stderr"] == pytest.approx(math.sqrt(10 / 3 / 4))
    assert found["margin_interval"] == bootstrap_mean(MARGINS)


def test_of_one_pair_the_spread_is_not_known():
    found = compare(MARGINS[:1])
    assert (found["margin_stderr"], found["accuracy_stderr"]) == (None, None)
    assert found["margin_interval"] is None
    assert found["accuracy_interval"] == wilson(1, 1)


def test_by_source_the_largest_first():
    found = by_source(MARGINS, ["b", "a", "b", "b"])
    assert [(row["source"], row["count"], row["margin"]) for row in found] == [("b", 3, 5 / 3), ("a", 1, -1.0)]


def test_by_length_in_doubling_buckets():
    lengths = np.array([[4, 4], [7, 8], [16, 15], [2, 6]])  # together 8, 15, 31, 8
    found = by_length(MARGINS, lengths)
    assert [(row["low"], row["high"], row["count"]) for row in found] == [(8, 15, 3), (16, 31, 1)]
    assert [row["margin"] for row in found] == pytest.approx([(2 - 1 + 3) / 3, 0])
    at_an_edge = by_length(MARGINS[:2], np.array([[1, 1], [2**20, 2**20]]))
    assert [row["low"] for row in at_an_edge] == [2, 2**21]


def test_by_longer():
    found = by_longer(MARGINS, np.array([[3, 1], [1, 3], [2, 2], [9, 8]]))
    assert [(row["longer"], row["count"], row["accuracy"]) for row in found] == [
        ("chosen", 2, 1.0),
        ("rejected", 1, 0.0),
        ("neither", 1, 0.5),
    ]
    assert [row["longer"] for row in by_longer(MARGINS[:1], np.array([[3, 1]]))] == ["chosen"]


def test_length_bias():
    # differences -1, 0, 1, 2 (mean 1/2, spread 2.25 + 0.25 + 0.25 + 2.25 = 5), margins 0, 1, 1, 4 (mean 3/2):
    # products -1.5·-1.5 + -0.5·-0.5 + 0.5·-0.5 + 1.5·2.5 = 6, so the slope is 1.2 and the line starts at 0.9;
    # it leaves 0.3, 0.1, -1.1, 0.7: squares 1.8. Margins spread 2.25 + 0.25 + 0.25 + 6.25 = 9.
    found = length_bias(np.array([0.0, 1.0, 1.0, 4.0]), np.array([[1, 2], [2, 2], [3, 2], [4, 2]]))
    assert found["slope_per_token"] == pytest.approx(1.2)
    assert found["margin_at_equal_length"] == pytest.approx(0.9)
    assert found["slope_stderr"] == pytest.approx(math.sqrt(1.8 / 2 / 5))
    assert found["pearson"] == pytest.approx(6 / math.sqrt(5 * 9))
    # ranks 1, 2, 3, 4 against 1, 2.5, 2.5, 4: spreads 5 and 4.5, products 2.25 + 0 + 0 + 2.25 = 4.5
    assert found["spearman"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))


@pytest.mark.parametrize(
    ("margins", "lengths"),
    [
        ([1.0, 2.0], [[1, 2], [2, 2]]),
        ([1.0, 2.0, 3.0], [[1, 2], [2, 3], [5, 6]]),
        ([1.0, 1.0, 1.0], [[1, 2], [2, 2], [5, 6]]),
    ],
    ids=["two pairs", "equal differences", "equal margins"],
)
def test_no_bias_where_it_is_undefined(margins, lengths):
    assert length_bias(np.array(margins), np.array(lengths)) is None
