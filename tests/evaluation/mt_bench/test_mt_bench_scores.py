"""Means of judgments, worked out by hand."""

import math
from pathlib import Path
from typing import Any

import fastchat
import pytest

from notus.evaluation.mt_bench import suite
from notus.evaluation.mt_bench.fastchat import Judgment, read_judgments
from notus.evaluation.mt_bench.suite import figures, table


def score(lines: Any, categories: Any = None) -> Any:
    return suite.score([Judgment(**line) for line in lines], categories)


LINES = [
    fastchat.judgment(81, 1, 8),
    fastchat.judgment(81, 2, 6),
    fastchat.judgment(101, 1, 3),
    fastchat.judgment(101, 2, 4.5),
    fastchat.judgment(111, 1, 10),
    fastchat.judgment(111, 2, -1),
]


def test_scores_per_turn_per_category_and_in_all() -> None:
    (scores,) = score(LINES, fastchat.CATEGORIES)
    assert (scores.mean, scores.count) == (pytest.approx((8 + 6 + 3 + 4.5 + 10) / 5), 5)
    assert scores.turns == {1: [8, 3, 10], 2: [6, 4.5]}
    assert scores.categories == {"writing": [8, 6], "reasoning": [3, 4.5], "math": [10]}
    assert scores.unread == 1
    # of a mean of 6.3 a turn, questions have 14 - 12.6, 7.5 - 12.6 and 10 - 6.3; squares 1.96, 26.01, 13.69; 5/3 turns
    assert len(scores.questions) == 3
    assert scores.stderr == pytest.approx(math.sqrt((1.96 + 26.01 + 13.69) / 2 / 3) / (5 / 3))


def test_where_no_turn_lacks_the_standard_error_is_that_of_the_questions_means() -> None:
    lines = [*LINES[:5], fastchat.judgment(111, 2, 4)]  # means 7, 3.75 and 7
    assert score(lines)[0].stderr == pytest.approx(3.25 / 3)  # deviations 13/12, -26/12 and 13/12


def test_without_the_questions_there_are_no_categories() -> None:
    assert score(LINES)[0].categories == {}


def test_all_judgments_of_a_turn_that_hold_a_score_are_averaged_as_fastchat_does() -> None:
    lines = [fastchat.judgment(81, 1, 2), fastchat.judgment(81, 1, 8), fastchat.judgment(81, 1, -1)]
    for judgments in (lines, lines[::-1]):
        (scores,) = score(judgments, fastchat.CATEGORIES)
        assert (scores.mean, scores.count, scores.unread, scores.repeated) == (5, 2, 0, 1)
        assert sorted(scores.turns[1]) == sorted(scores.categories["writing"]) == [2, 8]
    told = "toy: 1 of 2 judgments judge a turn that was judged before; all are averaged, as FastChat does"
    assert table([scores]).splitlines()[-1] == told
    assert figures([scores])[0].setup == "judged by gpt-4, 1 of 2 judge a turn again, 1 questions"
    assert scores.as_json()["repeated"] == 1
    # FastChat's mean is over lines: (2 + 8 + 9) / 3, not the mean of 5 and 9
    (scores,) = score([*lines, fastchat.judgment(82, 1, 9)])
    assert scores.mean == pytest.approx(19 / 3)


def test_models_and_judges_are_kept_apart_the_best_first() -> None:
    lines = [
        fastchat.judgment(81, 1, 4, "a"),
        fastchat.judgment(81, 1, 7, "b"),
        fastchat.judgment(81, 1, 5, "a", "other"),
        fastchat.judgment(81, 1, -1, "c"),
    ]
    assert [(each.model, each.judge, each.count) for each in score(lines)] == [
        ("b", "gpt-4", 1),
        ("a", "other", 1),
        ("a", "gpt-4", 1),
        ("c", "gpt-4", 0),
    ]


def test_published_scores_stand_beside_those_of_the_same_judge_and_as_many_questions() -> None:
    def overall(count: int, judge: str, last: int = 1) -> Any:
        lines = [fastchat.judgment(number, turn, 8, judge=judge) for number in range(count) for turn in (1, 2)]
        lines[-1]["score"] = last
        return figures(score(lines))[0]

    assert overall(80, "gpt-4").reference == {"Zephyr-7B-β": 7.34, "Notus 7B v1": 7.30}
    assert overall(80, "gpt-4").setup == "judged by gpt-4"
    assert overall(80, "gpt-4o").reference == {}
    assert overall(79, "gpt-4").reference == {}
    assert overall(80, "gpt-4", -1).reference == {}  # a turn without a verdict
    twice = [fastchat.judgment(number, turn, 8) for number in range(80) for turn in (1, 2)]
    twice[-1] = twice[0]  # as many lines, but one turn is judged twice and another never
    assert figures(score(twice))[0].reference == {}


def test_figures_of_one_model() -> None:
    found = figures(score([fastchat.judgment(81, 1, 8)], fastchat.CATEGORIES), "question.jsonl")
    assert [(figure.metric, figure.value, figure.count) for figure in found] == [
        ("score", 8.0, 1),
        ("score, turn 1", 8.0, 1),
        ("score, writing", 8.0, 1),
    ]
    assert {(figure.name, figure.setup, figure.dataset, figure.stderr) for figure in found} == {
        ("MT-Bench", "judged by gpt-4, 1 questions", "question.jsonl", None)
    }


def test_figures_of_several_models_name_them() -> None:
    found = figures(score([fastchat.judgment(81, 1, 8, "a"), fastchat.judgment(81, 1, 7, "b")]))
    assert [figure.setup for figure in found if figure.metric == "score"] == [
        "a, judged by gpt-4, 1 questions",
        "b, judged by gpt-4, 1 questions",
    ]


def test_figures_tell_of_verdicts_that_could_not_be_read_and_of_no_folder() -> None:
    (found, *_) = figures(score([*LINES[:5], fastchat.judgment(111, 2, -1)]))
    assert found.setup == "judged by gpt-4, 1 verdicts not readable, 3 questions"
    (found, *_) = figures(score([fastchat.judgment(81, 1, 8, judge="/home/ada/models/llama")]))
    assert found.setup == "judged by llama, 1 questions"


def test_the_table_has_a_line_for_every_model() -> None:
    lines = [*LINES, fastchat.judgment(151, 1, -1, "nothing")]
    rows = [" ".join(line.split()) for line in table(score(lines, fastchat.CATEGORIES)).splitlines()]
    assert rows[0] == "model judge all s.e. turn 1 turn 2 writing reasoning math scored unread"
    assert rows[1] == "toy gpt-4 6.30 1.58 7.00 5.25 7.00 3.75 10.00 5 1"
    assert rows[2] == "nothing gpt-4 - - - - - - - 0 1"
    assert len(rows) == 3  # of so few questions no published scores
    whole = [fastchat.judgment(number, turn, 8) for number in range(80) for turn in (1, 2)]
    assert table(score(whole)).endswith("\npublished, judged by GPT-4: Zephyr-7B-β 7.34, Notus 7B v1 7.30")


def test_a_file_of_fastchat_whose_last_line_has_no_end(tmp_path: Path) -> None:
    path = fastchat.write_lines(tmp_path / "gpt-4_single.jsonl", LINES)
    path.write_text(path.read_text().rstrip("\n"))
    assert read_judgments(path) == [Judgment(**line) for line in LINES]


BAD: list[Any] = [
    3,
    {**LINES[0], "score": "8"},
    {**LINES[0], "score": None},
    {**LINES[0], "score": True},
    {**LINES[0], "score": math.nan},
    {**LINES[0], "score": 85},
    {**LINES[0], "score": -2},
    {**LINES[0], "turn": 3},
    {**LINES[0], "model": None},
    {**LINES[0], "question_id": None},
    {**LINES[0], "judge": "gpt-4"},
    {"question_id": 81, "model_1": "a", "model_2": "b", "g1_winner": "tie", "turn": 1},
]


@pytest.mark.parametrize("line", BAD)
def test_what_is_no_judgment_is_told_with_its_line(line: Any, tmp_path: Path) -> None:
    path = fastchat.write_lines(tmp_path / "j.jsonl", [LINES[0], line])
    with pytest.raises(ValueError, match=r"j\.jsonl, line 2: .*judgments of single answers"):
        read_judgments(path)


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file"):
        read_judgments(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="the file is empty"):
        read_judgments(fastchat.write_lines(tmp_path / "j.jsonl", []))
