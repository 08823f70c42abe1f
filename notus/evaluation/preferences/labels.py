"""How well a model separates good completions from bad ones, where each has a label and no partner."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from notus.evaluation.intervals import share_interval, stderr, student, wilson
from notus.evaluation.preferences.metrics import bucket, doubling_buckets, ranks


def label_metrics(measured: dict[str, Tensor], labels: np.ndarray, *, threshold: bool) -> dict[str, float]:
    """Means over good and bad completions.

    Args:
        measured: [n, 1] by measure; see `metrics.measures`.
        labels: bool [n], true for good; both must occur.
        threshold: whether 0 parts good rewards from bad ones; see `compare_labels`.

    Returns:
        For each measure `<measure>/good` and `/bad`, means; `/margins`, good - bad; `/auc`, see `auc`. Of rewards with
        a threshold also `/accuracies`.
    """
    found: dict[str, float] = {}
    for name, column in measured.items():
        values = column[:, 0].numpy()
        good, bad = float(values[labels].mean()), float(values[~labels].mean())
        found |= {f"{name}/good": good, f"{name}/bad": bad, f"{name}/margins": good - bad}
        found[f"{name}/auc"] = auc(values, labels)
        if name == "rewards" and threshold:
            found["rewards/accuracies"] = float(_right(values, labels).mean())
    return found


def check_labels(labels: np.ndarray | None) -> np.ndarray:
    """Return the labels of rows, bool [n]. Raises ValueError unless good and bad ones are among them."""
    assert labels is not None, "rows of labels have some"
    if labels.all() or not labels.any():
        raise ValueError(
            f"all {len(labels)} completions are {'good' if labels.all() else 'bad'}: add some of the other label"
        )
    return labels


def compare_labels(values: np.ndarray, labels: np.ndarray, *, threshold: bool) -> dict[str, Any]:
    """Compare the values [n] of good and bad completions.

    Returns `count`, of which `good_count` and `bad_count`; the means `good` and `bad`; `auc`, `margin`, `accuracy`.
    `margin` is good - bad, with Welch's interval. `accuracy` is the share of good completions with a positive value and
    bad ones with a negative one (0 counts half); None unless 0 is a `threshold`, as it is for rewards relative to a
    base. Each of the three has its `_stderr` and 95% `_interval`. What needs both labels is None without them.
    """
    good, bad = values[labels], values[~labels]
    right = _right(values, labels)
    both = bool(len(good) and len(bad))
    found = {
        "count": len(values),
        "good_count": len(good),
        "bad_count": len(bad),
        "good": float(good.mean()) if len(good) else None,
        "bad": float(bad.mean()) if len(bad) else None,
        "accuracy": float(right.mean()) if threshold else None,
        "accuracy_stderr": stderr(right) if threshold else None,
        "accuracy_interval": wilson(float(right.sum()), len(values)) if threshold else None,
    }
    return {**found, **(_separation(good, bad) if both else dict.fromkeys(_SEPARATION))}


_SEPARATION = ("auc", "auc_stderr", "auc_interval", "margin", "margin_stderr", "margin_interval")


def _separation(good: np.ndarray, bad: np.ndarray) -> dict[str, Any]:
    values, labels = np.concatenate([good, bad]), np.repeat([True, False], [len(good), len(bad)])
    area, error = auc(values, labels), auc_stderr(values, labels)
    margin = float(good.mean() - bad.mean())
    of_good, of_bad = stderr(good), stderr(bad)
    spread, interval = None, None
    if of_good is not None and of_bad is not None:
        spread = float(np.hypot(of_good, of_bad))
        freedom = min(len(good), len(bad)) - 1  # the cautious choice, where Welch's lies above it
        interval = (margin - student(freedom) * spread, margin + student(freedom) * spread)
    return {
        "auc": area,
        "auc_stderr": error,
        "auc_interval": share_interval(area, error, min(len(good), len(bad))),
        "margin": margin,
        "margin_stderr": spread,
        "margin_interval": interval,
    }


def labels_by_source(
    values: np.ndarray, labels: np.ndarray, sources: Sequence[str], *, threshold: bool
) -> list[dict[str, Any]]:
    """`source` and its `compare_labels`, the source of the most completions first."""
    names, numbers = np.unique(np.asarray(sources, dtype=object), return_inverse=True)
    parts = [numbers == number for number in range(len(names))]
    found = [
        {"source": str(name), **compare_labels(values[part], labels[part], threshold=threshold)}
        for name, part in zip(names, parts, strict=True)
    ]
    return sorted(found, key=lambda row: -row["count"])


def labels_by_length(
    values: np.ndarray, labels: np.ndarray, lengths: np.ndarray, *, threshold: bool
) -> list[dict[str, Any]]:
    """By the tokens of the completion, int [n], in buckets that double: `low`, `high` (included), `compare_labels`."""
    powers = doubling_buckets(lengths)
    return [
        {**bucket(power), **compare_labels(values[powers == power], labels[powers == power], threshold=threshold)}
        for power in np.unique(powers)
    ]


def auc(values: np.ndarray, labels: np.ndarray) -> float:
    """Return the probability that a good completion has a higher value than a bad one; a tie counts half.

    That is Mann and Whitney's U over the number of pairs, the area under the ROC curve (Hanley and McNeil 1982).
    """
    good = int(labels.sum())
    above = float(ranks(values)[labels].sum()) - good * (good + 1) / 2
    return above / (good * (len(values) - good))


def auc_stderr(values: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the standard error of `auc`; None unless there are two of each label.

    From the spread, over good completions, of the share of bad ones below, and the reverse (DeLong et al. 1988,
    doi 10.2307/2531595).
    """
    good, bad = values[labels], values[~labels]
    if min(len(good), len(bad)) < 2:
        return None
    variance = float(np.var(_share_below(good, bad), ddof=1)) / len(good)
    variance += float(np.var(_share_below(bad, good), ddof=1)) / len(bad)
    return float(np.sqrt(variance))


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value, the share of the others that are less; equal ones count half."""
    ordered = np.sort(others)
    less, not_more = (np.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (less + not_more) / (2 * len(others))


def _right(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 for good completions with a positive value and bad ones with a negative one, 1/2 for 0."""
    return 0.5 * (1 + np.sign(np.where(labels, values, -values)))
