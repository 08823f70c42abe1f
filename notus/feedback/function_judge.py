"""A judge that is a Python function of the user's own: `notus rate --judge-function FILE.py:NAME`.

The function is called `f(prompt, completions)` with strings, once per question, in this process. It returns one entry
per completion: a number from 1 to 5, which is the rating of the aspect `overall`; or a dict of such numbers by aspect,
each alone or as (number, rationale). None in the place of a number means that the completion is not rated.

A function that raises, or that returns something else, ends the command at once: it is the user's to mend, and the
verdicts so far are kept. So a function that asks a network must try again by itself.
"""

import argparse
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from notus.evaluation.win_rate import load_function
from notus.feedback.judge import Annotation, Judge, JudgeError, Question, Verdict
from notus.runtime.process import first_line

OVERALL = "overall"
LOWEST, HIGHEST = 1, 5
Function = Callable[[str, list[str]], Any]


def make_judge(args: argparse.Namespace) -> Judge:
    """Return the judge that `args.judge_function` names. Raises ValueError if there is no such function."""
    return FunctionJudge(args.judge_function, *load_function(args.judge_function))


class FunctionJudge:
    """Rates by calling a function."""

    shared = False  # a function of the user's own may hold files or count its calls, so one process calls it

    def __init__(self, name: str, function: Function, source: str) -> None:
        """`name` is what errors call it; `source` is a digest of its code."""
        self.name, self.identity = name, f"function\n{source}"
        self._function = function

    def rate(self, questions: Sequence[Question], done: Callable[[Question, Verdict | JudgeError], None]) -> None:
        """Call the function once per question, in their order. Raises ValueError for a function that fails."""
        for question in questions:
            done(question, self._verdict(question))

    def _verdict(self, question: Question) -> Verdict:
        place = f"--judge-function {self.name}, for the completions of {question.place}"
        try:
            returned = self._function(question.prompt, list(question.completions))
        except (Exception, SystemExit) as error:  # the function is the user's, and may raise anything
            raise ValueError(f"{place}: {type(error).__name__}: {first_line(error)}{_line(error)}") from error
        try:
            return Verdict(_read(returned, len(question.completions)))
        except ValueError as error:
            raise ValueError(f"{place}: it returned {error}") from error


def _line(error: BaseException) -> str:
    """Where it was raised, for somebody who sees no traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if len(frames) > 1 else ""


def _read(returned: Any, count: int) -> list[dict[str, Annotation]]:
    """Return what a function said of `count` completions. Raises ValueError, which begins with what is wrong."""
    if hasattr(returned, "tolist"):  # an array or a tensor
        returned = returned.tolist()
    if not isinstance(returned, Sequence) or isinstance(returned, str | bytes):
        raise ValueError(f"{_shown(returned)}; return a list with one rating per completion")
    if len(returned) != count:
        raise ValueError(f"{len(returned)} ratings for {count} completions; return one for each")
    read = [_completion(entry, f"for completion {number}") for number, entry in enumerate(returned, start=1)]
    for number, annotations in enumerate(read, start=1):
        if annotations.keys() != read[0].keys():  # means over different aspects do not compare
            raise ValueError(
                f"the aspects {', '.join(annotations)} for completion {number}, but {', '.join(read[0])} for "
                "completion 1; return the same for each, with None where there is no rating"
            )
    return read


def _completion(entry: Any, where: str) -> dict[str, Annotation]:
    if not isinstance(entry, Mapping):
        return {OVERALL: Annotation(_rating(entry, where))}
    if not entry:
        raise ValueError(f"an empty dict {where}; return at least one aspect")
    annotations = {}
    for aspect, value in entry.items():
        if not isinstance(aspect, str) or not aspect.strip():
            raise ValueError(f"the aspect {_shown(aspect)} {where}; name aspects by strings")
        rationale = ""
        if isinstance(value, tuple | list):
            if len(value) != 2 or not isinstance(value[1], str):
                raise ValueError(f"{_shown(value)} {where}, aspect {aspect}; return (number, rationale)")
            value, rationale = value
        annotations[aspect] = Annotation(_rating(value, f"{where}, aspect {aspect}"), rationale)
    return annotations


def _rating(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{_shown(value)} {where}; return a number from {LOWEST} to {HIGHEST}, or None for no rating")
    number = float(value)
    if not math.isfinite(number) or not LOWEST <= number <= HIGHEST:
        raise ValueError(f"{value} {where}; return a number from {LOWEST} to {HIGHEST}, or None for no rating")
    return number


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
