"""Completions with labels by hand: means, AUC with ties and its standard error, accuracy about zero."""

import numpy as np
import pytest
import torch

from notus.evaluation.intervals import wilson
from notus.evaluation.preferences.labels import (
    auc,
    auc_stderr,
    check_labels,
    compare_labels,
    label_metrics,
    labels_by_length,
    labels_by_source,
)

VALUES = np.array([3.0, -1.0, 1.0, 1.0, 0.0])
LABELS = np.array([True, False, True, False, True])  # good 3, 1, 0; bad -1, 1


def test_auc_counts_pairs_and_half_of_ties():
    # 3 above both; 1 above -1 and level with 1; 0 above -1 alone
    assert auc(VALUES, LABELS) == pytest.approx((2 + 1.5 + 1) / 6)
    assert auc(-VALUES, LABELS) == pytest.approx(1 - 4.5 / 6)
    assert auc(VALUES, ~LABELS) == pytest.approx(1 - 4.5 / 6)
    assert auc(np.zeros(5), LABELS) == 0.5


def test_auc_of_many_is_the_share_of_pairs():
    generator = np.random.default_rng(0)
    values, labels = generator.integers(0, 20, size=300).astype(float), generator.random(300) < 0.3
    differences = values[labels][:, None] - values[~labels][None, :]
    assert auc(values, labels) == pytest.approx((0.5 * (1 + np.sign(differences))).mean())


def test_auc_stderr_by_hand():
    # shares of bad ones below 3, 1, 0: 1, 3/4, 1/2, variance 1/16; of good ones below -1, 1: 0, 1/2, variance 1/8
    assert auc_stderr(VALUES, LABELS) == pytest.approx(np.sqrt(1 / 16 / 3 + 1 / 8 / 2))
    assert auc_stderr(VALUES[:3], LABELS[:3]) is None


def test_auc_stderr_is_the_spread_of_repeated_draws():
    generator = np.random.default_rng(1)
    labels = np.arange(120) < 50
    draws = [generator.normal(size=120) + labels for _ in range(400)]
    found = np.array([auc(values, labels) for values in draws])
    expected = np.mean([auc_stderr(values, labels) for values in draws])
    assert found.std() == pytest.approx(expected, rel=0.1)


def test_metrics_of_every_measure():
    column = torch.from_numpy(VALUES)[:, None]
    found = label_metrics({"rewards": column, "logps": column - 2}, LABELS, threshold=True)
    assert found == pytest.approx(
        {
            "rewards/good": 4 / 3,
            "rewards/bad": 0.0,
            "rewards/margins": 4 / 3,
            "rewards/auc": 0.75,
            "rewards/accuracies": (1 + 1 + 1 + 0 + 0.5) / 5,
            "logps/good": 4 / 3 - 2,
            "logps/bad": -2.0,
            "logps/margins": 4 / 3,
            "logps/auc": 0.75,
        }
    )


def test_compared_with_and_without_a_threshold():
    found = compare_labels(VALUES, LABELS, threshold=True)
    assert (found["count"], found["good_count"], found["bad_count"]) == (5, 3, 2)
    assert (found["accuracy"], found["accuracy_interval"]) == (0.7, wilson(3.5, 5))
    assert found["margin"] == pytest.approx(4 / 3)
    # variances 7/3 of good and 2 of bad
    assert found["margin_stderr"] == pytest.approx(np.sqrt(7 / 3 / 3 + 2 / 2))
    low, high = found["margin_interval"]
    assert (low + high) / 2 == pytest.approx(4 / 3)
    assert 0 <= found["auc_interval"][0] < 0.75 < found["auc_interval"][1] <= 1
    found = compare_labels(VALUES, LABELS, threshold=False)
    assert (found["accuracy"], found["accuracy_interval"], found["auc"]) == (None, None, 0.75)


def test_one_label_alone_cannot_be_told_from_the_other():
    found = compare_labels(VALUES[LABELS], LABELS[LABELS], threshold=True)
    assert (found["good"], found["bad"], found["auc"], found["margin"]) == (pytest.approx(4 / 3), None, None, None)
    assert found["accuracy"] == pytest.approx(2.5 / 3)


def test_perfect_separation_is_not_certain():
    found = compare_labels(np.array([1.0, 2.0, -1.0, -2.0]), np.array([True, True, False, False]), threshold=True)
    assert (found["auc"], found["auc_stderr"]) == (1.0, 0.0)
    assert found["auc_interval"] == wilson(2, 2)


def test_parts():
    by_source = labels_by_source(VALUES, LABELS, ["b", "a", "a", "b", "a"], threshold=True)
    assert [(row["source"], row["count"], row["auc"]) for row in by_source] == [("a", 3, 1.0), ("b", 2, 1.0)]
    by_length = labels_by_length(VALUES, LABELS, np.array([1, 2, 3, 3, 4]), threshold=True)
    assert [(row["low"], row["high"], row["count"]) for row in by_length] == [(1, 1, 1), (2, 3, 3), (4, 7, 1)]


@pytest.mark.parametrize(("labels", "word"), [([True, True], "good"), ([False], "bad")])
def test_one_kind_alone_is_an_error(labels, word):
    with pytest.raises(ValueError, match=f"completions are {word}"):
        check_labels(np.array(labels))
