"""Which examples a step sees; which rank and packed row each goes to: what fits, and how evenly it costs."""

import dataclasses
import itertools
import math

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notus.data.batching import StepPlan, balance, lockstep_cost, packing_report, step_rows
from notus.data.dataset import FEATURES, TokenizedDataset
from notus.data.packing import check_fits

# --- step plan ---


@pytest.mark.parametrize(("num_examples", "batch_size"), [(1, 1), (1, 8), (12, 4), (13, 4), (13, 13), (5, 64)])
def test_every_epoch_takes_every_example_exactly_once(num_examples, batch_size):
    plan = StepPlan(num_examples, batch_size, seed=3)
    assert plan.steps_per_epoch == math.ceil(num_examples / batch_size)
    for epoch in range(3):
        steps = [plan.indices(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(num_examples))


def test_an_epochs_last_step_may_be_short_and_the_next_epoch_begins_anew():
    plan = StepPlan(10, 4, seed=0)
    assert [len(plan.indices(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]


def test_epochs_and_seeds_have_different_orders_and_steps_can_be_asked_in_any_order():
    def order(seed, epoch):
        return StepPlan(100, 100, seed=seed).indices(epoch).tolist()

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(found) for found in orders}) == 6
    assert [order(seed, epoch) for seed in (1, 0) for epoch in (2, 1, 0)] == orders[::-1]


def test_without_shuffling_every_epoch_has_the_datas_order():
    plan = StepPlan(5, 2, seed=7, shuffle=False)
    assert [plan.indices(step).tolist() for step in range(6)] == [[0, 1], [2, 3], [4]] * 2


# --- balance over ranks and rows ---


def flat(balanced):
    return [item for rank in balanced for row in rank for item in row]


def test_deal_by_hand():
    # Rows of at most 9, two on each of two ranks. 9, 7, 5, 4 open a row each; 3 goes to the 4 (7), 1 to the 5 (6).
    # The rows cost 9, 7, 7, 6: the first two are the ranks' first.
    lengths = [1, 3, 4, 5, 7, 9]
    balanced = balance(lengths, lengths, world_size=2, tokens_per_row=9)
    assert balanced == [[[5], [2, 1]], [[4], [3, 0]]]
    assert lockstep_cost(balanced, lengths) == 9 + 7
    # Rows of 15, one each: 9; 7 and 5 (12); 4 to the 9 (13), 3 to the 12 (15), 1 to the 13 (14).
    balanced = balance(lengths, lengths, world_size=2, tokens_per_row=15)
    assert balanced == [[[4, 3, 1]], [[5, 2, 0]]]
    assert lockstep_cost(balanced, lengths) == 15


def test_costs_decide_where_lengths_leave_room():
    # one that costs as much as the three others together, which are as long as it is
    assert balance([4] * 4, [9, 3, 3, 3], world_size=2, tokens_per_row=12) == [[[0]], [[1, 2, 3]]]
    # two rows of 8 hold two each, whatever they cost
    assert balance([4] * 4, [9, 3, 3, 3], world_size=2, tokens_per_row=8) == [[[0, 3]], [[1, 2]]]


def test_an_example_that_fits_into_no_row_is_an_error():
    with pytest.raises(ValueError, match=r"training\.tokens_per_row=7 .*\(8 tokens\): set .* at least 8, or lower"):
        balance([3, 8], [3, 8], world_size=2, tokens_per_row=7)
    check_fits(8, 8)
    with pytest.raises(ValueError, match=r"at least 9"):
        check_fits(9, 8)


examples = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 99)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(examples=examples, world_size=st.integers(1, 9), spare=st.integers(0, 60))
def test_deal_loses_nothing_doubles_nothing_and_keeps_within_the_limit(examples, world_size, spare):
    lengths, costs = zip(*examples, strict=True)
    limit = max(lengths) + spare
    balanced = balance(lengths, costs, world_size, limit)
    assert sorted(flat(balanced)) == list(range(len(lengths)))
    assert len(balanced) == world_size
    assert len({len(rank) for rank in balanced}) == 1
    assert all(sum(lengths[item] for item in row) <= limit for rank in balanced for row in rank)
    assert balanced == balance(lengths, costs, world_size, limit)
    # the dearest rows first, on every rank
    per_row = [[sum(costs[item] for item in row) for row in rows] for rows in zip(*balanced, strict=True)]
    assert all(min(before) >= max(after) for before, after in itertools.pairwise(per_row))
    assert lockstep_cost(balanced, costs) == sum(max(found) for found in per_row)


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(1, 30), min_size=1, max_size=7), world_size=st.integers(2, 3))
def test_one_row_each_takes_within_four_thirds_of_the_best_possible(costs, world_size):
    best = min(
        max(sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == own) for own in range(world_size))
        for ranks in itertools.product(range(world_size), repeat=len(costs))
    )
    taken = lockstep_cost(balance([1] * len(costs), costs, world_size, 1000), costs)
    assert taken <= (4 / 3 - 1 / (3 * world_size)) * best + 1e-9  # Graham 1969: longest processing time first


@pytest.mark.parametrize("tokens_per_row", [4096, 8192])
def test_realistic_lengths_leave_the_ranks_hardly_idle(tokens_per_row):
    generator = np.random.default_rng(0)
    cost = paid = 0.0
    for _ in range(20):
        lengths = np.clip(generator.lognormal(6.4, 0.6, size=64), 8, 2000).astype(int)
        costs = lengths + lengths**2 / 20_000  # attention makes the longest dearer than their tokens
        cost += costs.sum()
        paid += 8 * lockstep_cost(balance(lengths, costs, 8, tokens_per_row), costs)
    assert 1 - cost / paid < 0.02


# --- packed rows of a step ---


def dataset(records):
    columns = {name: [record[place] for record in records] for place, name in enumerate(FEATURES)}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def test_costs_decide_which_rank_takes_what():
    records = [([1], [[2] * 3, [3]], [[1] * 3, [1]])] * 4
    rows, costs = TokenizedDataset(dataset(records)), np.array([3, 3, 9, 3])
    shares = [
        [batch.indices.tolist() for batch in step_rows(rows, np.arange(4), rank=rank, costs=costs, **common)]
        for common in [{"world_size": 2, "tokens_per_row": 15}]
        for rank in range(2)
    ]
    assert shares == [[[2]], [[0, 1, 3]]]


# --- the packing report ---

# tokens 10, 6, 4; with a trunk per branch 14, 8, 5
REPORTED = [
    ([1] * 4, [[2] * 3, [3] * 3], [[1] * 3, [1] * 3]),
    ([1] * 2, [[2] * 2, [3] * 2], [[1] * 2, [1] * 2]),
    ([1], [[2], [3] * 2], [[1], [1] * 2]),
]


def test_packing_report_by_hand():
    rows = TokenizedDataset(dataset(REPORTED))
    plan = StepPlan(3, 2, shuffle=False)
    report = packing_report(rows, plan, np.array([9, 7, 4]), world_size=2, tokens_per_row=10)
    # Step 0: ranks cost 9 and 7, so 2 of 18 are idle. Step 1: ranks 4 and 0, 4 of 8 are idle, and a filler of 3 tokens.
    assert report.steps == 2
    assert report.padding_share == pytest.approx(3 / 23)
    assert report.sharing_gain == pytest.approx(27 / 20)
    assert report.idle_share == pytest.approx(6 / 26)
    assert str(report) == (
        "packing: 13.04% padding, 26% fewer tokens because prompts are shared, ranks wait for the slowest one for "
        "23.08% of a step (over the first 2 steps)"
    )
    assert str(dataclasses.replace(report, ranks=1, sharing_gain=1.0)) == (
        "packing: 13.04% padding (over the first 2 steps)"
    )


def test_packing_report_on_one_rank_has_no_padding_and_stops_at_max_steps():
    rows = TokenizedDataset(dataset(REPORTED))
    plan = StepPlan(3, 1, shuffle=False)
    report = packing_report(rows, plan, rows.lengths, world_size=1, tokens_per_row=10, max_steps=1)
    assert (report.steps, report.padding_share, report.idle_share) == (1, 0, 0)
    assert report.sharing_gain == pytest.approx(1.4)


def test_packing_report_refuses_a_row_too_long_in_a_step_that_it_does_not_look_at():
    rows = TokenizedDataset(dataset(REPORTED[::-1]))
    plan = StepPlan(3, 1, shuffle=False)
    with pytest.raises(ValueError, match=r"training\.tokens_per_row=9 is less than .* \(10 tokens\)"):
        packing_report(rows, plan, rows.lengths, world_size=1, tokens_per_row=9, max_steps=1)
