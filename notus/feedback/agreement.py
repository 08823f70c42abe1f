"""How far a judge agrees with itself in another order, and how far the order alone decides. Pure: no files, no torch.

A completion's mean rating is None where it has no rating.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Means = Sequence[float | None]


@dataclasses.dataclass(frozen=True)
class Again:
    """How two verdicts on the same completions, seen in different orders, agree."""

    prompts: int  # with two verdicts that both rate a completion
    exact: float  # share of the completions rated twice whose mean rating is the same
    within_one: float  # share whose mean ratings differ by at most 1
    # share of the prompts with two or more such completions whose best one, the first of several, is the same; None:
    # there is no such prompt.
    same_best: float | None
    correlation: float | None  # Pearson's, of the mean ratings; None where one side does not vary


@dataclasses.dataclass(frozen=True)
class Position:
    """What the place in the judge's order does, over all verdicts on two or more completions."""

    mean_rating: Sequence[float | None]  # by place; None: nothing was rated there
    # By place, how often it holds the best rating, over how often it would by chance: of k rated completions each
    # counts as 1/k, and the best ones of a verdict share its win. 1.0: as often as by chance, which an unswayed judge
    # tends to at every place, since the order is random; 2.0: twice as often. None: nothing was rated there.
    best: Sequence[float | None]


def agreement(twice: Iterable[tuple[Means, Means]]) -> Again | None:
    """Compare pairs of verdicts on one prompt's completions, in the order of the record; None if there are none."""
    both = [pair for pair in map(_rated_twice, twice) if pair]
    if not both:
        return None
    flat = [ratings for pair in both for ratings in pair]
    several = [pair for pair in both if len(pair) > 1]
    same = [_first_best(one for one, _ in pair) == _first_best(other for _, other in pair) for pair in several]
    return Again(
        prompts=len(both),
        exact=statistics.fmean(_same(one, other) for one, other in flat),
        within_one=statistics.fmean(abs(one - other) <= 1 for one, other in flat),
        same_best=statistics.fmean(same) if same else None,
        correlation=_correlation(flat),
    )


def positions(seen: Iterable[Means]) -> Position | None:
    """Add up verdicts, each in the order that the judge saw; None if no verdict compares two rated completions."""
    compared = [means for means in seen if sum(mean is not None for mean in means) > 1]
    if not compared:
        return None
    places = max(map(len, compared))
    by_place: list[list[float]] = [[] for _ in range(places)]
    wins, by_chance = [0.0] * places, [0.0] * places
    for means in compared:
        rated = [mean for mean in means if mean is not None]
        winners = rated.count(max(rated))
        for place, mean in enumerate(means):
            if mean is not None:
                by_place[place].append(mean)
                by_chance[place] += 1 / len(rated)
                wins[place] += (mean == max(rated)) / winners
    ratings = [statistics.fmean(each) if each else None for each in by_place]
    return Position(ratings, [won / fair if fair else None for won, fair in zip(wins, by_chance, strict=True)])


def as_json(figures: Again | Position | None) -> dict[str, Any] | None:
    """Return figures for a summary file."""
    return None if figures is None else dataclasses.asdict(figures)


def _rated_twice(pair: tuple[Means, Means]) -> list[tuple[float, float]]:
    return [(one, other) for one, other in zip(*pair, strict=True) if one is not None and other is not None]


def _same(one: float, other: float) -> bool:
    """Whether two means are equal; each is rounded once, from sums that are exact or nearly so."""
    return abs(one - other) < 1e-9


def _first_best(ratings: Iterable[float]) -> int:
    listed = list(ratings)
    return listed.index(max(listed))


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    ones, others = zip(*pairs, strict=True)
    if len(set(ones)) < 2 or len(set(others)) < 2:
        return None
    return statistics.correlation(ones, others)
