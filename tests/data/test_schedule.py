"""Dealing a step's examples to ranks and rows: what fits, and how evenly it costs."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notus.data.packing import check_fits
from notus.data.schedule import deal, time_of


def flat(dealt):
    return [item for rank in dealt for row in rank for item in row]


def test_deal_by_hand():
    # Rows of at most 9, two on each of two ranks. 9, 7, 5, 4 open a row each; 3 goes to the 4 (7), 1 to the 5 (6).
    # The rows cost 9, 7, 7, 6: the first two are the ranks' first.
    lengths = [1, 3, 4, 5, 7, 9]
    dealt = deal(lengths, lengths, world_size=2, tokens_per_row=9)
    assert dealt == [[[5], [2, 1]], [[4], [3, 0]]]
    assert time_of(dealt, lengths) == 9 + 7
    # Rows of 15, one each: 9; 7 and 5 (12); 4 to the 9 (13), 3 to the 12 (15), 1 to the 13 (14).
    dealt = deal(lengths, lengths, world_size=2, tokens_per_row=15)
    assert dealt == [[[4, 3, 1]], [[5, 2, 0]]]
    assert time_of(dealt, lengths) == 15


def test_costs_decide_where_lengths_leave_room():
    # one that costs as much as the three others together, which are as long as it is
    assert deal([4] * 4, [9, 3, 3, 3], world_size=2, tokens_per_row=12) == [[[0]], [[1, 2, 3]]]
    # two rows of 8 hold two each, whatever they cost
    assert deal([4] * 4, [9, 3, 3, 3], world_size=2, tokens_per_row=8) == [[[0, 3]], [[1, 2]]]


def test_rows_of_like_cost_meet():
    costs = [1, 10, 10, 1]
    dealt = deal([5] * 4, costs, world_size=2, tokens_per_row=5)
    assert dealt == [[[1], [0]], [[2], [3]]]
    assert time_of(dealt, costs) == 11  # were a dear row to meet a cheap one, 20


def test_deal_takes_more_rows_than_the_tokens_alone_would_need():
    # 3 x 6 = 18 tokens would fill 2 rows of 10, but only one example fits into a row.
    assert deal([6, 6, 6], [6, 6, 6], world_size=1, tokens_per_row=10) == [[[0], [1], [2]]]


def test_more_ranks_than_examples_get_empty_rows():
    assert deal([5, 8], [5, 8], world_size=4, tokens_per_row=8) == [[[1]], [[0]], [[]], [[]]]


def test_an_example_that_fits_into_no_row_is_an_error():
    with pytest.raises(ValueError, match=r"training\.tokens_per_row=7 .*\(8 tokens\): set .* at least 8, or lower"):
        deal([3, 8], [3, 8], world_size=2, tokens_per_row=7)
    check_fits(8, 8)
    with pytest.raises(ValueError, match=r"at least 9"):
        check_fits(9, 8)


examples = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 99)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(examples=examples, world_size=st.integers(1, 9), spare=st.integers(0, 60))
def test_deal_loses_nothing_doubles_nothing_and_keeps_within_the_limit(examples, world_size, spare):
    lengths, costs = zip(*examples, strict=True)
    limit = max(lengths) + spare
    dealt = deal(lengths, costs, world_size, limit)
    assert sorted(flat(dealt)) == list(range(len(lengths)))
    assert len(dealt) == world_size
    assert len({len(rank) for rank in dealt}) == 1
    assert all(sum(lengths[item] for item in row) <= limit for rank in dealt for row in rank)
    assert dealt == deal(lengths, costs, world_size, limit)
    # the dearest rows first, on every rank
    per_row = [[sum(costs[item] for item in row) for row in rows] for rows in zip(*dealt, strict=True)]
    assert all(min(before) >= max(after) for before, after in itertools.pairwise(per_row))
    assert time_of(dealt, costs) == sum(max(found) for found in per_row)


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(1, 30), min_size=1, max_size=7), world_size=st.integers(2, 3))
def test_one_row_each_takes_within_four_thirds_of_the_best_possible(costs, world_size):
    best = min(
        max(sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == own) for own in range(world_size))
        for ranks in itertools.product(range(world_size), repeat=len(costs))
    )
    taken = time_of(deal([1] * len(costs), costs, world_size, 1000), costs)
    assert taken <= (4 / 3 - 1 / (3 * world_size)) * best + 1e-9  # Graham 1969: longest processing time first


@pytest.mark.parametrize("tokens_per_row", [4096, 8192])
def test_realistic_lengths_leave_the_ranks_hardly_idle(tokens_per_row):
    generator = np.random.default_rng(0)
    cost = paid = 0.0
    for _ in range(20):
        lengths = np.clip(generator.lognormal(6.4, 0.6, size=64), 8, 2000).astype(int)
        costs = lengths + lengths**2 / 20_000  # attention makes the longest dearer than their tokens
        cost += costs.sum()
        paid += 8 * time_of(deal(lengths, costs, 8, tokens_per_row), costs)
    assert 1 - cost / paid < 0.02
