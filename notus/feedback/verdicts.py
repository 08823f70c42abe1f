"""Verdicts on disk, kept as they come: JSON lines, one file per rank, by question."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from notus.evaluation.budget import Usage
from notus.evaluation.results import read_records
from notus.feedback.judge import Annotation, JudgeError, Question, Verdict


@dataclasses.dataclass
class Kept:
    """What the kept files hold: verdicts by question, the last failure of each other question, and all that it cost."""

    verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    usage: Usage = dataclasses.field(default_factory=Usage)


def kept_line(question: Question, outcome: Verdict | JudgeError) -> dict[str, Any]:
    """Return what is kept of an outcome."""
    usage = dataclasses.asdict(outcome.usage)
    if isinstance(outcome, JudgeError):
        return {"key": question.key, "failure": str(outcome), "usage": usage}
    annotations = [
        {aspect: [each.rating, each.rationale, each.unreadable] for aspect, each in of_one.items()}
        for of_one in outcome.annotations
    ]
    rewards = None if outcome.rewards is None else list(outcome.rewards)
    return {"key": question.key, "annotations": annotations, "rewards": rewards, "usage": usage}


def read_verdicts(folder: Path) -> Kept:
    """Read what all ranks kept. Raises ValueError, naming file and line, for what is no kept verdict."""
    kept = Kept()
    for path in sorted(folder.glob("verdicts-*.jsonl")):
        for line in read_records(path, "not a kept verdict; remove the line, or the file", _is_line):
            kept.usage += Usage(**line["usage"])
            if "failure" in line:
                kept.failures[line["key"]] = line["failure"]
                continue
            annotations = [
                {aspect: Annotation(*each) for aspect, each in of_one.items()} for of_one in line["annotations"]
            ]
            kept.verdicts[line["key"]] = Verdict(annotations, line["rewards"], Usage(**line["usage"]))
    return kept


def _is_line(line: dict[str, Any]) -> bool:
    """Whether a line holds what `kept_line` returns."""
    if not isinstance(line.get("key"), str) or not _is_usage(line.get("usage")):
        return False
    if "failure" in line:
        return isinstance(line["failure"], str)
    annotations, rewards = line.get("annotations"), line.get("rewards")
    if not isinstance(annotations, list) or not all(isinstance(of_one, dict) for of_one in annotations):
        return False
    if rewards is not None and not (isinstance(rewards, list) and all(map(_is_number, rewards))):
        return False
    return all(_is_annotation(value) for of_one in annotations for value in of_one.values())


def _is_usage(usage: Any) -> bool:
    if not isinstance(usage, dict) or set(usage) != {each.name for each in dataclasses.fields(Usage)}:
        return False
    tokens = (usage["prompt_tokens"], usage["completion_tokens"])
    known = [usage["requests"], usage["cost"], *(each for each in tokens if each is not None)]
    return all(_is_number(each) and each >= 0 for each in known)


def _is_annotation(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    rating, rationale, unreadable = value
    in_range = rating is None or (_is_number(rating) and 1 <= rating <= 5)
    return in_range and isinstance(rationale, str) and isinstance(unreadable, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
