"""What verdicts make of records: ratings in UltraFeedback's form, and the summary of them all."""

from collections.abc import Mapping, Sequence
from typing import Any

from notus.feedback.agreement import Means, agreement, as_json, positions
from notus.feedback.judge import Annotation, Question, Verdict
from notus.feedback.questions import Item
from notus.feedback.records import NOT_RATED, Record
from notus.feedback.verdicts import Kept

MANY = 0.1  # the share of completions without a rating from which the judge is named


def mean_of(annotations: Mapping[str, Annotation]) -> float | None:
    """Return the mean rating of a completion; None if it has no rating."""
    ratings = [each.rating for each in annotations.values() if each.rating is not None]
    return sum(ratings) / len(ratings) if ratings else None


def rated_record(item: Item, verdicts: Mapping[str, Verdict], judge: str, *, reward: bool) -> Record:
    """Return a record with the first verdict's ratings or rewards; those of another judge are taken out.

    Completions with the same text have the same ratings. A record without a verdict has none.
    """
    replaced = ("reward",) if reward else ("annotations", "fine-grained_score")
    record = {key: value for key, value in item.record.items() if key != "rated"}
    completions = [
        {key: value for key, value in completion.items() if key not in replaced} for completion in record["completions"]
    ]
    record["completions"] = completions
    question = item.first
    verdict = verdicts.get(question.key) if question else None
    if question is None or verdict is None:
        return record
    by_text = {text: number for number, text in enumerate(question.completions)}
    for completion in completions:
        number = by_text[completion["response"]]
        if verdict.rewards is not None:
            completion["reward"] = verdict.rewards[number]
        else:
            completion |= _annotations(verdict.annotations[number])
    record["rated"] = {"judge": judge, "order": list(question.order)}
    return record


def _annotations(annotations: Mapping[str, Annotation]) -> dict[str, Any]:
    """Return a completion's ratings in UltraFeedback's form; what was unreadable is left out."""
    readable = {aspect: each for aspect, each in annotations.items() if not each.unreadable}
    found: dict[str, Any] = {
        "annotations": {
            aspect: {"Rating": _rating_text(each.rating), "Rationale": each.rationale}
            for aspect, each in readable.items()
        }
    }
    mean = mean_of(annotations)
    return found if mean is None else {**found, "fine-grained_score": mean}


def _rating_text(rating: float | None) -> str:
    if rating is None:
        return NOT_RATED
    return str(int(rating)) if rating == int(rating) else repr(rating)


def summarise(
    items: Sequence[Item],
    kept: Kept,
    settings: Mapping[str, Any],
    judge: str,
    seconds: float,
    *,
    prices: bool,
) -> dict[str, Any]:
    """Return the summary of OUT, in numbers."""
    verdicts = kept.verdicts
    answered = [(item.first, verdicts[item.first.key]) for item in items if item.first and item.first.key in verdicts]
    twice = [
        (item.first, verdicts[item.first.key], item.again, verdicts[item.again.key])
        for item in items
        if item.first and item.again and item.first.key in verdicts and item.again.key in verdicts
    ]
    by_place = [_means(verdict) for _, verdict in answered] + [_means(verdict) for *_, verdict in twice]
    scores = [[score for score in _scores(verdict) if score is not None] for _, verdict in answered]
    ratings = [_rating_counts(item, verdicts) for item in items]
    usage = kept.usage
    rewards = any(verdict.rewards is not None for _, verdict in answered)
    return {
        "settings": dict(settings),
        "judge": judge,
        "prompts": len(items),
        "rated": sum(_rated_completions(item, verdicts) for item in items),
        "unreadable": sum(
            each.unreadable for _, verdict in answered for of_one in verdict.annotations for each in of_one.values()
        ),
        "unrated": sum(_count(item, verdicts) - _rated_completions(item, verdicts) for item in items),
        "failed": sum(item.first is not None and item.first.key not in verdicts for item in items),
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cost": usage.cost if prices else None,
        "seconds": seconds,
        "ratings": _added(ratings),
        "tied": sum(len(each) > 1 and len(set(each)) == 1 for each in scores),
        "different": len({score for each in scores for score in each}),
        "again": None if rewards else as_json(agreement(_in_order_of_record(*each) for each in twice)),
        "position": None if rewards else as_json(positions(by_place)),
    }


def _means(verdict: Verdict) -> Means:
    return [mean_of(annotations) for annotations in verdict.annotations]


def _scores(verdict: Verdict) -> Means:
    """Return the mean ratings or the rewards of a question's completions."""
    return _means(verdict) if verdict.rewards is None else verdict.rewards


def _count(item: Item, verdicts: Mapping[str, Verdict]) -> int:
    """Count the completions that a verdict is about, equal texts each."""
    return len(item.record["completions"]) if item.first and item.first.key in verdicts else 0


def _rated_completions(item: Item, verdicts: Mapping[str, Verdict]) -> int:
    """Count the completions with a rating or a reward, equal texts each."""
    if item.first is None or item.first.key not in verdicts:
        return 0
    verdict = verdicts[item.first.key]
    scores = zip(item.first.completions, _scores(verdict), strict=True)
    rated = {text for text, score in scores if score is not None}
    return sum(completion["response"] in rated for completion in item.record["completions"])


def _rating_counts(item: Item, verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, int]]:
    """Count the ratings of a record's different completions by aspect, each rounded to an integer."""
    if item.first is None or item.first.key not in verdicts:
        return {}
    counts: dict[str, dict[str, int]] = {}
    for of_one in verdicts[item.first.key].annotations:
        for aspect, each in of_one.items():
            of_aspect = counts.setdefault(aspect, dict.fromkeys("12345", 0))
            if each.rating is not None:
                of_aspect[str(int(each.rating + 0.5))] += 1
    return counts


def _added(counts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for one in counts:
        for aspect, of_one in one.items():
            of_aspect = total.setdefault(aspect, dict.fromkeys("12345", 0))
            for rating, number in of_one.items():
                of_aspect[rating] += number
    return total


def _in_order_of_record(first: Question, verdict: Verdict, again: Question, other: Verdict) -> tuple[Means, Means]:
    """Return two verdicts' mean ratings of the same completions, in the order of the record."""
    sides = []
    for question, each in ((first, verdict), (again, other)):
        by_place = dict(zip(question.order, _means(each), strict=True))
        sides.append([by_place[place] for place in sorted(by_place)])
    return sides[0], sides[1]


def table(summary: Mapping[str, Any]) -> str:
    """Return a summary for people."""
    lines = [
        f"{summary['prompts']} prompts, {summary['rated']} completions rated by {summary['judge']}; "
        f"{summary['unreadable']} ratings unreadable, {summary['failed']} prompts without ratings",
        *_spent(summary),
        *_ratings(summary["ratings"]),
    ]
    if summary["again"]:
        again = summary["again"]
        same_best = "" if again["same_best"] is None else f", the same best one in {again['same_best']:.1%} of prompts"
        correlation = "" if again["correlation"] is None else f", correlation {again['correlation']:.2f}"
        lines.append(
            f"  again in another order, {again['prompts']} prompts: the same rating for {again['exact']:.1%} of "
            f"completions, within 1 for {again['within_one']:.1%}{same_best}{correlation}"
        )
    if summary["position"]:
        places = zip(summary["position"]["mean_rating"], summary["position"]["best"], strict=True)
        shown = ("-" if mean is None else f"{mean:.2f} ({best:.2f})" for mean, best in places)
        lines.append(
            "  mean rating by place in the judge's order (in brackets, wins over those by chance; 1.00: no bias): "
            f"{', '.join(shown)}"
        )
    if summary["tied"]:
        lines.append(f"  {summary['tied']} prompts whose completions all have the same score, which make no pair")
    seen = summary["rated"] + summary["unrated"]
    if summary["unrated"] and summary["unrated"] >= MANY * seen:
        lines.append(
            f"warning: {summary['judge']} answered, but {summary['unrated'] / seen:.0%} of the completions have no "
            "rating that can be read: raise --max-new-tokens, or change the judge or its instructions"
        )
    if summary["different"] == 1 and summary["rated"] > 1:
        lines.append(
            f"warning: {summary['judge']} gave everything the same score; nothing can be learned from that: change the "
            "judge or its instructions"
        )
    return "\n".join(lines)


def _spent(summary: Mapping[str, Any]) -> list[str]:
    if not summary["requests"]:
        return []
    tokens = (summary["prompt_tokens"], summary["completion_tokens"])
    counted = (
        "tokens not counted by the server" if None in tokens else f"{tokens[0]:,} tokens read, {tokens[1]:,} written"
    )
    cost = "" if summary["cost"] is None else f", ${summary['cost']:.4f}"
    return [f"  {summary['requests']} requests, {counted}{cost}"]


def _ratings(ratings: Mapping[str, Mapping[str, int]]) -> list[str]:
    if not ratings:
        return []
    width = max(map(len, ratings))
    rows = (
        f"  {aspect:{width}} {' '.join(f'{number:6d}' for number in counts.values())}"
        for aspect, counts in ratings.items()
    )
    return [f"  {'':{width}} {' '.join(f'{rating:>6}' for rating in '12345')}", *rows]
