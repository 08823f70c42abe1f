"""How well scores order the completions of a prompt as their ratings do.

Everywhere, `scores` and `ratings` are [B, K], and `mask` [B, K] is true where there is a completion with a rating; two
at least in every row. Results are fp64 [B]: one value per prompt.
"""

import torch
from torch import Tensor


def pairwise_accuracy(scores: Tensor, ratings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many pairs of different ratings the scores order rightly, a tie counting half; and how many such pairs
    there are."""
    agreement, pairs = _agreement(scores, ratings, mask)
    counts = pairs.sum((1, 2)).double()
    return 0.5 * (counts + agreement), counts


def kendall_tau(scores: Tensor, ratings: Tensor, mask: Tensor) -> Tensor:
    """Return Kendall's τ-b (Kendall 1945), which accounts for ties; NaN where all ratings or all scores are equal.

    τ-b = (concordant - discordant) / √(pairs of different scores · pairs of different ratings).
    """
    agreement, by_rating = _agreement(scores, ratings, mask)
    by_score = _agreement(scores, scores, mask)[1]
    return agreement / (by_rating.sum((1, 2)).double() * by_score.sum((1, 2)).double()).sqrt()


def top_1(scores: Tensor, ratings: Tensor, mask: Tensor) -> Tensor:
    """Return whether the best-scored completion is a best-rated one; of several best-scored ones, the share that is."""
    best_scored, best_rated = _is_best(scores, mask), _is_best(ratings, mask)
    return (best_scored & best_rated).sum(1).double() / best_scored.sum(1).double()


def _agreement(scores: Tensor, ratings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Concordant minus discordant pairs, fp64 [B]; and bool [B, K, K]: pairs (better, worse) of different ratings."""
    ratings = ratings.masked_fill(~mask, 0.0)
    pairs = (ratings[:, :, None] > ratings[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    signs = (scores[:, :, None] - scores[:, None, :]).sign().double()
    return signs.masked_fill(~pairs, 0.0).sum((1, 2)), pairs


def _is_best(values: Tensor, mask: Tensor) -> Tensor:
    values = values.masked_fill(~mask, -torch.inf)
    return (values == values.amax(1, keepdim=True)) & mask
