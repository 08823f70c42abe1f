"""Calibration by hand."""

import math

import numpy as np
import pytest

from notus.evaluation.intervals import wilson
from notus.evaluation.preferences.calibration import best_scale, calibration

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
    told = calibration(np.array([1.0, 2.0]), beta=0.1)
    assert (told["best_beta"], told["best_loss"]) == (None, 0.0)
    tied = calibration(np.array([1.0, 0.0, 2.0, 0.0]), beta=0.1)
    assert tied["best_beta"] is None
    assert tied["best_loss"] == pytest.approx(math.log(2) / 2)
