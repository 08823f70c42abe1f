"""Where a model prefers the chosen completions: by source, by length, and how far length itself decides.

Throughout, `margins` [n] are what pairs are ranked by (reward or log-prob of the chosen minus that of the rejected),
and `lengths` int [n, 2] the completion tokens of chosen and rejected.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from notus.evaluation.intervals import bootstrap_mean, wilson


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


def stderr(values: np.ndarray) -> float | None:
    """The standard error of the mean of `values` [n]; None for one value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


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
