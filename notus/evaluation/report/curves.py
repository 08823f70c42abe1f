"""Curves made ready to draw: few enough points to keep the file small, and a calm line through noisy ones."""

import itertools

import numpy as np

from notus.evaluation.report.reading import Curve

MAX_POINTS = 1_500
SMOOTHED_FROM = 12  # points; fewer show their course by themselves
SMOOTHED_SHARE = 0.05  # of the points, on either side together


def decimate(curve: Curve, limit: int = MAX_POINTS) -> Curve:
    """At most `limit` (4 or more) of a curve's own points: the first, the last, and each stretch's least and greatest.

    Stretches without a finite value keep a gap of one point.
    """
    count = len(curve.steps)
    if count <= limit:
        return curve
    bounds = np.linspace(1, count - 1, (limit - 2) // 2 + 1).astype(int)
    kept = {0, count - 1}
    for start, end in itertools.pairwise(bounds):
        values = curve.values[start:end]
        if np.isnan(values).all():
            kept.add(int(start))
        else:
            kept |= {int(start + np.nanargmin(values)), int(start + np.nanargmax(values))}
    order = sorted(kept)
    return Curve(curve.steps[order], curve.values[order])


def smooth(curve: Curve) -> Curve | None:
    """The centred moving mean over `SMOOTHED_SHARE` of the points, narrower at the start; None for a short curve."""
    count = len(curve.steps)
    if count < SMOOTHED_FROM:
        return None
    half = max(1, round(count * SMOOTHED_SHARE / 2))
    known = np.isfinite(curve.values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, curve.values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(count)
    reach = np.minimum(half, at)  # the start is shown as it is: there a run moves fastest, and ln 2 is to be seen
    low, high = at - reach, np.minimum(at + reach, count - 1) + 1
    seen = counts[high] - counts[low]
    values = np.divide(sums[high] - sums[low], seen, out=np.full(count, np.nan), where=seen > 0)
    return Curve(curve.steps, values)
