"""How sure a figure is: confidence intervals of shares and of means; imports no torch."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson(wins: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, doi 10.1214/ss/1009213286).

    Unlike p ± z·stderr it stays within 0 and 1, and holds its level for few examples and shares near either end.

    Args:
        wins: successes; a tie may count half.
        count: trials; of 0 nothing is known, so the interval is (0, 1).
        level: the share of such intervals that cover the true share.
    """
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, shrink = wins / count, z * z / count
    centre = (share + shrink / 2) / (1 + shrink)
    half = z / (1 + shrink) * math.sqrt(share * (1 - share) / count + shrink / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, seed: int = 0, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """The percentile bootstrap's interval of a mean (Efron 1979, doi 10.1214/aos/1176344552); of one value, itself.

    Args:
        values: [n], at least one.
        seed: of the resampling.
        level: the share of resampled means within the interval.
        draws: how often `values` are drawn anew, with replacement.
    """
    values = np.asarray(values, dtype=np.float64)
    assert len(values) > 0
    generator = np.random.default_rng(seed)
    at_once = max(1, 2**18 // len(values))
    blocks = (min(at_once, draws - start) for start in range(0, draws, at_once))
    means = [values[generator.integers(len(values), size=(block, len(values)))].mean(axis=1) for block in blocks]
    low, high = np.quantile(np.concatenate(means), [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)
