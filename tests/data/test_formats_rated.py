"""Lists of rated completions and labelled completions, each read into the one normal form, and what is refused."""

from typing import Any

import pytest

from notus.data.formats import (
    LABEL_FORMS,
    LIST_FORMS,
    Reading,
    Record,
    find_form,
    guess_task,
    normalize,
    readings,
    unknown_columns,
    used_columns,
)

NAN = float("nan")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def listed(*completions: Any, ratings: Any, prompt: Any = "q", **others: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completions": list(completions), "ratings": ratings, **others}


PROMPT = [{"role": "system", "content": "s"}, user("q")]
SORTED = ([assistant("best")], [assistant("fair")], [assistant("poor")])


class TestLists:
    @pytest.mark.parametrize(
        ("row", "prompt", "completions"),
        [
            (listed("poor", "best", "fair", ratings=[1, 5, 3.5]), "q", ("best", "fair", "poor")),
            (listed("poor", "best", "fair", ratings=[1, 5, 3.5], prompt=PROMPT), PROMPT, SORTED),
            (
                listed([assistant("poor")], [assistant("best")], [assistant("fair")], ratings=[1, 5, 3.5]),
                [user("q")],
                SORTED,
            ),
            (
                listed(*([*PROMPT, *each] for each in reversed(SORTED)), ratings=[1, 2, 3], prompt=PROMPT),
                PROMPT,
                SORTED,
            ),
            (listed(*([*PROMPT, *each] for each in reversed(SORTED)), ratings=[1, 2, 3]), PROMPT, SORTED),
            (
                {"instruction": "q", "input": "x", "completions": ["poor", "best", "fair"], "ratings": [1, 3, 2]},
                [user("q\nx")],
                SORTED,
            ),
            ({"messages": PROMPT, "completions": ["poor", "best", "fair"], "ratings": [-1, 1, 0]}, PROMPT, SORTED),
            (
                {
                    "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                    "completions": [{"from": "gpt", "value": text} for text in ("poor", "best", "fair")],
                    "ratings": [1, 3, 2],
                },
                PROMPT,
                SORTED,
            ),
            (listed("poor", "best", "fair", ratings=[1, 3, 2], system="s"), PROMPT, SORTED),
            # as CSV has them
            (
                {"prompt": "q", "completions": '["poor", "best", "fair"]', "ratings": "[1, 3, 2]"},
                "q",
                ("best", "fair", "poor"),
            ),
        ],
    )
    def test_are_read_best_first(self, row: dict[str, Any], prompt: Any, completions: Any) -> None:
        assert normalize(row, "lists") == Record(prompt, completions)

    def test_ties_keep_their_order(self) -> None:
        (found,) = readings(listed("a", "b", "c", "d", ratings=[2, 3, 2, 3]), "lists")
        assert found.record.completions == ("b", "d", "a", "c")
        assert found.ratings == (3, 3, 2, 2)

    @pytest.mark.parametrize("nothing", [None, NAN, "", "nan"])
    def test_a_completion_without_a_rating_or_null_is_left_out(self, nothing: Any) -> None:
        row = listed("a", "b", None, "d", ratings=[1, nothing, 5, "2.5"], source="flan")
        assert readings(row, "lists") == [Reading(Record("q", ("d", "a")), "flan", (2.5, 1), None, 2)]

    @pytest.mark.parametrize("ratings", [[], [3], [None, 3], [None, None]])
    def test_fewer_than_two_are_no_list(self, ratings: list[Any]) -> None:
        (found,) = readings(listed(*"ab"[: len(ratings)], ratings=ratings), "lists")
        assert (found.record.completions, found.ratings, found.left_out) == ((), None, ratings.count(None))

    def test_equal_completions_of_different_ratings_are_both_kept(self) -> None:
        (found,) = readings(listed("a", "b", "a", ratings=[1, 2, 3]), "lists")
        assert (found.record.completions, found.ratings) == (("a", "b", "a"), (3, 2, 1))

    def test_a_pair_is_a_list_of_two(self) -> None:
        pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
        (bare,) = readings(pair, "lists")
        assert bare == Reading(Record("q", ("good", "bad")))
        (rated,) = readings({**pair, "chosen-rating": 4, "rejected-rating": 4}, "lists")
        assert rated == Reading(Record("q", ("good", "bad")), None, (4, 4))
        (half,) = readings({**pair, "rejected-rating": 4}, "lists")
        assert half == Reading(Record("q", ("good", "bad")), None, (None, 4))

    def test_a_pair_goes_by_its_ratings(self) -> None:
        row = {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": 2, "score_rejected": 3}
        assert readings(row, "lists") == [Reading(Record("q", ("bad", "good")), None, (3, 2))]
        assert readings(row, "dpo") == [Reading(Record("q", ("good", "bad")), None, (2, 3))]
        assert readings(row, "sft") == [Reading(Record("q", ("good",)), None, (2,))]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (listed("a", "b", ratings=[1]), r"'completions' has 2 entries, but key 'ratings' has 1; give a rating"),
            (listed("a", "b", ratings=[1, "good"]), r"key 'ratings', entry 2 is 'good', but must be a finite number"),
            (listed("a", "b", ratings=[True, 1]), r"key 'ratings', entry 1 is True"),
            (listed("a", "b", ratings=[float("inf"), 1]), r"entry 1 is inf"),
            (listed("a", "b", ratings=["N/A", 1]), r"entry 1 is 'N/A', but must be a finite number, or null"),
            (listed("a", "b", ratings=[[1], 1]), r"entry 1 is \[1\]"),
            (listed("a", "b", ratings=3), r"key 'ratings' is of type int, but must be a list of numbers"),
            (listed("a", "b", ratings=None), r"key 'ratings' is null, but must be a list of numbers"),
            (listed("a", "b", ratings="best"), r"key 'ratings' is no JSON"),
            (listed("a", 3, ratings=[1, 2]), r"key 'completions, entry 2' is of type int"),
            (listed("a", [{"role": "user"}], ratings=[1, 2]), r"'completions, entry 2', turn 1 has the keys role"),
            (listed("a", [user("p"), assistant("x")], ratings=[1, 2], prompt=PROMPT), r"entry 2' begins with a user"),
            (listed("a", "b", ratings=[1, 2], label=True), r"column 'label'.*dpo.loss_type=kto"),
            (listed("a", "b", ratings=[1, 2], chosen="c"), r"its key 'chosen' says something else"),
            ({"instruction": "q", "completions": [{"model": "m"}]}, r"notus curate --listwise"),
            ({"prompt": "q", "completion": "a", "label": 1}, r"no known lists form.*dpo.loss_type=kto"),
            ({"text": "q"}, r"no known lists form \(prompt\+completions\+ratings;"),
        ],
    )
    def test_refused(self, row: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            readings(row, "lists")

    def test_a_copy_of_a_completion_may_stand_beside_it(self) -> None:
        row = listed("poor", "best", ratings=[1, 2], chosen="best", rejected="poor")
        assert normalize(row, "lists").completions == ("best", "poor")
        assert normalize(row, "dpo") == Record("q", ("best", "poor"))

    @pytest.mark.parametrize("task", ["dpo", "sft", "labels"])
    def test_other_tasks_say_what_to_do_with_them(self, task: Any) -> None:
        with pytest.raises(ValueError, match=r"plackett_luce; for others make pairs.*without --listwise"):
            normalize(listed("a", "b", ratings=[1, 2]), task)


class TestLabels:
    @pytest.mark.parametrize(
        ("label", "expected"),
        [
            (True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False), ("true", True),
            ("False", False), (" TRUE\n", True), ("1", True), ("0", False), ("1.0", True), ("0.0", False),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("tag", ["label", "kto_tag"])
    def test_of_a_completion(self, label: Any, expected: bool, tag: str) -> None:
        row = {"prompt": "q", "completion": "a", tag: label, "source": "flan"}
        assert readings(row, "labels") == [Reading(Record("q", ("a",)), "flan", None, expected)]

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": [user("q")], "completion": [assistant("a")]},
            {"prompt": "q", "completion": [user("q"), assistant("a")]},
            {"instruction": "q", "output": "a"},
            {"messages": [user("q"), assistant("a")]},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ],
    )
    def test_every_form(self, row: dict[str, Any]) -> None:
        assert normalize({**row, "label": True}, "labels") == Record([user("q")], ([assistant("a")],))

    def test_of_a_conversation_is_of_its_last_answer(self) -> None:
        talk = [*PROMPT, assistant("a"), user("more"), assistant("b")]
        assert normalize({"messages": talk, "label": 0}, "labels") == Record(talk[:4], (talk[4:],))

    def test_a_pair_is_a_good_and_a_bad_one(self) -> None:
        row = {"prompt": PROMPT, "chosen": "good", "rejected": "bad", "source": "x", "score_chosen": 4}
        assert readings(row, "labels") == [
            Reading(Record(PROMPT, ([assistant("good")],)), "x", (4,), True),
            Reading(Record(PROMPT, ([assistant("bad")],)), "x", None, False),
        ]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "q", "completion": "a", "label": 2}, r"key 'label' is 2, but must be a label: true or false"),
            ({"prompt": "q", "completion": "a", "label": "yes"}, r"key 'label' is 'yes'"),
            ({"prompt": "q", "completion": "a", "label": [True]}, r"key 'label' is \[True\]"),
            ({"prompt": "q", "completion": "a", "label": NAN}, r"key 'label' is nan"),
            ({"prompt": "q", "completion": "a", "label": None}, r"key 'label' is null, but must be a label"),
            ({"prompt": "q", "completion": "a", "label": True, "kto_tag": False}, r"contradict each other"),
            ({"prompt": "q", "completion": "a", "label": True, "kto_tag": "x"}, r"key 'kto_tag' is 'x'"),
            ({"messages": [user("q")], "label": True}, r"'messages' must end with an assistant turn.*'label' is a la"),
            ({"messages": [], "label": True}, r"'messages' must end with an assistant turn"),
            ({"messages": "q", "label": True}, r"key 'messages' is a string"),
            ({"prompt": "q", "chosen": "a", "rejected": "b", "label": 1}, r"of a pair, the chosen completion is the g"),
            ({"prompt": "q", "completion": "a"}, r"no known labels form \(prompt\+completion\+label;"),
        ],
    )
    def test_refused(self, row: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            readings(row, "labels")

    def test_two_names_may_agree(self) -> None:
        (found,) = readings({"prompt": "q", "completion": "a", "label": "true", "kto_tag": 1}, "labels")
        assert found.label is True


def test_every_form_is_recognised_by_its_columns() -> None:
    for form in LIST_FORMS:
        assert find_form(dict.fromkeys(form, "x"), "lists") == form
    for form in LABEL_FORMS:
        assert find_form(dict.fromkeys(form, "x"), "labels") == form


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b", "completions": [], "ratings": [], "label": 1}, "dpo"),
        (listed("a", "b", ratings=[1, 2], label=1), "lists"),
        ({"prompt": "q", "completion": "a", "kto_tag": True}, "labels"),
        ({"messages": [], "label": False}, "labels"),
        ({"messages": [], "label": None}, "sft"),
    ],
)
def test_guessed_tasks(row: dict[str, Any], task: str) -> None:
    assert guess_task(row) == task


def test_columns_are_mapped_and_only_those_that_are_read_are_loaded() -> None:
    columns = {"question": "prompt", "responses": "completions", "scores": "ratings"}
    row = {"question": "q", "responses": ["a", "b"], "scores": [1, 2], "models": ["m", "n"], "source": "x"}
    assert readings(row, "lists", columns) == [Reading(Record("q", ("b", "a")), "x", (2, 1))]
    assert used_columns(list(row), "lists", columns) == ["question", "responses", "scores", "source"]
    assert unknown_columns(row, "lists", columns) == ["models"]
    names = ["prompt", "completion", "label", "completions", "ratings", "kto_tag"]
    assert used_columns(names, "labels") == ["prompt", "completion", "label", "kto_tag"]
    assert used_columns([*names, "chosen", "rejected"], "dpo") == ["prompt", "completion", "label", "kto_tag",
                                                                   "chosen", "rejected"]  # fmt: skip


def test_keys_of_messages_that_nothing_reads_are_named() -> None:
    turn = {**assistant("a"), "mood": "good"}
    assert unknown_columns(listed([turn], "b", ratings=[1, 2]), "lists") == ["completions[][].mood"]
