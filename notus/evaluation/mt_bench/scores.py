"""Scores of judgments: per turn, per category, in all, for every model that a file holds; as table and figures."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.data.sources import read_file
from notus.evaluation.mt_bench.inputs import HIGHEST, UNREAD
from notus.evaluation.results import Figure

NAME = "MT-Bench"
# Mean scores, of how many turns of how many questions, and the judges that count as the one that gave them.
PUBLISHED = {"Zephyr-7B-β": 7.34, "Notus 7B v1": 7.30}
PUBLISHED_QUESTIONS, PUBLISHED_TURNS = 80, 160
PUBLISHED_BY = ("gpt-4", "gpt-4-0314", "gpt-4-0613")


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of some scores, and how many they are; NaN of none."""

    score: float
    count: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one judge gave one model, out of 10.

    Attributes:
        model, judge: who, by whom.
        overall: of all turns together, as FastChat has it.
        stderr: of the overall score, over questions, whose turns are not independent; NaN of a single one.
        questions: how many were scored.
        turns: by turn.
        categories: by category; empty where the questions are not known.
        unread: verdicts that could not be read; they count nowhere else.
    """

    model: str
    judge: str
    overall: Mean
    stderr: float
    questions: int
    turns: Mapping[int, Mean]
    categories: Mapping[str, Mean]
    unread: int


def read_judgments(path: Path) -> list[dict[str, Any]]:
    """The lines of FastChat's `*_single.jsonl`. Raises ValueError, naming the line, for what is no such judgment."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    lines = []
    for place, line in read_file(path):
        if not _is_judgment(line):
            raise ValueError(
                f"{place}: not a judgment of a single answer (question_id, model, turn, judge, "
                "and a score of -1 or 0 to 10); give the file that FastChat calls JUDGE_single.jsonl"
            )
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: the file holds no judgments; give one that does")
    return lines


def _is_judgment(line: Any) -> bool:
    if not isinstance(line, dict) or not _is_score(line.get("score")):
        return False
    known = isinstance(line.get("question_id"), int | str) and line.get("turn") in (1, 2)
    judge = line.get("judge", [""])  # of the first files none is named
    return known and isinstance(line.get("model"), str) and isinstance(judge, list) and bool(judge)


def _is_score(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (value == UNREAD or 0 <= value <= HIGHEST)  # NaN is neither


def score(lines: Iterable[Mapping[str, Any]], categories: Mapping[int | str, str] | None = None) -> list[Scores]:
    """The scores of each model by each judge, the best first.

    Of several judgments of the same turn the last with a score counts; FastChat's `show_result` averages them all.

    Args:
        lines: judgments in FastChat's format.
        categories: of the questions, by their ids.
    """
    last: dict[tuple[str, str], dict[tuple[int | str, int], float]] = {}
    for line in lines:
        judge = str(line.get("judge", [""])[0])
        of_model = last.setdefault((line["model"], judge), {})
        turn = (line["question_id"], line["turn"])
        if line["score"] != UNREAD or turn not in of_model:
            of_model[turn] = line["score"]
    scores = [_of_model(*key, of_model, categories or {}) for key, of_model in last.items()]
    return sorted(scores, key=lambda each: (math.isnan(each.overall.score), -each.overall.score, each.model))


def _of_model(
    model: str, judge: str, of_turn: Mapping[tuple[int | str, int], float], categories: Mapping[int | str, str]
) -> Scores:
    read = {key: value for key, value in of_turn.items() if value != UNREAD}
    by_question: dict[int | str, list[float]] = {}
    by_category: dict[str, list[float]] = {}
    by_turn: dict[int, list[float]] = {1: [], 2: []}
    for (question, turn), value in read.items():
        by_question.setdefault(question, []).append(value)
        by_turn[turn].append(value)
        if question in categories:
            by_category.setdefault(categories[question], []).append(value)
    overall = _mean(list(read.values()))
    return Scores(
        model,
        judge,
        overall,
        _stderr(overall, list(by_question.values())),
        len(by_question),
        {turn: _mean(values) for turn, values in by_turn.items() if values},
        {name: _mean(by_category[name]) for name in dict.fromkeys(categories.values()) if name in by_category},
        len(of_turn) - len(read),
    )


def _stderr(overall: Mean, questions: Sequence[Sequence[float]]) -> float:
    """Of a mean over turns, which come in `questions`, some with a turn less: a ratio of two means, to first order."""
    if len(questions) < 2:
        return math.nan
    excess = [sum(values) - overall.score * len(values) for values in questions]
    return statistics.stdev(excess) * math.sqrt(len(questions)) / overall.count


def _mean(values: Sequence[float]) -> Mean:
    return Mean(statistics.fmean(values) if values else math.nan, len(values))


def figures(scores: Sequence[Scores], dataset: str | None = None) -> list[Figure]:
    """The overall score of each model, then its turns and categories; none of a model without any score.

    Published scores stand beside those by the same judge of as many questions and turns. Of several models the setup
    names the one that a figure is of. `dataset`: of the questions, as `Figure` has it.
    """
    from notus.evaluation.names import public_name  # imports torch, which scores alone do without

    found = []
    for each in scores:
        if math.isnan(each.overall.score):
            continue
        told = f"judged by {public_name(each.judge)}"  # a server of one's own names a model by its folder
        told = f"{public_name(each.model)}, {told}" if len(scores) > 1 else told
        told += f", {each.unread} verdicts not readable" if each.unread else ""
        stderr = None if math.isnan(each.stderr) else each.stderr
        told += "" if each.questions == PUBLISHED_QUESTIONS else f", {each.questions} questions"
        parts = {"score": each.overall}
        parts |= {f"score, turn {turn}": mean for turn, mean in each.turns.items()}
        parts |= {f"score, {category}": mean for category, mean in each.categories.items()}
        for metric, mean in parts.items():
            overall = mean is each.overall
            reference = PUBLISHED if overall and _comparable(each) else {}
            error = stderr if overall else None
            found.append(Figure(NAME, metric, mean.score, "", error, mean.count, told, dataset, reference))
    return found


def _comparable(scores: Scores) -> bool:
    """Whether published scores may stand beside these."""
    whole = (scores.questions, scores.overall.count) == (PUBLISHED_QUESTIONS, PUBLISHED_TURNS)
    return scores.judge in PUBLISHED_BY and whole


def plain(scores: Scores) -> dict[str, Any]:
    """Scores as JSON, in which NaN has no place."""
    return {
        "model": scores.model,
        "judge": scores.judge,
        "score": None if math.isnan(scores.overall.score) else scores.overall.score,
        "scored": scores.overall.count,
        "unread": scores.unread,
        "turns": {str(turn): dataclasses.asdict(mean) for turn, mean in scores.turns.items()},
        "categories": {name: dataclasses.asdict(mean) for name, mean in scores.categories.items()},
    }


def table(scores: Sequence[Scores]) -> str:
    """The scores for a terminal, a line for every model."""
    categories = list(dict.fromkeys(name for each in scores for name in each.categories))
    width = max([5, *(len(each.model) for each in scores)])
    judges = max([5, *(len(each.judge) for each in scores)])
    heads = ["all", "s.e.", "turn 1", "turn 2", *categories, "scored", "unread"]
    lines = [f"{'model':{width}}  {'judge':{judges}}" + "".join(_cell(head, head) for head in heads)]
    for each in scores:
        means = [each.turns.get(1), each.turns.get(2), *(each.categories.get(name) for name in categories)]
        values = [each.overall.score, each.stderr, *(mean.score if mean else math.nan for mean in means)]
        cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
        cells += [str(each.overall.count), str(each.unread)]
        row = "".join(_cell(head, cell) for head, cell in zip(heads, cells, strict=True))
        lines.append(f"{each.model:{width}}  {each.judge:{judges}}{row}")
    if any(_comparable(each) for each in scores):
        published = ", ".join(f"{name} {value:.2f}" for name, value in PUBLISHED.items())
        lines.append(f"published, judged by GPT-4: {published}")
    return "\n".join(lines)


def _cell(head: str, text: str) -> str:
    return f"{text:>{max(8, len(head) + 2)}}"
