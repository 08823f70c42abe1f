"""Every pair judged twice, with positions swapped; verdicts kept as they come; and what they add up to."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from notus.evaluation.endpoint import ask_all
from notus.evaluation.intervals import wilson
from notus.evaluation.kept import keep, read_kept
from notus.evaluation.win_rate.judges import VERDICTS, Judge, parse_verdict
from notus.evaluation.win_rate.pairs import Pair


@dataclasses.dataclass(frozen=True)
class Judged:
    """A pair's verdicts: with the answer in place A and in place B, as the judge gave them; None: there is none."""

    pair: Pair
    first: str | None
    second: str | None

    @property
    def same(self) -> bool:
        """Whether the answers are equal word for word, so that nobody is asked."""
        return self.pair.answer == self.pair.against

    @property
    def flipped(self) -> bool:
        """Whether the judge named the same place twice, and so opposite answers."""
        return self.first == self.second and self.first in ("A", "B")

    @property
    def points(self) -> float | None:
        """1 for a win and 0 for a loss in both orders, else half; None without both verdicts."""
        if self.same:
            return 0.5
        if self.first is None or self.second is None:
            return None
        return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((self.first, self.second), 0.5)


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the verdicts add up to.

    Attributes:
        win_rate: wins and half of the ties in percent of `count`.
        interval: 95% (Wilson), in percent.
        standard_error: the sample's, in percent; None for a single pair.
        wins, losses, ties: pairs; a tie is also what the judge sees differently in the two orders.
        flips: of the ties, those where it preferred the same place in both orders.
        same: of the ties, those with equal answers, about which nobody was asked.
        count: pairs with both verdicts, and those with equal answers.
        failed: pairs that lack a verdict, and do not count.
        flip_rate: flips in percent of the pairs with both verdicts: the bias of position; None: there are none.
        first_rate: how often place A won, in percent of the verdicts that name a winner; 50 is fair.
        length, against_length: mean of the answers in characters, over all pairs.
    """

    win_rate: float
    interval: tuple[float, float]
    standard_error: float | None
    wins: int
    losses: int
    ties: int
    flips: int
    same: int
    count: int
    failed: int
    flip_rate: float | None
    first_rate: float | None
    length: float
    against_length: float


def judge_pairs(pairs: Sequence[Pair], judge: Judge, kept: Path) -> tuple[list[Judged], list[str], list[str]]:
    """Ask for the verdicts that are not in the file `kept` yet, and add them to it one by one as they come.

    What fails, and a reply without a verdict, is noted there as well, and asked again by the next call.

    Returns:
        The pairs with their verdicts; why asking failed, and what replies held no verdict, a line each.

    Raises:
        ValueError: the endpoint refuses every request, or the file holds something else.
    """
    verdicts = _read_verdicts(kept)
    asked = [(pair.prompt, *order) for pair in pairs if pair.answer != pair.against for order in _orders(pair)]
    left = [item for item in dict.fromkeys(asked) if verdicts.get(_key(judge, item)) is None]
    failures: list[str] = []
    unread: list[str] = []

    def on_done(item: tuple[str, str, str], outcome: str | Exception) -> None:
        key = _key(judge, item)
        if isinstance(outcome, Exception):
            failures.append(str(outcome))
            keep(kept, [{"key": key, "verdict": None, "failure": str(outcome)}])
            return
        verdicts[key] = parse_verdict(outcome)
        if verdicts[key] is None:
            unread.append(f"a reply without a verdict: {outcome[:200]!r}")
        keep(kept, [{"key": key, "verdict": verdicts[key], "reply": outcome}])

    ask_all(lambda item: judge.ask(*item), left, parallel=judge.parallel, on_done=on_done)
    judged = []
    for pair in pairs:
        first, second = (verdicts.get(_key(judge, (pair.prompt, *order))) for order in _orders(pair))
        judged.append(Judged(pair, first, second))
    return judged, failures, unread


def _read_verdicts(path: Path) -> dict[str, str | None]:
    verdicts: dict[str, str | None] = {}
    for number, record in enumerate(read_kept(path), start=1):
        key, verdict = record.get("key"), record.get("verdict")
        if not isinstance(key, str) or (verdict is not None and verdict not in VERDICTS):
            raise ValueError(f"{path}, line {number}: not a kept verdict; remove the line, or the file")
        reply = record.get("reply")  # read again: it may have been kept by a version that read replies otherwise
        verdicts[key] = parse_verdict(reply) if isinstance(reply, str) else verdict
    return verdicts


def score(judged: Sequence[Judged]) -> Scores | None:
    """Add verdicts up; None if no pair with different answers counts, though there are such pairs."""
    points = [one.points for one in judged if one.points is not None]
    asked = [one for one in judged if not one.same and one.points is not None]
    if not asked and len(points) < len(judged):
        return None
    count = len(points)
    low, high = wilson(sum(points), count)
    flips = sum(one.flipped for one in asked)
    winners = [verdict for one in asked for verdict in (one.first, one.second) if verdict != "tie"]
    return Scores(
        win_rate=100 * fmean(points),
        interval=(100 * low, 100 * high),
        standard_error=100 * stdev(points) / math.sqrt(count) if count > 1 else None,
        wins=points.count(1.0),
        losses=points.count(0.0),
        ties=points.count(0.5),
        flips=flips,
        same=sum(one.same for one in judged),
        count=count,
        failed=len(judged) - count,
        flip_rate=_percent(flips, len(asked)),
        first_rate=_percent(winners.count("A"), len(winners)),
        length=_mean_length(one.pair.answer for one in judged),
        against_length=_mean_length(one.pair.against for one in judged),
    )


def _orders(pair: Pair) -> tuple[tuple[str, str], tuple[str, str]]:
    return (pair.answer, pair.against), (pair.against, pair.answer)


def _key(judge: Judge, item: tuple[str, str, str]) -> str:
    return hashlib.sha256(json.dumps([judge.identity, *item]).encode()).hexdigest()


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _mean_length(texts: Iterable[str]) -> float:
    return fmean(len(text) for text in texts)
