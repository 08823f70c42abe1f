"""Is a model as sure of the chosen completions as it is right? σ(reward margin) against what happens.

DPO's model of preferences (Bradley-Terry; Rafailov et al. 2305.18290, eq. 6) says that A is preferred to B with
probability σ(reward of A - reward of B). Held-out pairs tell whether that is so. Which completion is called A decides
nothing, so each pair counts once, with A the one that the model prefers: its probability, the confidence, is at least
1/2, and the frequency with which A is the chosen one should equal it. (With A drawn at random, or each pair in both
orders, bins mirror each other about (1/2, 1/2), and every figure is the same.)
"""

import math
from typing import Any

import numpy as np

from notus.evaluation.intervals import wilson

BINS = 10


def calibration(margins: np.ndarray, beta: float) -> dict[str, Any]:
    """Reliability of reward margins [n], rewards being β times the log-ratios.

    Returns:
        `bins`: of ten equal ones between 1/2 and 1 those that hold pairs, each with `low`, `high`, `count`, mean
            `confidence`, `frequency` of the preferred being the chosen (a tie counts half) and its 95% `interval`.
        `ece`: the expected calibration error, mean |frequency - confidence| over pairs (Guo et al. 1706.04599, eq. 3);
            noise alone makes it more than 0.
        `brier`: the mean (1 - σ(margin))² (Brier 1950): 0.25 for a model that prefers nothing.
        `best_beta`: the β whose margins would give these pairs the highest likelihood, which a model that is too sure
            has below its own (temperature scaling, the same paper, section 4.2: the temperature is β / best_beta). 0 if
            the margins do not tell which is chosen; None, no finite one, if all do.
        `best_loss`: the mean -log σ(margin) at that β; a tie gives ln 2 at any, so in the two limits ln 2, and ln 2
            times the share of ties.
    """
    right = 0.5 * (1 + np.sign(margins))
    confidence = _sigmoid(np.abs(margins))
    numbers = np.minimum((confidence - 0.5) * 2 * BINS, BINS - 1).astype(int)
    bins = [_bin(int(number), right[numbers == number], confidence[numbers == number]) for number in np.unique(numbers)]
    gaps = [entry["count"] * abs(entry["frequency"] - entry["confidence"]) for entry in bins]
    scale = best_scale(margins)
    return {
        "bins": bins,
        "ece": sum(gaps) / len(margins),
        "brier": float(np.mean((1 - _sigmoid(margins)) ** 2)),
        "best_beta": None if scale is None else beta * scale,
        "best_loss": _loss_at(scale, margins),
    }


def _bin(number: int, right: np.ndarray, confidence: np.ndarray) -> dict[str, Any]:
    return {
        "low": 0.5 + number / (2 * BINS),
        "high": 0.5 + (number + 1) / (2 * BINS),
        "count": len(right),
        "confidence": float(confidence.mean()),
        "frequency": float(right.mean()),
        "interval": wilson(float(right.sum()), len(right)),
    }


def _loss_at(scale: float | None, margins: np.ndarray) -> float:
    if scale is None:
        return math.log(2) * float(np.mean(margins == 0))
    return float(np.mean(np.logaddexp(0, -scale * margins)))


def best_scale(margins: np.ndarray) -> float | None:
    """The s ≥ 0 that maximises the mean of log σ(s · margin), by bisection of its falling derivative.

    0 where the mean margin is not above 0; None where no margin is below 0, so that the more the better.
    """
    if margins.mean() <= 0:
        return 0.0
    if margins.min() >= 0:
        return None
    unit = np.abs(margins).max()
    scaled = margins / unit

    def rises(scale: float) -> bool:
        return bool(np.mean(scaled * _sigmoid(-scale * scaled)) > 0)

    low, high = 0.0, 1.0
    while rises(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) else (low, middle)
    return float((low + high) / 2 / unit)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -values))
