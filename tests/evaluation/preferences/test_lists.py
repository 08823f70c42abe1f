"""Lists of rated completions by hand: τ-b with ties, top-1, pairs over prompts, missing completions and ratings."""

import math

import numpy as np
import pytest
import torch

from notus.evaluation.preferences.lists import known, list_metrics, ranking, rankings_by_source, rated_pairs

NAN = np.nan
# the second has a tie of ratings, the third a tie of values and no third completion, the fourth says nothing
RATINGS = np.array([[5, 3, 1], [4, 4, 2], [3, 1, NAN], [2, 2, 2]], dtype=np.float32)
LENGTHS = np.array([[2, 4, 1], [1, 1, 1], [3, 2, 0], [1, 1, 1]])
VALUES = torch.tensor([[2.0, 3.0, 1.0], [1.0, 2.0, 0.0], [0.0, 0.0, 9.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
# τ-b: (2 - 1) / 3; 2 of 2 pairs in order, of 3 pairs of different values; no order
TAUS = [1 / 3, 2 / math.sqrt(2 * 3), 0.0]


def test_what_is_known_has_a_completion_and_a_rating():
    ratings = np.array([[1.0, NAN, 2.0]], dtype=np.float32)
    assert known(ratings, np.array([[3, 3, 0]])).tolist() == [[True, False, False]]


def test_pairs_are_those_of_different_ratings():
    pairs = rated_pairs(RATINGS, LENGTHS)
    assert pairs.prompts.tolist() == [0, 0, 0, 1, 1, 2]
    assert pairs.better.tolist() == [0, 0, 1, 0, 1, 0]
    assert pairs.worse.tolist() == [1, 2, 2, 2, 2, 1]
    assert pairs.differences(VALUES.numpy()).tolist() == [-1, 1, 2, 1, 2, 0]
    assert pairs.both(LENGTHS).tolist() == [[2, 4], [2, 1], [4, 1], [1, 1], [1, 1], [3, 2]]


def test_order_of_the_columns_does_not_matter():
    shuffled = [2, 0, 1]
    found = ranking(VALUES[:, shuffled], RATINGS[:, shuffled], LENGTHS[:, shuffled])
    expected = ranking(VALUES, RATINGS, LENGTHS)
    assert {name: found[name] for name in ("kendall_tau", "top_1")} == pytest.approx(
        {name: expected[name] for name in ("kendall_tau", "top_1")}
    )


def test_metrics_of_every_measure():
    found = list_metrics({"rewards": VALUES, "logps": -VALUES}, RATINGS, LENGTHS)
    assert found == pytest.approx(
        {
            "rewards/kendall_tau": sum(TAUS) / 3,
            "rewards/top_1": (0 + 1 + 0.5) / 3,  # of the tie, either could be first
            "rewards/accuracies": (2 + 2 + 0.5) / 6,
            "rewards/chosen": (2 + 1 + 0 + 1) / 4,
            "rewards/rejected": (1 + 0 + 0 + 3) / 4,  # the third has no third completion
            "rewards/margins": 0.0,
            "logps/kendall_tau": -sum(TAUS) / 3,
            "logps/top_1": (0 + 0 + 0.5) / 3,
            "logps/accuracies": (1 + 0 + 0.5) / 6,
            "logps/chosen": -1.0,
            "logps/rejected": -1.0,
            "logps/margins": 0.0,
        }
    )


def test_ranking_with_its_spread():
    found = ranking(VALUES, RATINGS, LENGTHS)
    mean = sum(TAUS) / 3
    assert found["prompts"] == 3
    assert found["kendall_tau"] == pytest.approx(mean)
    spread = math.sqrt(sum((tau - mean) ** 2 for tau in TAUS) / 2)
    assert found["kendall_tau_stderr"] == pytest.approx(spread / math.sqrt(3))
    low, high = found["kendall_tau_interval"]
    assert low < mean < high
    assert found["top_1"] == 0.5
    assert found["top_1_chance"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)


def test_of_two_prompts_that_differ_the_interval_ends_where_tau_does():
    values = torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # as the ratings, and reversed
    found = ranking(values, np.array([[5.0, 1.0]] * 2, np.float32), np.ones((2, 2), int))
    assert (found["kendall_tau"], found["kendall_tau_interval"]) == (0.0, (-1.0, 1.0))


def test_of_one_prompt_the_spread_is_not_known():
    found = ranking(VALUES[:1], RATINGS[:1], LENGTHS[:1])
    assert (found["kendall_tau_stderr"], found["kendall_tau_interval"], found["top_1_stderr"]) == (None, None, None)


def test_by_source_with_the_ranking_of_its_prompts():
    most, other = rankings_by_source(VALUES, RATINGS, LENGTHS, ["a", "a", "b", "c"])
    assert (most["source"], most["count"], most["prompts"], most["margin"]) == ("a", 5, 2, 1.0)
    assert most["kendall_tau"] == pytest.approx((TAUS[0] + TAUS[1]) / 2)
    assert (other["source"], other["count"], other["accuracy"], other["top_1"]) == ("b", 1, 0.5, 0.5)


def test_lists_without_an_order_are_an_error():
    with pytest.raises(ValueError, match="no prompt has two completions with different ratings"):
        rated_pairs(RATINGS[3:], LENGTHS[3:])
