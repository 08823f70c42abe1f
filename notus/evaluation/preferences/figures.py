"""What rows say is better, and how far a model's log-probs agree: pairs, lists of rated completions, and labels."""

import abc
from typing import Any

import numpy as np
import torch
from torch import Tensor

from notus.data.dataset import TokenizedDataset
from notus.evaluation.preferences import metrics
from notus.evaluation.preferences.labels import (
    check_labels,
    compare_labels,
    label_metrics,
    labels_by_length,
    labels_by_source,
)
from notus.evaluation.preferences.lists import list_metrics, ranking, rankings_by_source, rated_pairs
from notus.evaluation.preferences.metrics import Rewards
from notus.training.objective import ratings_or_order


class Judged(abc.ABC):
    """Rows that say which completions are better.

    Attributes:
        rows: "pairs", "lists" or "labels".
        num_pairs: how many pairs of completions the data put in an order; None: labels, which compare none.
        ranked_by: the measure that decides, see `metrics.measures`.
    """

    rows: str
    num_pairs: int | None

    def __init__(self, rows: TokenizedDataset, rewards: Rewards | None) -> None:
        """Raise ValueError for rows that put no completion above another."""
        self._rewards, self._lengths, self._sources = rewards, rows.loss_tokens, rows.sources
        self.ranked_by = "logps" if rewards is None else "rewards"

    def metrics(self, policy: Tensor, base: Tensor | None) -> dict[str, Any]:
        """Return the metrics and all `DETAILS` but the KL, of summed log-probs [n, K] in nats, the base's if any."""
        measured = metrics.measures(policy, base, torch.from_numpy(self._lengths), self._rewards)
        return {**self._means(measured), "ranking": None, **self._details(measured[self.ranked_by])}

    @abc.abstractmethod
    def _means(self, measured: dict[str, Tensor]) -> dict[str, float]:
        """The metrics of each measure [n, K], by "<measure>/<metric>"."""

    @abc.abstractmethod
    def _details(self, values: Tensor) -> dict[str, Any]:
        """The details of the values [n, K] that rank the completions."""

    def _of_pairs(
        self, margins: np.ndarray, lengths: np.ndarray, sources: list[str] | None, prompts: np.ndarray | None
    ) -> dict[str, Any]:
        """The details of pairs; arguments as in `metrics`."""
        beta = None if self._rewards is None else self._rewards.beta
        return {
            "overall": metrics.compare(margins, prompts),
            "by_source": metrics.by_source(margins, sources, prompts) if sources else None,
            "by_length": metrics.by_length(margins, lengths, prompts),
            "by_longer": metrics.by_longer(margins, lengths, prompts),
            "length_bias": metrics.length_bias(margins, lengths, prompts),
            "calibration": metrics.calibration(margins, beta, prompts) if beta is not None else None,
        }


class Pairs(Judged):
    """Chosen and rejected completions."""

    rows = "pairs"

    def __init__(self, rows: TokenizedDataset, rewards: Rewards | None) -> None:
        super().__init__(rows, rewards)
        self.num_pairs = len(rows)

    def _means(self, measured: dict[str, Tensor]) -> dict[str, float]:
        return metrics.preference_metrics(measured, self._rewards)

    def _details(self, values: Tensor) -> dict[str, Any]:
        return self._of_pairs((values[:, 0] - values[:, 1]).numpy(), self._lengths, self._sources, None)


class Lists(Judged):
    """Rated completions. Those of a row without ratings stand in their order, the best first."""

    rows = "lists"

    def __init__(self, rows: TokenizedDataset, rewards: Rewards | None) -> None:
        super().__init__(rows, rewards)
        self._ratings = ratings_or_order(rows.ratings, rows.loss_tokens)
        self._pairs = rated_pairs(self._ratings, self._lengths)
        self.num_pairs = len(self._pairs.prompts)

    def _means(self, measured: dict[str, Tensor]) -> dict[str, float]:
        return list_metrics(measured, self._ratings, self._lengths)

    def _details(self, values: Tensor) -> dict[str, Any]:
        pairs, sources = self._pairs, None
        found = self._of_pairs(pairs.differences(values.numpy()), pairs.both(self._lengths), sources, pairs.prompts)
        found["ranking"] = ranking(values, self._ratings, self._lengths)
        if self._sources:
            found["by_source"] = rankings_by_source(values, self._ratings, self._lengths, self._sources)
        return found


class Labels(Judged):
    """Completions that are good or bad, without a partner."""

    rows = "labels"
    num_pairs = None

    def __init__(self, rows: TokenizedDataset, rewards: Rewards | None) -> None:
        super().__init__(rows, rewards)
        self._labels = check_labels(rows.labels)
        # a reward relative to a base has a natural zero; a log-prob has none
        self._threshold = rewards is not None and rewards.relative

    def _means(self, measured: dict[str, Tensor]) -> dict[str, float]:
        return label_metrics(measured, self._labels, threshold=self._threshold)

    def _details(self, values: Tensor) -> dict[str, Any]:
        column, lengths = values[:, 0].numpy(), self._lengths[:, 0]
        by_source = None
        if self._sources:
            by_source = labels_by_source(column, self._labels, self._sources, threshold=self._threshold)
        return {
            "overall": compare_labels(column, self._labels, threshold=self._threshold),
            "by_source": by_source,
            "by_length": labels_by_length(column, self._labels, lengths, threshold=self._threshold),
            "by_longer": None,
            "length_bias": None,
            "calibration": None,
        }
