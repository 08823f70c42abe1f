"""What log-probs of pairs say of a model: metrics, breakdowns by source and length, and calibration.

Throughout, `margins` [n] are what pairs are ranked by (reward or log-prob of the chosen minus that of the rejected),
and `lengths` int [n, 2] the completion tokens of chosen and rejected.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from notus.evaluation.intervals import bootstrap_mean, stderr, wilson
from notus.losses import dpo_loss

BINS = 10


def preference_metrics(policy: Tensor, base: Tensor | None, lengths: Tensor, *, beta: float | None) -> dict[str, float]:
    """Means over pairs of what a model makes of the chosen and the rejected completions.

    Args:
        policy: [n, 2] summed log-probs of (chosen, rejected) under the model, in nats.
        base: [n, 2] the same under the base; None: there is none.
        lengths: [n, 2] completion tokens.
        beta: the scale of the rewards; None without a base.

    Returns:
        For each measure `<measure>/chosen`, `/rejected`, `/margins` (chosen - rejected) and `/accuracies`
        (share of pairs with a positive margin, a tie counting half). The measures are `logps` (summed),
        `logps_per_token` and, with a base, `rewards`, β·(policy - base), beside which stands `loss`, the mean
        sigmoid DPO loss.
    """
    policy = policy.double()
    measures = {"logps": policy, "logps_per_token": policy / lengths}
    metrics: dict[str, float] = {}
    if base is not None:
        assert beta is not None, "rewards need a beta"
        losses, chosen, rejected = dpo_loss(*policy.unbind(1), *base.double().unbind(1), beta=beta)
        metrics["loss"] = losses.mean().item()
        measures = {"rewards": torch.stack([chosen, rejected], dim=1), **measures}
    for name, values in measures.items():
        of_chosen, of_rejected = values.unbind(1)
        margins = of_chosen - of_rejected
        metrics[f"{name}/chosen"] = of_chosen.mean().item()
        metrics[f"{name}/rejected"] = of_rejected.mean().item()
        metrics[f"{name}/margins"] = margins.mean().item()
        metrics[f"{name}/accuracies"] = (0.5 * (1 + margins.sign())).mean().item()
    return metrics


def compare(margins: np.ndarray) -> dict[str, Any]:
    """Of some pairs: `count`, `accuracy` (a tie counts half) and the mean `margin`, how sure both are.

    That is `accuracy_interval` (Wilson's) and `margin_interval` (the bootstrap's), of 95%, and the standard errors
    `accuracy_stderr` and `margin_stderr`. One pair has the first of these alone; the others are None.
    """
    right = 0.5 * (1 + np.sign(margins))
    return {
        "count": len(margins),
        "accuracy": float(right.mean()),
        "accuracy_stderr": stderr(right),
        "accuracy_interval": wilson(float(right.sum()), len(margins)),
        "margin": float(margins.mean()),
        "margin_stderr": stderr(margins),
        "margin_interval": bootstrap_mean(margins),
    }


def by_source(margins: np.ndarray, sources: Sequence[str]) -> list[dict[str, Any]]:
    """`source` and its `compare`, the source of the most pairs first."""
    names, numbers = np.unique(np.asarray(sources, dtype=object), return_inverse=True)
    found = [{"source": str(name), **compare(margins[numbers == number])} for number, name in enumerate(names)]
    return sorted(found, key=lambda row: -row["count"])


def by_length(margins: np.ndarray, lengths: np.ndarray) -> list[dict[str, Any]]:
    """By the tokens of chosen and rejected together, in buckets that double: `low`, `high` (included), `compare`.

    Empty buckets are left out.
    """
    powers = np.frexp(lengths.sum(axis=1))[1] - 1  # exact where a logarithm rounds
    return [
        {"low": 2 ** int(power), "high": 2 ** (int(power) + 1) - 1, **compare(margins[powers == power])}
        for power in np.unique(powers)
    ]


def by_longer(margins: np.ndarray, lengths: np.ndarray) -> list[dict[str, Any]]:
    """By which completion has more tokens: `longer` ("chosen", "rejected", "neither") and its `compare`; none empty."""
    signs = np.sign(lengths[:, 0] - lengths[:, 1])
    names = {1: "chosen", -1: "rejected", 0: "neither"}
    return [
        {"longer": name, **compare(margins[signs == sign])} for sign, name in names.items() if (signs == sign).any()
    ]


def length_bias(margins: np.ndarray, lengths: np.ndarray) -> dict[str, float] | None:
    """How the margin goes with the length difference d, chosen minus rejected, in tokens.

    Returns:
        `pearson` and `spearman` correlation of margin and d; `slope_per_token` and `margin_at_equal_length` of the
        least-squares line margin = margin_at_equal_length + slope_per_token · d; `slope_stderr`, its standard error.
        None for fewer than three pairs, or where all d or all margins are equal.
    """
    difference = (lengths[:, 0] - lengths[:, 1]).astype(np.float64)
    if len(margins) < 3 or np.ptp(difference) == 0 or np.ptp(margins) == 0:
        return None
    centred = difference - difference.mean()
    spread = float(centred @ centred)
    slope = float(centred @ margins) / spread
    start = float(margins.mean() - slope * difference.mean())
    residual = margins - start - slope * difference
    return {
        "pearson": _correlation(margins, difference),
        "spearman": _correlation(_ranks(margins), _ranks(difference)),
        "slope_per_token": slope,
        "slope_stderr": math.sqrt(float(residual @ residual) / (len(margins) - 2) / spread),
        "margin_at_equal_length": start,
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[numbers]


def calibration(margins: np.ndarray, beta: float) -> dict[str, Any]:
    """Is a model as sure of the chosen completions as it is right? Compare σ(reward margin) with what happens.

    DPO's model of preferences (Bradley-Terry; Rafailov et al. 2305.18290, eq. 6) says that A is preferred to B with
    probability σ(reward of A - reward of B). Which completion is called A decides nothing, so each pair counts once,
    with A the one that the model prefers: its probability, the confidence, is at least 1/2, and the frequency with
    which A is the chosen one should equal it. (With A drawn at random, or each pair in both orders, bins mirror each
    other about (1/2, 1/2), and every figure is the same.)

    Args:
        margins: [n] reward margins.
        beta: the rewards are β times the log-ratios.

    Returns:
        `bins`: of ten equal ones between 1/2 and 1 those that hold pairs, each with `low`, `high`, `count`, mean
            `confidence`, `frequency` of the preferred being the chosen (a tie counts half) and its 95% `interval`.
        `ece`: the expected calibration error, mean |frequency - confidence| over pairs (Guo et al. 1706.04599, eq. 3);
            noise alone makes it more than 0.
        `brier`: the mean (1 - σ(margin))² (Brier 1950): 0.25 for a model that prefers nothing.
        `best_beta`: the β whose margins would give these pairs the highest likelihood, which a model that is too sure
            has below its own (temperature scaling, the same paper, section 4.2: the temperature is β / best_beta). 0 if
            the margins do not say which is chosen; None, no finite one, if all do.
        `best_loss`: the mean -log σ(margin) at that β; a tie gives ln 2 at any, so in the two limits ln 2, and ln 2
            times the share of ties.
    """
    right = 0.5 * (1 + np.sign(margins))
    confidence = _sigmoid(np.abs(margins))
    numbers = np.minimum((confidence - 0.5) * 2 * BINS, BINS - 1).astype(int)
    bins = [_bin(int(number), right[numbers == number], confidence[numbers == number]) for number in np.unique(numbers)]
    gaps = [entry["count"] * abs(entry["frequency"] - entry["confidence"]) for entry in bins]
    scale = best_scale(margins)
    if scale is None:  # the limit: a tie alone has a loss
        best_loss = math.log(2) * float(np.mean(margins == 0))
    else:
        best_loss = float(np.mean(np.logaddexp(0, -scale * margins)))
    return {
        "bins": bins,
        "ece": sum(gaps) / len(margins),
        "brier": float(np.mean((1 - _sigmoid(margins)) ** 2)),
        "best_beta": None if scale is None else beta * scale,
        "best_loss": best_loss,
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
