"""What is read from a judge's reply, and what is not."""

import json
import time
from typing import Any

import pytest

from notus.feedback.judge import Annotation
from notus.feedback.parse_ratings import parse_ratings, read_rating

ASPECTS = ("honesty", "help-fulness")
X = None  # unreadable, or not there


def read(reply: str, count: int = 2, aspects: tuple[str, ...] = ASPECTS) -> Any:
    """The ratings by completion, in the order of the aspects; None where there is none."""
    found = parse_ratings(reply, count, aspects)
    return found and [[each[aspect].rating for aspect in aspects] for each in found]


BOTH = [[4.0, 2.0], [1.0, 5.0]]
PLAIN = {"completion_1": {"honesty": 4, "help-fulness": 2}, "completion_2": {"honesty": 1, "help-fulness": 5}}
TEXT = json.dumps(PLAIN)


def two(first: str, second: str) -> str:
    """The answer that is asked for, with what stands in each completion's braces."""
    return f'{{"completion_1": {{{first}}}, "completion_2": {{{second}}}}}'


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (TEXT, BOTH),
        (f"Sure, here it is:\n```json\n{TEXT}\n```\nI hope that helps {{or not}}.", BOTH),
        (TEXT.replace("}", ",}"), BOTH),
        (TEXT.replace('"', "'"), BOTH),
        (TEXT.replace("4", '"4"').replace("5", '"5/5"').replace(": 1", ': "1 / 5"').replace(": 2", ': "2.0"'), BOTH),
        (json.dumps({"ratings": PLAIN, "summary": "fine"}), BOTH),
        (json.dumps({"ratings": [{"id": 2, **PLAIN["completion_2"]}, {"id": 1, **PLAIN["completion_1"]}]}), BOTH),
        (json.dumps(list(PLAIN.values())), BOTH),
        (json.dumps({"1": PLAIN["completion_1"], "2": PLAIN["completion_2"]}), BOTH),
        (json.dumps({"Completion 1": PLAIN["completion_1"], "Response B": PLAIN["completion_2"]}), BOTH),
        ('{"honesty": [4, 1], "Help Fulness": {"1": 2, "completion_2": {"score": "5"}}}', BOTH),
        ('{"id": 1, "honesty": 4, "help-fulness": 2}\n{"completion": 2, "honesty": 1, "help-fulness": 5}', BOTH),
        ('{"A": {"honesty_rating": 4, "help-fulness_score": 2}, "B": {"honesty": 1, "help_fulness": 5}}', BOTH),
        (two('"ratings": {"honesty": 4, "help-fulness": 2}', '"Honesty": 1, "HELPFULNESS": 5'), BOTH),
        (f'<think>Perhaps {{"completion_1": {{"honesty": 1}}}}?</think>{TEXT}', BOTH),
        ("{'1': {'honesty': {'rationale': \"it's so\", 'rating': 4}}, '2': None}", [[4.0, X], [X, X]]),
        # cut off: what is complete counts
        (TEXT[:-6], [[4.0, 2.0], [X, X]]),
        ('{"1": {"honesty": {"rating": 4}, "help-fulness": {"rating": 3}}, "2": {"hon', [[4, 3], [X, X]]),
        # missing
        ('{"completion_2": {"honesty": 3}}', [[X, X], [3.0, X]]),
        # out of range, or no number
        (two('"honesty": 0, "help-fulness": 6', '"honesty": NaN, "help-fulness": 5'), [[X, X], [X, 5.0]]),
        (two('"honesty": "4 or 5", "help-fulness": "7/10"', '"honesty": true, "help-fulness": 5'), [[X, X], [X, 5.0]]),
        # given twice
        (two('"honesty": 4, "honesty": 2', '"honesty": 3, "honesty": 3'), [[X, X], [3.0, X]]),
        # a draft among thoughts that the template has opened, so that only their end is in the reply
        ('It may be {"completion_1": {"honesty": 5}}.\n</think>\n' + TEXT, BOTH),
        (TEXT + ' {"completion_1": {"honesty": 5}} {"completion_1": {"honesty": 4}}', [[X, 2.0], [1.0, 5.0]]),
        # the form that was asked for, repeated before the answer
        (two('"honesty": {"rating": "..."}', '"honesty": {"rating": "..."}') + TEXT, BOTH),
    ],
)  # fmt: skip
def test_replies_that_hold_ratings(reply: str, expected: Any) -> None:
    assert read(reply) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot rate these.",
        "Completion 1 is a 4, completion 2 a 5.",
        # one more than there are, or counted from 0: which is which, nobody knows
        json.dumps({**PLAIN, "completion_3": {"honesty": 1}}),
        '{"0": {"honesty": 4}, "1": {"honesty": 1}}',
        '[{"honesty": 4}, {"honesty": 1}, {"honesty": 2}]',
        '[{"index": 0, "honesty": 4}, {"index": 1, "honesty": 1}]',
        '{"honesty": 4, "help-fulness": 2}',  # of which of the two?
        '{"completion_1": {"style": 4}}',
        '{"completion_1": {"honesty": 9}}',
        # in Python's spelling, a completion that is there twice
        "{'completion_1': {'honesty': 4}, 'completion_1': {'honesty': 2}}",
        "null",
        "4",
    ],
)
def test_replies_that_hold_none(reply: str) -> None:
    assert read(reply) is None


def test_a_single_completion_needs_no_number_and_a_single_aspect_no_name() -> None:
    assert read('{"honesty": 4, "help-fulness": {"rating": 2}}', count=1) == [[4.0, 2.0]]
    assert read("As [4, 2] says", count=2, aspects=("honesty",)) is None  # may be anything
    assert read('{"completion_1": 3, "completion_2": {"rating": 5}}', aspects=("honesty",)) == [[3.0], [5.0]]


def test_a_rationale_is_kept_and_what_does_not_apply_is_not_unreadable() -> None:
    of_one = '{"honesty": {"rationale": "plain", "rating": "N/A"}, "help-fulness": {"Rating": 2, "Reason": "so\\nso"}}'
    reply = f'{{"1": {of_one}}}'
    assert parse_ratings(reply, 1, ASPECTS) == [
        {"honesty": Annotation(None, "plain"), "help-fulness": Annotation(2.0, "so\nso")}
    ]
    flat = '{"1": {"honesty": 3, "honesty_rationale": "why", "help-fulness": "-"}}'
    assert parse_ratings(flat, 1, ASPECTS) == [
        {"honesty": Annotation(3.0, "why"), "help-fulness": Annotation(None, unreadable=True)}
    ]


@pytest.mark.parametrize(
    "reply",
    ["[" * 200_000, '{"a":' * 100_000, '{"' * 100_000, '"' * 99_999 + "{" * 1000, "{'a'" * 50_000, "[1," * 200_000,
     '{"a": "' + "\\" * 300_000, "<think>" * 50_000],
)  # fmt: skip
def test_hostile_replies_cost_little_time(reply: str) -> None:
    start = time.monotonic()
    assert read(reply) is None
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [(4, 4.0), (4.5, 4.5), ("4 out of 5", 4.0), ("3 stars", 3.0), ("Rating: 2", 2.0), (" 5. ", 5.0), ("n/a", None)],
)
def test_ratings_that_are_read(value: Any, expected: float | None) -> None:
    assert read_rating(value) == (expected, False)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 5.5, "0", "6", "-3", "4/10", "four", [4], {"a": 4}, float("inf"), 10**400, "1e0", "9" * 500],
)
def test_ratings_that_are_not(value: Any) -> None:
    assert read_rating(value) == (None, True)
