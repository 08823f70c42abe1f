"""How well a model orders the rated completions of a prompt: Kendall's τ, top-1 accuracy, and the pairs of a list."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from notus.evaluation.intervals import bootstrap_mean, stderr, wilson
from notus.evaluation.preferences.metrics import by_source
from notus.training.ranking import kendall_tau, pairwise_accuracy, top_1


@dataclasses.dataclass(frozen=True)
class RatedPairs:
    """The pairs of completions of one prompt that have different ratings, prompt by prompt.

    Attributes:
        prompts: int64 [P], which list each pair is of.
        better, worse: int64 [P], which of the list's completions are the pair.
    """

    prompts: np.ndarray
    better: np.ndarray
    worse: np.ndarray

    def differences(self, values: np.ndarray) -> np.ndarray:
        """Of values [n, K], the better's minus the worse's: [P]."""
        return values[self.prompts, self.better] - values[self.prompts, self.worse]

    def both(self, values: np.ndarray) -> np.ndarray:
        """Of values [n, K], the better's and the worse's: [P, 2]."""
        return np.stack([values[self.prompts, self.better], values[self.prompts, self.worse]], axis=1)


def rated_pairs(ratings: np.ndarray, lengths: np.ndarray) -> RatedPairs:
    """Return the pairs of lists; arguments as in `known`.

    Raises ValueError if there is none, because nothing can be said of an order then.
    """
    mask = known(ratings, lengths)
    filled = np.where(mask, ratings, 0.0)
    differ = (filled[:, :, None] > filled[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    if not differ.any():
        raise ValueError(
            "no prompt has two completions with different ratings, so there is no order to compare with: add some"
        )
    return RatedPairs(*np.nonzero(differ))


def known(ratings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return where there is a completion with a rating, bool [n, K].

    Args:
        ratings: [n, K], NaN where not known.
        lengths: int [n, K], completion tokens; 0 where there is no completion.
    """
    return (lengths > 0) & ~np.isnan(ratings)


def list_metrics(measured: dict[str, Tensor], ratings: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """How each measure orders completions by their ratings.

    Args:
        measured: [n, K] by measure, the best rated completion first; see `metrics.measures`.
        ratings, lengths: as in `known`.

    Returns:
        For each measure `<measure>/chosen` and `/rejected`, the mean of the first completion and of the last, which are
        the best and the worst rated; `/margins`, chosen - rejected; `/accuracies`, the share of pairs of different
        ratings in the right order (a tie counts half); `/kendall_tau` and `/top_1`, means over prompts as in `ranking`.
    """
    everywhere, last = np.arange(len(lengths)), (lengths > 0).sum(axis=1) - 1
    found: dict[str, float] = {}
    for name, values in measured.items():
        tau, top, right, count = _per_prompt(values, ratings, lengths)
        found[f"{name}/chosen"] = values[:, 0].mean().item()
        found[f"{name}/rejected"] = values[everywhere, last].mean().item()
        found[f"{name}/margins"] = found[f"{name}/chosen"] - found[f"{name}/rejected"]
        found[f"{name}/kendall_tau"] = float(tau.mean())
        found[f"{name}/top_1"] = float(top.mean())
        found[f"{name}/accuracies"] = float(right.sum() / count.sum())
    return found


def ranking(values: Tensor, ratings: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """How the values [n, K] order the completions of prompts that have different ratings; arguments as in `known`.

    Returns:
        `prompts`, how many these are; `kendall_tau`, the mean of Kendall's τ-b (1: as the ratings, -1: reversed, 0: no
            order, also where all values are equal), with its `_stderr` and the bootstrap's 95% `_interval` (None for
            one prompt); `top_1`, the share of prompts whose best-valued completion is a best-rated one, with `_stderr`
            and Wilson's `_interval`; `top_1_chance`, what a random choice would reach.
    """
    tau, top, _, _ = _per_prompt(values, ratings, lengths)
    return {
        "prompts": len(top),
        "kendall_tau": float(tau.mean()),
        "kendall_tau_stderr": stderr(tau),
        "kendall_tau_interval": bootstrap_mean(tau),
        "top_1": float(top.mean()),
        "top_1_stderr": stderr(top),
        "top_1_interval": wilson(float(top.sum()), len(top)),
        "top_1_chance": _chance(ratings, lengths),
    }


def rankings_by_source(
    values: Tensor, ratings: np.ndarray, lengths: np.ndarray, sources: Sequence[str]
) -> list[dict[str, Any]]:
    """`source`, the `compare` of its pairs and its `ranking`, the source of the most pairs first."""
    pairs, named = rated_pairs(ratings, lengths), np.asarray(sources, dtype=object)
    compared = by_source(pairs.differences(values.numpy()), named[pairs.prompts].tolist(), pairs.prompts)
    found = []
    for row in compared:
        part = named == row["source"]
        found.append({**row, **ranking(values[torch.from_numpy(part)], ratings[part], lengths[part])})
    return found


def _per_prompt(
    values: Tensor, ratings: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """τ-b, top-1, pairs in the right order, and pairs: of each prompt that has different ratings."""
    rated, mask = torch.from_numpy(ratings).double(), torch.from_numpy(known(ratings, lengths))
    some = torch.from_numpy(_have_order(ratings, lengths))
    values, rated, mask = values[some], rated[some], mask[some]
    right, count = pairwise_accuracy(values, rated, mask)
    # τ is not defined where all values are equal; they order nothing, as a random order does on average
    found = (kendall_tau(values, rated, mask).nan_to_num(0.0), top_1(values, rated, mask), right, count)
    tau, top, right_pairs, pairs = (part.numpy() for part in found)
    return tau, top, right_pairs, pairs


def _have_order(ratings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether a prompt has two completions with different ratings, bool [n]."""
    mask = known(ratings, lengths)
    highest, lowest = np.where(mask, ratings, -np.inf).max(axis=1), np.where(mask, ratings, np.inf).min(axis=1)
    return highest > lowest


def _chance(ratings: np.ndarray, lengths: np.ndarray) -> float:
    mask = known(ratings, lengths)
    rated = np.where(mask, ratings, -np.inf)
    best = (rated == rated.max(axis=1, keepdims=True)) & mask
    some = _have_order(ratings, lengths)
    return float((best.sum(axis=1)[some] / mask.sum(axis=1)[some]).mean())
