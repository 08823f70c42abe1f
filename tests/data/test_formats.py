"""The input forms, each read into the one normal form, and what is refused."""

from typing import Any

import pytest

from notus.data.formats import PAIR_FORMS, SFT_FORMS, Provenance, Record, find_form, normalize, read_provenance


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}
PROMPT = [SYSTEM, user("q")]
CHAT = (PROMPT, ([assistant("good")], [assistant("bad")]))
SHORT = ([user("q")], ([assistant("good")], [assistant("bad")]))

PAIRS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain text": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, ("q", ("good", "bad"))),
    "messages": ({"prompt": PROMPT, "chosen": [assistant("good")], "rejected": [assistant("bad")]}, CHAT),
    "messages and answers as text": ({"prompt": PROMPT, "chosen": "good", "rejected": "bad"}, CHAT),
    "prompt as text and answers as messages": (
        {"prompt": "q", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        SHORT,
    ),
    "messages that repeat the prompt": (
        {"prompt": PROMPT, "chosen": [*PROMPT, assistant("good")], "rejected": [*PROMPT, assistant("bad")]},
        CHAT,
    ),
    "shared leading turns": ({"chosen": [*PROMPT, assistant("good")], "rejected": [*PROMPT, assistant("bad")]}, CHAT),
    "argilla v1": (
        {"source": "flan", "instruction": "q", "chosen_response": "good", "rejected_response": "bad"},
        SHORT,
    ),
    "argilla cleaned": (
        {
            "source": "flan",
            "prompt": "q",
            "chosen": [user("q"), assistant("good")],
            "chosen-rating": 5.0,
            "chosen-model": "m",
            "rejected": [user("q"), assistant("bad")],
            "rejected-rating": 1.0,
            "rejected-model": "n",
        },
        SHORT,
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        CHAT,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    row, expected = PAIRS[name]
    assert tuple(normalize(row, "dpo")) == (*expected, None, {})


@pytest.mark.parametrize("name", PAIRS)
def test_sft_takes_the_chosen_side_of_pairs(name: str) -> None:
    row, (prompt, completions) = PAIRS[name]
    assert tuple(normalize(row, "sft")) == (prompt, completions[:1], None, {})


def test_conversations_part_at_the_first_turn_that_differs() -> None:
    chosen = [user("q"), assistant("a"), user("more"), assistant("good")]
    rejected = [user("q"), assistant("a"), user("else"), assistant("bad")]
    record = normalize({"chosen": chosen, "rejected": rejected}, "dpo")
    assert record == Record(chosen[:2], (chosen[2:], rejected[2:]))


def test_equal_conversations_keep_their_last_turn() -> None:
    chosen = [user("q"), assistant("a")]
    record = normalize({"chosen": chosen, "rejected": chosen}, "dpo")
    assert record == Record(chosen[:1], (chosen[1:], chosen[1:]))


def test_multi_turn_prompt_of_sharegpt() -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "more"}]
    row = {"conversations": talk, "chosen": [{"from": "gpt", "value": "b"}], "rejected": "c"}
    record = normalize(row, "dpo")
    assert record.prompt == [user("q"), assistant("a"), user("more")]
    assert record.completions == ([assistant("b")], [assistant("c")])


def test_messages_from_arrow_hold_the_keys_of_all() -> None:
    turns = [
        {"role": None, "content": None, "from": "human", "value": "q"},
        {"role": "assistant", "content": "good", "from": None, "value": None},
    ]
    assert normalize({"messages": turns}, "sft") == Record([user("q")], ([assistant("good")],))


TALK = [SYSTEM, user("q"), assistant("a"), user("more"), assistant("b")]


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": TALK}, TALK[:2], TALK[2:]),
        ({"messages": [assistant("hi"), *TALK[1:]]}, [assistant("hi"), user("q")], TALK[2:]),
        ({"messages": [assistant("hi"), *TALK[2:]]}, [assistant("hi"), *TALK[2:4]], TALK[4:]),
        ({"messages": [user("q")]}, [user("q")], []),
        ({"messages": []}, [], []),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, TALK[1:2], TALK[2:3]),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", " 4"),
        ({"prompt": TALK[:2], "completion": TALK[2:3]}, TALK[:2], TALK[2:3]),
        ({"prompt": TALK[:2], "completion": "a"}, TALK[:2], TALK[2:3]),
        ({"messages": TALK, "prompt": "q", "chosen": "b", "rejected": "y"}, TALK[:2], TALK[2:]),
    ],
)
def test_demonstrations(row: dict[str, Any], prompt: Any, completion: Any) -> None:
    assert normalize(row, "sft") == Record(prompt, (completion,))


GOOD = {"prompt": PROMPT, "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "chosen": 3}, r"key 'chosen' is of type int, but must be a string or a list of messages"),
        ({**GOOD, "prompt": None}, r"'chosen' and 'rejected' are strings that do not begin alike, so there is no prom"),
        ({**GOOD, "rejected": None}, r"key 'rejected' is null"),
        ({**GOOD, "prompt": ["q"]}, r"key 'prompt', turn 1 is of type str, but must be an object"),
        ({**GOOD, "prompt": []}, r"key 'prompt' holds no turn"),
        ({**GOOD, "prompt": [{"role": "user"}]}, r"'prompt', turn 1 has the keys role, but must have role and"),
        ({**GOOD, "prompt": [*PROMPT, user(3)]}, r"key 'prompt', turn 3, 'content' is of type int"),  # type: ignore[arg-type]
        ({**GOOD, "chosen": [{"from": "gpt", "value": None}]}, r"'chosen', turn 1, 'value' is null"),
        ({**GOOD, "chosen": [{"role": "judge", "content": "x"}]}, r"turn 1 has the unknown role 'judge'; known are"),
        ({**GOOD, "chosen": [{"role": 10**5000, "content": "x"}]}, r"unknown role of type int"),
        ({**GOOD, "rejected": "\ud83d"}, r"key 'rejected' holds half of a surrogate pair at character 0"),
        ({**GOOD, "chosen": [user("other"), assistant("x")]}, r"'chosen' begins with a user turn, but not with"),
        ({"prompt": "q", "chosen": "good", "rejected": 1}, r"key 'rejected' is of type int"),
        ({"instruction": "q", "chosen_response": ["x"], "rejected_response": "y"}, r"'chosen_response' is of type"),
        ({"chosen": "good", "rejected": [assistant("x")]}, r"key 'chosen' is a string, so there is no prompt"),
        ({"chosen": [user("q")], "rejected": [user("p")]}, r"share no leading turn.*add a key 'prompt'"),
        ({"chosen": [], "rejected": [user("q")]}, r"share no leading turn"),
        (["q", "good"], r"the row is of type list, but must be an object"),
    ],
)
def test_refused_pairs(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize(row, "dpo")


def test_unknown_columns_are_named_beside_the_accepted() -> None:
    with pytest.raises(ValueError, match=r"question, chosen are of no known dpo form \(conversations\+chosen"):
        find_form({"question": 1, "chosen": 2}, "dpo")
    with pytest.raises(ValueError, match=r"text are of no known sft form \(messages; prompt\+completion;"):
        find_form({"text": 1}, "sft")
    with pytest.raises(ValueError, match=r"columns \(none\)"):
        find_form({}, "dpo")


def test_demonstrations_in_a_run_of_dpo_name_the_command_for_them():
    for row in ({"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a", "completion": "b"}):
        with pytest.raises(ValueError, match=r"these are demonstrations: train on them with `notus sft`"):
            find_form(row, "dpo")
    with pytest.raises(ValueError, match=r"of data\.columns, the row lacks worse; correct the names"):
        find_form({"prompt": "a", "completion": "b"}, "dpo", {"worse": "rejected"})


def test_raw_ultrafeedback_is_sent_to_curation() -> None:
    with pytest.raises(ValueError, match="notus curate"):
        find_form({"instruction": "q", "completions": [], "models": []}, "dpo")


def test_every_form_is_recognised_by_its_columns() -> None:
    for form in PAIR_FORMS:
        assert find_form(dict.fromkeys(form, "x"), "dpo") == form
    for form in [form for form in SFT_FORMS if form != ("messages", "chosen", "rejected")]:
        assert find_form(dict.fromkeys(form, "x"), "sft") == form


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"source": "flan", "chosen_avg_rating": 4.5, "rejected_avg_rating": 2}, ("flan", 4.5, 2.0)),
        ({"source": "flan", "chosen-rating": 5.0, "rejected-rating": 1.0}, ("flan", 5.0, 1.0)),
        ({"score_chosen": 8, "score_rejected": 7.5}, (None, 8.0, 7.5)),
        ({"prompt": "q"}, (None, None, None)),
        # a CSV file has strings alone, and empty ones for what is absent
        ({"source": "", "chosen-rating": " 4.5\n", "rejected-rating": "-1e-1"}, (None, 4.5, -0.1)),
        (
            {"chosen_avg_rating": "", "rejected_avg_rating": None, "score_chosen": "8", "score_rejected": ".5"},
            (None, 8, 0.5),
        ),
        ({"score_chosen": "4,5", "score_rejected": "nan"}, (None, None, None)),
        ({"score_chosen": "inf", "score_rejected": "1e999"}, (None, None, None)),
        ({"score_chosen": "1_0", "score_rejected": "\u0664"}, (None, None, None)),
        ({"score_chosen": "9" * 5000, "score_rejected": "4 5"}, (None, None, None)),
        # what is no name and no number is not an error: training does not need it
        ({"source": 3, "score_chosen": "N/A", "score_rejected": 7}, (None, None, 7.0)),
        ({"source": "\ud800x", "score_chosen": True, "score_rejected": None}, ("?x", None, None)),
        ({"score_chosen": float("nan"), "score_rejected": 10**400}, (None, None, None)),
        ({"score_chosen": 10**5000, "score_rejected": -(10**5000)}, (None, None, None)),
    ],
)
def test_provenance(row: dict[str, Any], expected: Any) -> None:
    assert read_provenance(row) == Provenance(*expected)
