"""Metrics of pairs by hand: means, groups, ties, how margins go with length, and calibration."""

import math

import numpy as np
import pytest
import torch

from notus.evaluation.intervals import bootstrap_mean, wilson
from notus.evaluation.preferences.metrics import (
    Rewards,
    best_scale,
    by_length,
    by_longer,
    by_source,
    calibration,
    compare,
    length_bias,
    measures,
    preference_metrics,
)

POLICY = torch.tensor([[-1.0, -3.0], [-2.0, -2.0], [-4.0, -1.0]])
BASE = torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [-1.0, -2.0]])
LENGTHS = torch.tensor([[1, 2], [2, 4], [1, 1]])


def test_log_probs_summed_and_per_token():
    found = preference_metrics(measures(POLICY, None, LENGTHS, None), None)
    assert found == pytest.approx(
        {
            "logps/chosen": -7 / 3,
            "logps/rejected": -2.0,
            "logps/margins": (2 + 0 - 3) / 3,
            "logps/accuracies": (1 + 0.5 + 0) / 3,  # the tie counts half
            # per token: chosen -1, -1, -4; rejected -1.5, -0.5, -1
            "logps_per_token/chosen": -2.0,
            "logps_per_token/rejected": -1.0,
            "logps_per_token/margins": -1.0,
            "logps_per_token/accuracies": 1 / 3,
        }
    )


def test_rewards_against_a_base():
    rewards = Rewards(0.5)
    found = preference_metrics(measures(POLICY, BASE, LENGTHS, rewards), rewards)
    # log-ratios: chosen 1, 0, -3; rejected -1, 0, 1; margins of the rewards 1, 0, -2
    assert found["rewards/chosen"] == pytest.approx(0.5 * -2 / 3)
    assert found["rewards/rejected"] == pytest.approx(0.0)
    assert found["rewards/margins"] == pytest.approx((1 + 0 - 2) / 3)
    assert found["rewards/accuracies"] == pytest.approx((1 + 0.5 + 0) / 3)
    losses = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(2))]
    assert found["loss"] == pytest.approx(sum(losses) / 3)
    assert found["logps/margins"] == pytest.approx(-1 / 3)


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


NINE = math.log(9)  # σ of it is 0.9
THREE = math.log(3)  # 0.75


def test_bins_errors_and_scores():
    found = calibration(np.array([NINE, NINE, -NINE, THREE, 0.0]), beta=0.1)
    low, middle, high = found["bins"]
    # the tie: confidence 1/2, right by half
    assert (low["low"], low["count"], low["confidence"], low["frequency"]) == (0.5, 1, 0.5, 0.5)
    assert (middle["confidence"], middle["frequency"]) == pytest.approx((0.75, 1.0))
    assert middle["low"] <= 0.75 <= middle["high"] == pytest.approx(middle["low"] + 0.05)
    # three pairs at 0.9, in one of which the model prefers the rejected
    assert (high["count"], high["confidence"], high["frequency"]) == pytest.approx((3, 0.9, 2 / 3))
    assert high["interval"] == wilson(2, 3)
    assert found["ece"] == pytest.approx((1 * 0 + 1 * 0.25 + 3 * (0.9 - 2 / 3)) / 5)
    assert found["brier"] == pytest.approx((0.01 + 0.01 + 0.81 + 0.0625 + 0.25) / 5)


def test_groups_of_equal_size_by_confidence():
    margins = np.array([0.1 * (i + 1) * (-1 if i < 6 else 1) for i in range(40)])  # the six least sure are wrong
    groups = calibration(margins[np.random.default_rng(0).permutation(40)], beta=0.1)["quantiles"]
    assert [group["count"] for group in groups] == [10, 10, 10, 10]  # at least ten pairs each
    assert [group["frequency"] for group in groups] == [0.4, 1.0, 1.0, 1.0]
    means = [np.mean([1 / (1 + np.exp(-0.1 * (i + 1))) for i in range(start, start + 10)]) for start in (0, 10, 20, 30)]
    assert [group["confidence"] for group in groups] == pytest.approx(means)
    assert groups[0]["low"] == pytest.approx(1 / (1 + np.exp(-0.1)))
    (tied,) = calibration(np.full(40, 0.5), beta=0.1)["quantiles"]  # equal ones are never divided
    assert (tied["count"], tied["frequency"]) == (40, 1.0)


def test_certainty_falls_into_the_last_bin():
    (only,) = calibration(np.array([800.0, 900.0]), beta=0.1)["bins"]
    assert (only["low"], only["high"], only["count"], only["confidence"]) == (0.95, 1.0, 2, 1.0)


def test_a_calibrated_model_has_no_error_and_the_best_beta():
    margins = np.array([NINE] * 9 + [-NINE] + [THREE] * 3 + [-THREE])
    found = calibration(margins, beta=0.1)
    assert found["ece"] == pytest.approx(0, abs=1e-12)
    assert found["best_beta"] == pytest.approx(0.1)
    entropy = -(9 * math.log(0.9) + math.log(0.1) + 3 * math.log(0.75) + math.log(0.25)) / 14
    assert found["best_loss"] == pytest.approx(entropy)


def test_both_orders_of_each_pair_give_the_same_figures():
    margins = np.random.default_rng(0).normal(0.5, 1.0, 400)
    probabilities = 1 / (1 + np.exp(-np.concatenate([margins, -margins])))
    outcomes = np.repeat([1.0, 0.0], 400)
    bins = np.floor(probabilities * 20)
    ece = sum((bins == b).mean() * abs((outcomes - probabilities)[bins == b].mean()) for b in np.unique(bins))
    found = calibration(margins, beta=1.0)
    assert found["ece"] == pytest.approx(ece)
    assert found["brier"] == pytest.approx(((outcomes - probabilities) ** 2).mean())


def test_best_scale():
    # three of four right by the same margin 2: σ(2 s) = 3/4
    assert best_scale(np.array([2.0, 2.0, 2.0, -2.0])) == pytest.approx(THREE / 2)
    assert best_scale(1e-6 * np.array([2.0, 2.0, 2.0, -2.0])) == pytest.approx(1e6 * THREE / 2)
    assert best_scale(1e6 * np.array([2.0, 2.0, 2.0, -2.0])) == pytest.approx(1e-6 * THREE / 2)
    assert best_scale(np.array([1.0, -1.0])) == 0.0
    assert best_scale(np.array([1.0, -2.0])) == 0.0
    assert best_scale(np.array([0.0, 0.0])) == 0.0
    assert best_scale(np.array([1.0, 0.0])) is None


def test_limits_of_the_best_beta():
    assert calibration(np.array([1.0, -2.0]), beta=0.1)["best_loss"] == pytest.approx(math.log(2))
    certain = calibration(np.array([1.0, 2.0]), beta=0.1)
    assert (certain["best_beta"], certain["best_loss"]) == (None, 0.0)
    tied = calibration(np.array([1.0, 0.0, 2.0, 0.0]), beta=0.1)
    assert tied["best_beta"] is None
    assert tied["best_loss"] == pytest.approx(math.log(2) / 2)


def test_pairs_of_one_prompt_count_as_one_trial():
    """Each pair four times within its prompt: the same means, and no surer than before."""
    prompts, many = np.repeat(np.arange(4), 4), np.repeat(MARGINS, 4)
    once, found = compare(MARGINS), compare(many, prompts)
    assert found["count"] == 16
    for name in ("accuracy", "margin", "accuracy_stderr", "margin_stderr", "margin_interval"):
        assert found[name] == pytest.approx(once[name]), name
    low, high = found["accuracy_interval"]
    assert 0 <= low < 0.625 < high <= 1
    naive = compare(many)
    assert naive["margin_stderr"] < 0.6 * found["margin_stderr"]


def test_clusters_of_different_sizes_by_hand():
    # right 2 of 3, 2 of 2, half of 1: 0.75 of six; residuals -0.25, 0.5, -0.25 over the mean size of 2
    margins, prompts = np.array([-1.0, 1, 2, 1, 2, 0]), np.array([0, 0, 0, 1, 1, 2])
    found = compare(margins, prompts)
    assert found["accuracy"] == 0.75
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt((2 * 0.125**2 + 0.25**2) / 2 / 3))


def test_where_all_prompts_agree_the_share_is_as_sure_as_their_number():
    found = compare(np.ones(12), np.repeat(np.arange(3), 4))
    assert found["accuracy_interval"] == wilson(3, 3)
    alone = compare(np.ones(4), np.zeros(4, dtype=int))
    assert (alone["accuracy_interval"], alone["margin_stderr"], alone["margin_interval"]) == (wilson(1, 1), None, None)


def test_calibration_and_length_bias_over_prompts():
    generator = np.random.default_rng(0)
    margins, lengths = generator.normal(size=40), generator.integers(1, 30, size=(40, 2))
    prompts = np.arange(40)
    own, clustered = calibration(margins, 0.1), calibration(margins, 0.1, prompts)
    assert [entry["frequency"] for entry in own["bins"]] == [entry["frequency"] for entry in clustered["bins"]]
    once = length_bias(margins, lengths, prompts)
    four = length_bias(np.repeat(margins, 4), np.repeat(lengths, 4, axis=0), np.repeat(prompts, 4))
    for name in ("slope_per_token", "slope_stderr", "pearson"):
        assert four[name] == pytest.approx(once[name]), name
    classic = length_bias(margins, lengths)
    assert once["slope_stderr"] == pytest.approx(classic["slope_stderr"], rel=0.3)


def test_rewards_are_those_of_the_loss():
    relative, summed = Rewards(0.5), Rewards(0.5, relative=False)
    per_token = Rewards(2.0, relative=False, per_token=True)
    assert relative(POLICY, BASE, LENGTHS).tolist() == [[0.5, -0.5], [0.0, 0.0], [-1.5, 0.5]]
    assert summed(POLICY, BASE, LENGTHS).tolist() == [[-0.5, -1.5], [-1.0, -1.0], [-2.0, -0.5]]
    assert per_token(POLICY, BASE, LENGTHS).tolist() == [[-2.0, -3.0], [-2.0, -1.0], [-8.0, -2.0]]
    assert "the base's" in relative.formula
    assert per_token.formula == "beta * log-prob per token, without the base"


def test_rewards_without_a_reference_leave_the_base_to_comparison():
    rewards = Rewards(2.0, relative=False, per_token=True)
    measured = measures(POLICY, BASE, LENGTHS, rewards)
    assert list(measured) == ["rewards", "logps", "logps_per_token", "logps_change"]
    assert measured["logps_change"].tolist() == [[1.0, -1.0], [0.0, 0.0], [-3.0, 1.0]]
    found = preference_metrics(measured, rewards)
    assert found["rewards/accuracies"] == found["logps_per_token/accuracies"]
    assert found["rewards/margins"] == pytest.approx(2 * found["logps_per_token/margins"])
    assert "loss" not in found  # of a difference to the base, which was not trained


def test_a_missing_completion_has_no_log_prob_per_token():
    measured = measures(torch.tensor([[-4.0, 0.0]]), None, torch.tensor([[2, 0]]), None)
    assert measured["logps_per_token"].tolist() == [[-2.0, 0.0]]
