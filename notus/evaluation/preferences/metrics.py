"""What log-probs of pairs say of a model: metrics, breakdowns by source and length, and calibration.

Throughout, `margins` [n] are what pairs are ranked by (reward or log-prob of the better minus that of the worse), and
`lengths` int [n, 2] the completion tokens of the better, called chosen, and of the worse, the rejected one. `prompts`
int [n] says which prompt each pair is of, where there are several of one, as those of a list are: they are not
independent, so intervals are made over prompts. None: each pair has a prompt of its own.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import softplus

from notus.evaluation.intervals import bootstrap_mean, bootstrap_ratio, ratio_stderr, stderr, wilson

BINS = 10
SMALLEST_GROUP = 10  # pairs in a point of the calibration plot


@dataclasses.dataclass(frozen=True)
class Rewards:
    """How rewards are made of log-probs.

    Attributes:
        beta: β, their scale.
        relative: β·(policy - base), as losses with a reference have them; else β·policy, as those without.
        per_token: without a base, β times the log-prob per token.
    """

    beta: float
    relative: bool = True
    per_token: bool = False

    def __call__(self, policy: Tensor, base: Tensor | None, lengths: Tensor) -> Tensor:
        """Return the rewards, fp64 [n, K], of summed log-probs [n, K] in nats and completion tokens [n, K]."""
        if self.relative:
            assert base is not None, "such rewards need a base"
            return self.beta * (policy.double() - base.double())
        return self.beta * (policy.double() / lengths.clamp(min=1) if self.per_token else policy.double())

    @property
    def formula(self) -> str:
        """The reward of a completion in words."""
        measured = "log-prob per token" if self.per_token else "log-prob"
        return "beta * (log-prob - the base's log-prob)" if self.relative else f"beta * {measured}, without the base"


def measures(policy: Tensor, base: Tensor | None, lengths: Tensor, rewards: Rewards | None) -> dict[str, Tensor]:
    """Return what completions may be ranked by, fp64 [n, K] each.

    Args:
        policy: [n, K] summed log-probs under the model, in nats; 0 where there is no completion.
        base: [n, K] the same under the base; None: there is none.
        lengths: [n, K] completion tokens.
        rewards: how rewards are made; None: there are none.

    Returns:
        `rewards` where there are some; `logps`, summed; `logps_per_token`; and with a base that the rewards leave out
        `logps_change`, policy - base.
    """
    found = {} if rewards is None else {"rewards": rewards(policy, base, lengths)}
    found |= {"logps": policy.double(), "logps_per_token": policy.double() / lengths.clamp(min=1)}
    if base is not None and not (rewards and rewards.relative):
        found["logps_change"] = policy.double() - base.double()
    return found


def preference_metrics(measured: dict[str, Tensor], rewards: Rewards | None) -> dict[str, float]:
    """Means over pairs of what a model makes of the chosen and the rejected completions.

    Args:
        measured: [n, 2] of (chosen, rejected) by measure; see `measures`.
        rewards: how rewards are made; None: there are none.

    Returns:
        For each measure `<measure>/chosen`, `/rejected`, `/margins` (chosen - rejected) and `/accuracies`
        (share of pairs with a positive margin, a tie counting half). Beside rewards relative to a base stands `loss`,
        the mean sigmoid DPO loss.
    """
    metrics: dict[str, float] = {}
    for name, values in measured.items():
        of_chosen, of_rejected = values.unbind(1)
        margins = of_chosen - of_rejected
        if name == "rewards" and rewards is not None and rewards.relative:
            metrics["loss"] = softplus(-margins).mean().item()
        metrics[f"{name}/chosen"] = of_chosen.mean().item()
        metrics[f"{name}/rejected"] = of_rejected.mean().item()
        metrics[f"{name}/margins"] = margins.mean().item()
        metrics[f"{name}/accuracies"] = (0.5 * (1 + margins.sign())).mean().item()
    return metrics


def compare(margins: np.ndarray, prompts: np.ndarray | None = None) -> dict[str, Any]:
    """Of some pairs: `count`, `accuracy` (a tie counts half) and the mean `margin`, how sure both are.

    That is `accuracy_interval` (Wilson's) and `margin_interval` (the bootstrap's), of 95%, and the standard errors
    `accuracy_stderr` and `margin_stderr`. Of pairs that share prompts, both intervals are the bootstrap's over prompts.
    Pairs of one prompt have the first of these alone; the others are None.
    """
    right = 0.5 * (1 + np.sign(margins))
    found = {"count": len(margins), "accuracy": float(right.mean())}
    if prompts is None:
        return {
            **found,
            "accuracy_stderr": stderr(right),
            "accuracy_interval": wilson(float(right.sum()), len(margins)),
            "margin": float(margins.mean()),
            "margin_stderr": stderr(margins),
            "margin_interval": bootstrap_mean(margins),
        }
    _, numbers = np.unique(prompts, return_inverse=True)
    counts, of_right, of_margins = (np.bincount(numbers, weights) for weights in (None, right, margins))
    return {
        **found,
        "accuracy_stderr": ratio_stderr(of_right, counts),
        "accuracy_interval": _clustered_share(of_right, counts),
        "margin": float(margins.mean()),
        "margin_stderr": ratio_stderr(of_margins, counts),
        "margin_interval": bootstrap_ratio(of_margins, counts),
    }


def _clustered_share(right: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a share of pairs, over prompts: Wilson's for as many trials where all prompts agree."""
    share = float(right.sum() / counts.sum())
    interval = bootstrap_ratio(right, counts)
    if interval is None or interval[0] == interval[1]:
        return wilson(share * len(counts), len(counts))
    return max(0.0, interval[0]), min(1.0, interval[1])


def _part(prompts: np.ndarray | None, chosen: np.ndarray) -> np.ndarray | None:
    return None if prompts is None else prompts[chosen]


def by_source(margins: np.ndarray, sources: Sequence[str], prompts: np.ndarray | None = None) -> list[dict[str, Any]]:
    """`source` and its `compare`, the source of the most pairs first."""
    names, numbers = np.unique(np.asarray(sources, dtype=object), return_inverse=True)
    parts = [numbers == number for number in range(len(names))]
    found = [
        {"source": str(name), **compare(margins[part], _part(prompts, part))}
        for name, part in zip(names, parts, strict=True)
    ]
    return sorted(found, key=lambda row: -row["count"])


def by_length(margins: np.ndarray, lengths: np.ndarray, prompts: np.ndarray | None = None) -> list[dict[str, Any]]:
    """By the tokens of chosen and rejected together, in buckets that double: `low`, `high` (included), `compare`.

    Empty buckets are left out.
    """
    powers = doubling_buckets(lengths.sum(axis=1))
    return [
        {**bucket(power), **compare(margins[powers == power], _part(prompts, powers == power))}
        for power in np.unique(powers)
    ]


def doubling_buckets(lengths: np.ndarray) -> np.ndarray:
    """The p of each length with 2^p <= length < 2^(p + 1), int [n]."""
    return np.frexp(lengths)[1] - 1  # exact where a logarithm rounds


def bucket(power: int) -> dict[str, int]:
    """The bounds, both included, of the lengths of a p of `doubling_buckets`."""
    return {"low": 2 ** int(power), "high": 2 ** (int(power) + 1) - 1}


def by_longer(margins: np.ndarray, lengths: np.ndarray, prompts: np.ndarray | None = None) -> list[dict[str, Any]]:
    """By which completion has more tokens: `longer` ("chosen", "rejected", "neither") and its `compare`; none empty."""
    signs = np.sign(lengths[:, 0] - lengths[:, 1])
    names = {1: "chosen", -1: "rejected", 0: "neither"}
    return [
        {"longer": name, **compare(margins[signs == sign], _part(prompts, signs == sign))}
        for sign, name in names.items()
        if (signs == sign).any()
    ]


def length_bias(
    margins: np.ndarray, lengths: np.ndarray, prompts: np.ndarray | None = None
) -> dict[str, float | None] | None:
    """How the margin goes with the length difference d, chosen minus rejected, in tokens.

    Returns:
        `pearson` and `spearman` correlation of margin and d; `slope_per_token` and `margin_at_equal_length` of the
        least-squares line margin = margin_at_equal_length + slope_per_token · d; `slope_stderr`, its standard error,
        over prompts where pairs share them (Liang and Zeger 1986, doi 10.1093/biomet/73.1.13; None for one prompt).
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
        "spearman": _correlation(ranks(margins), ranks(difference)),
        "slope_per_token": slope,
        "slope_stderr": _slope_stderr(residual, centred, prompts),
        "margin_at_equal_length": start,
    }


def _slope_stderr(residual: np.ndarray, centred: np.ndarray, prompts: np.ndarray | None) -> float | None:
    spread = float(centred @ centred)
    if prompts is None:
        return math.sqrt(float(residual @ residual) / (len(residual) - 2) / spread)
    _, numbers = np.unique(prompts, return_inverse=True)
    scores = np.bincount(numbers, residual * centred)
    if len(scores) < 2:
        return None
    return math.sqrt(float(scores @ scores) * len(scores) / (len(scores) - 1)) / spread


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one, other)[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, equal values sharing the mean of theirs."""
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[numbers]


def calibration(margins: np.ndarray, beta: float, prompts: np.ndarray | None = None) -> dict[str, Any]:
    """Is a model as sure of the chosen completions as it is right? Compare σ(reward margin) with what happens.

    DPO's model of preferences (Bradley-Terry; Rafailov et al. 2305.18290, eq. 6) says that A is preferred to B with
    probability σ(reward of A - reward of B). Which completion is called A decides nothing, so each pair counts once,
    with A the one that the model prefers: its probability, the confidence, is at least 1/2, and the frequency with
    which A is the chosen one should equal it. (With A drawn at random, or each pair in both orders, bins mirror each
    other about (1/2, 1/2), and every figure is the same.)

    Args:
        margins: [n] reward margins.
        beta: the rewards are β times the log-ratios.
        prompts: which prompt each pair is of; None: each has its own.

    Returns:
        `bins`: of ten equal ones between 1/2 and 1 those that hold pairs, each with `low`, `high`, `count`, mean
            `confidence`, `frequency` of the preferred being the chosen (a tie counts half) and its 95% `interval`.
        `quantiles`: the same of groups with about equal numbers of pairs, ten or fewer, by confidence; pairs of equal
            confidence share a group. A plot of these uses its area, where most margins are small.
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
    parts = {int(number): numbers == number for number in np.unique(numbers)}
    bins = [
        {**_bounds(number), **_bin(right[part], confidence[part], _part(prompts, part))}
        for number, part in parts.items()
    ]
    gaps = [entry["count"] * abs(entry["frequency"] - entry["confidence"]) for entry in bins]
    scale = best_scale(margins)
    if scale is None:  # the limit: a tie alone has a loss
        best_loss = math.log(2) * float(np.mean(margins == 0))
    else:
        best_loss = float(np.mean(np.logaddexp(0, -scale * margins)))
    return {
        "bins": bins,
        "quantiles": _quantiles(right, confidence, prompts),
        "ece": sum(gaps) / len(margins),
        "brier": float(np.mean((1 - _sigmoid(margins)) ** 2)),
        "best_beta": None if scale is None else beta * scale,
        "best_loss": best_loss,
    }


def _bounds(number: int) -> dict[str, float]:
    """The ends of one of the equal bins."""
    return {"low": 0.5 + number / (2 * BINS), "high": 0.5 + (number + 1) / (2 * BINS)}


def _quantiles(right: np.ndarray, confidence: np.ndarray, prompts: np.ndarray | None) -> list[dict[str, Any]]:
    """Return groups of at least about `SMALLEST_GROUP` pairs each, in the order of confidence."""
    groups = min(BINS, max(1, len(right) // SMALLEST_GROUP))
    edges = np.quantile(confidence, np.arange(1, groups) / groups)
    numbers = np.searchsorted(edges, confidence, side="right")
    found = []
    for number in np.unique(numbers):
        part = numbers == number
        ends = {"low": float(confidence[part].min()), "high": float(confidence[part].max())}
        found.append({**ends, **_bin(right[part], confidence[part], _part(prompts, part))})
    return found


def _bin(right: np.ndarray, confidence: np.ndarray, prompts: np.ndarray | None) -> dict[str, Any]:
    interval = wilson(float(right.sum()), len(right))
    if prompts is not None:
        _, numbers = np.unique(prompts, return_inverse=True)
        interval = _clustered_share(np.bincount(numbers, right), np.bincount(numbers))
    return {
        "count": len(right),
        "confidence": float(confidence.mean()),
        "frequency": float(right.mean()),
        "interval": interval,
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
