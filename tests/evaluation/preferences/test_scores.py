"""Preference metrics by hand."""

import math

import pytest
import torch

from notus.evaluation.preferences.scores import preference_metrics

POLICY = torch.tensor([[-1.0, -3.0], [-2.0, -2.0], [-4.0, -1.0]])
BASE = torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [-1.0, -2.0]])
LENGTHS = torch.tensor([[1, 2], [2, 4], [1, 1]])


def test_log_probs_summed_and_per_token():
    found = preference_metrics(POLICY, None, LENGTHS, beta=None)
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
    found = preference_metrics(POLICY, BASE, LENGTHS, beta=0.5)
    # log-ratios: chosen 1, 0, -3; rejected -1, 0, 1; margins of the rewards 1, 0, -2
    assert found["rewards/chosen"] == pytest.approx(0.5 * -2 / 3)
    assert found["rewards/rejected"] == pytest.approx(0.0)
    assert found["rewards/margins"] == pytest.approx((1 + 0 - 2) / 3)
    assert found["rewards/accuracies"] == pytest.approx((1 + 0.5 + 0) / 3)
    losses = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(2))]
    assert found["loss"] == pytest.approx(sum(losses) / 3)
    assert found["logps/margins"] == pytest.approx(-1 / 3)
