"""How sure a figure is: confidence intervals of shares and of means; imports no torch."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson(wins: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, doi 10.1214/ss/1009213286).

    Unlike p ± z·stderr it stays within 0 and 1, and holds its level for few examples and shares near either end.

    Args:
        wins: successes; a tie may count half.
        count: trials; of 0 nothing is known, so the interval is (0, 1).
        level: the share of such intervals that cover the true share.
    """
    if count == 0:
        return 0.0, 1.0
    z = normal(level)
    share, shrink = wins / count, z * z / count
    centre = (share + shrink / 2) / (1 + shrink)
    half = z / (1 + shrink) * math.sqrt(share * (1 - share) / count + shrink / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, seed: int = 0, level: float = 0.95, draws: int = 2000
) -> tuple[float, float] | None:
    """Return the bootstrap's interval of a mean, widened for small samples; None for one value, which has no spread.

    Args:
        values: [n], at least one.
        seed: of the resampling.
        level: the share of such intervals that cover the true mean.
        draws: how often `values` are drawn anew, with replacement.
    """
    return bootstrap_ratio(values, np.ones(len(values)), seed, level, draws)


def bootstrap_ratio(
    sums: Sequence[float] | np.ndarray,
    counts: Sequence[float] | np.ndarray,
    seed: int = 0,
    level: float = 0.95,
    draws: int = 2000,
) -> tuple[float, float] | None:
    """Return the bootstrap's interval of a mean over clustered values, as the pairs of one prompt are; None for one.

    Whole clusters are drawn, because the values of one are not independent (the cluster bootstrap; Davison and Hinkley
    1997, sec. 3.8). The percentiles of the resampled means (Efron 1979, doi 10.1214/aos/1176344552) are too near each
    other for few clusters, and cover the true mean less often than is meant. So their distances from the mean are
    stretched by √(n / (n - 1)) · t / z, Student's quantile over the normal's (the cause and the factor: Hesterberg
    2015, doi 10.1080/00031305.2015.1089789, who moves the level instead).

    Args:
        sums: [n], the sum of each cluster's values; at least one cluster.
        counts: [n], how many values each has, at least one; the mean is sums.sum() / counts.sum().
        seed: of the resampling.
        level: the share of such intervals that cover the true mean.
        draws: how often the clusters are drawn anew, with replacement.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    assert len(sums) > 0
    if len(sums) == 1:
        return None
    generator = np.random.default_rng(seed)
    at_once = max(1, 2**18 // len(sums))
    means = []
    for start in range(0, draws, at_once):
        drawn = generator.integers(len(sums), size=(min(at_once, draws - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    ends = np.quantile(np.concatenate(means), [0.5 - level / 2, 0.5 + level / 2])
    widening = math.sqrt(len(sums) / (len(sums) - 1)) * student(len(sums) - 1, level) / normal(level)
    mean = sums.sum() / counts.sum()
    low, high = mean + widening * (ends - mean)
    return float(low), float(high)


def stderr(values: Sequence[float] | np.ndarray) -> float | None:
    """Return the standard error of the mean of `values` [n]; None for one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def ratio_stderr(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the standard error of the mean over clustered values, to first order; arguments as in `bootstrap_ratio`.

    None for one cluster.
    """
    return stderr((sums - sums.sum() / counts.sum() * counts) / counts.mean())


def share_interval(share: float, error: float | None, trials: int) -> tuple[float, float]:
    """Return a 95% interval of a share whose standard error is known, within 0 and 1.

    Where the error is 0, because all clusters agree, or not known, it is Wilson's for so many independent trials.
    """
    if not error:
        return wilson(share * trials, trials)
    half = student(trials - 1) * error
    return max(0.0, share - half), min(1.0, share + half)


def normal(level: float = 0.95) -> float:
    """Return how many standard errors a normal interval of this level reaches to either side."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def student(freedom: int, level: float = 0.95) -> float:
    """Return the same for Student's t with so many degrees of freedom (Student 1908, doi 10.1093/biomet/6.1.1)."""
    if freedom > 10_000:  # the normal's, to four digits
        return normal(level)
    # t = √freedom · tan(angle), and the angle's density goes with cos(angle)^(freedom - 1): from 0 to a right angle
    angles = np.linspace(0, math.pi / 2, 2**16 + 1)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(level * mass[-1], mass, angles))
