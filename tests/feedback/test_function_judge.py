"""The judge that is a Python function: what it is asked, what it may return, and how its mistakes are named."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from notus.feedback.function_judge import FunctionJudge, make_judge
from notus.feedback.judge import Annotation, Question

FUNCTION = '''
def lengths(prompt, completions):
    """One point per letter."""
    return [len(text) for text in completions]

def fails(prompt, completions):
    words = prompt.split()
    return words[99]
'''


def asked(*completions, prompt="Count to three.", place="records.jsonl, line 7"):
    return Question("key", place, prompt, completions, range(len(completions)))


def judged(function, *completions):
    """What the judge says of these completions."""
    found = []
    FunctionJudge("mine", function, "digest").rate([asked(*completions)], lambda *each: found.append(each))
    ((_, verdict),) = found
    return verdict


def returned(value, count=2):
    return judged(lambda prompt, completions: value, *["answer"] * count).annotations


def make(spec):
    return make_judge(argparse.Namespace(judge_function=str(spec)))


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTION)
    return tmp_path / "mine.py"


def test_a_function_sees_the_prompt_and_the_completions_in_the_judges_order(file):
    judge, found = make(f"{file}:lengths"), []
    questions = [asked("abcd", "a", "abc"), asked("ab", "abcde")]
    judge.rate(questions, lambda question, verdict: found.append((question, verdict)))
    assert [question for question, _ in found] == questions
    assert [[each["overall"] for each in verdict.annotations] for _, verdict in found] == [
        [Annotation(4.0), Annotation(1.0), Annotation(3.0)],
        [Annotation(2.0), Annotation(5.0)],
    ]
    seen = []
    judged(lambda *given: seen.append(given) or [1, 2], "x", "y")
    assert seen == [("Count to three.", ["x", "y"])]


def test_what_a_function_may_return():
    assert returned([1, 4.5]) == [{"overall": Annotation(1.0)}, {"overall": Annotation(4.5)}]
    assert returned((None, 2)) == [{"overall": Annotation(None)}, {"overall": Annotation(2.0)}]
    for several in (np.array([1, 5]), np.array([1.0, 5.0], np.float32), torch.tensor([1, 5]), [np.int64(1), 5]):
        assert [each["overall"].rating for each in returned(several)] == [1.0, 5.0]
    aspects = [{"honesty": 3, "helpfulness": (2, "too short")}, {"honesty": None, "helpfulness": 5}]
    assert returned(aspects) == [
        {"honesty": Annotation(3.0), "helpfulness": Annotation(2.0, "too short")},
        {"honesty": Annotation(None), "helpfulness": Annotation(5.0)},
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "NoneType None; return a list"),
        ("45", "str '45'; return a list"),
        (3, "int 3; return a list"),
        ({"overall": 3}, "dict {'overall': 3}; return a list"),
        ([1], "1 ratings for 2 completions"),
        ([1, 2, 3], "3 ratings for 2 completions"),
        ([1, True], "bool True for completion 2"),
        ([1, "5"], "str '5' for completion 2"),
        ([0, 1], "0 for completion 1; return a number from 1 to 5"),
        ([1, 5.01], "5.01 for completion 2"),
        ([1, float("nan")], "nan for completion 2"),
        ([1, float("inf")], "inf for completion 2"),
        ([1, {"overall": 1, "honesty": 2}], "the aspects overall, honesty for completion 2, but overall for"),
        ([{}, {}], "an empty dict for completion 1"),
        ([{3: 4}, {3: 4}], "the aspect int 3 for completion 1"),
        ([{"a": 1}, {"a": "high"}], "str 'high' for completion 2, aspect a"),
        ([{"a": 1}, {"a": (1, 2)}], "tuple (1, 2) for completion 2, aspect a"),
        ([{"a": 1}, {"a": 6}], "6 for completion 2, aspect a"),
    ],
)
def test_what_a_function_must_not_return(value, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        returned(value)
    place = "--judge-function mine, for the completions of records.jsonl, line 7: it returned "
    assert str(caught.value).startswith(place + said)
    assert "\n" not in str(caught.value)


def test_a_function_that_raises_ends_the_work_with_its_line(file):
    judge, found = make(f"{file}:fails"), []
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is checked below)
        judge.rate([asked("a")], lambda *each: found.append(each))
    place = f"--judge-function {file}:fails, for the completions of records.jsonl, line 7"
    assert str(caught.value) == f"{place}: IndexError: list index out of range (mine.py, line 8)"
    assert found == []


def test_what_was_judged_before_a_failure_is_reported():
    found, answers = [], iter([[1], [2]])
    judge = FunctionJudge("mine", lambda *_: next(answers), "digest")
    with pytest.raises(ValueError, match="StopIteration"):
        judge.rate([asked("a"), asked("b"), asked("c")], lambda question, _: found.append(question.completions))
    assert found == [("a",), ("b",)]


def test_a_function_that_exits_is_a_failure_too():
    def leaves(*_):
        raise SystemExit(0)

    with pytest.raises(ValueError, match="SystemExit: 0"):
        judged(leaves, "a")


def test_an_edited_function_is_another_judge(file):
    before = make(f"{file}:lengths")
    assert before.name == f"{file}:lengths"
    assert make(f"{file}:lengths").identity == before.identity
    assert make(f"{file}:fails").identity != before.identity
    file.write_text(FUNCTION.replace("len(text)", "len(text) + 1"))
    assert make(f"{file}:lengths").identity != before.identity


def test_a_function_that_is_not_there(file):
    with pytest.raises(ValueError, match="has no function 'other'"):
        make(f"{file}:other")


def test_the_function_in_the_docs(tmp_path):
    docs = Path(__file__).resolve().parents[2] / "docs" / "sample-and-rate.md"
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", docs.read_text(), re.DOTALL) if "def rate(" in each)
    (tmp_path / "my_judge.py").write_text(block)
    found = []
    make(tmp_path / "my_judge.py:rate").rate([asked("long", "a", "b")], lambda _, verdict: found.append(verdict))
    assert [each["overall"].rating for each in found[0].annotations] == [1.0, 5.0, 5.0]
