"""Which prompts hold a question of a list."""

import random
import subprocess
import sys

import pytest

from notus.curation.decontamination import CONTAINED, EQUAL, Match, Questions, normalized

WORDS = [f"w{number}" for number in range(1, 21)]


def question(count: int) -> str:
    return " ".join(WORDS[:count]) + "?"


def found(prompt: str, *questions: str, ngram: int = 8) -> Match | None:
    return Questions(questions, ngram).find(prompt)


@pytest.mark.parametrize(
    ("text", "comparable"),
    [
        ("What  happens,\n if you eat seeds?", "what happens if you eat seeds"),
        ("Can’t — STRASSE “Straße”…", "can t strasse strasse"),
        ("ﬁve Ｆｕｌｌ①", "five full1"),
        ("1 + 1 = 2", "1 + 1 = 2"),
        ("<b>What</b> is `x`?", "< b > what < b > is ` x `"),
        ("wa\u00adter\u200b\ufeffmelon", "watermelon"),  # a soft hyphen, a zero-width space, a BOM
        ("कि का", "कि का"),
        ("什么是 AI？", "什 么 是 ai"),
        ("?!", ""),
    ],
)
def test_normalized(text: str, comparable: str) -> None:
    assert normalized(text) == comparable


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 20])
def test_a_prompt_that_is_the_question_and_nothing_else(count: int) -> None:
    asked = question(count)
    assert found(f"  {asked.upper()[:-1]}!\n", "something else entirely", asked) == Match(EQUAL, asked)


@pytest.mark.parametrize("count", range(3, 21))
@pytest.mark.parametrize("frame", ["Answer this: {} Be brief.", "Q: {}\nA:", "Tell me.\n\n“{}”", "<p>{}</p>"])
def test_a_question_of_three_words_or_more_is_found_inside_a_prompt(count: int, frame: str) -> None:
    asked = question(count)
    assert found(frame.format(asked), asked) == Match(CONTAINED, asked)


@pytest.mark.parametrize("count", [1, 2])
def test_a_question_of_one_or_two_words_is_not_looked_for_inside(count: int) -> None:
    assert found(f"Tell me. {question(count)} Now.", question(count)) is None


@pytest.mark.parametrize(
    ("count", "held", "contaminated"),
    [
        (5, slice(0, 5), True),
        (5, slice(0, 4), False),
        (7, slice(0, 6), False),
        (8, slice(0, 8), True),
        (8, slice(1, 8), False),
        (15, slice(3, 11), True),  # 8 of 15 words
        (16, slice(3, 11), False),  # 8 of 16 words are no more than half
        (16, slice(3, 12), True),  # 9 of 16, by two n-grams
        (20, slice(0, 10), False),
        (20, slice(0, 11), True),
        (20, slice(9, 20), True),
    ],
)
def test_how_much_of_a_question_must_be_there(count: int, held: slice, contaminated: bool) -> None:
    prompt = f"and then {' '.join(WORDS[:count][held])} and so on"
    assert (found(prompt, question(count)) is not None) is contaminated


def test_ngrams_from_several_places_add_up_and_overlaps_count_once() -> None:
    asked = question(20)
    first, last, overlapping = " ".join(WORDS[:8]), " ".join(WORDS[12:]), " ".join(WORDS[1:9])
    assert found(f"{last} und {first}", asked)  # 16 of 20
    assert found(f"{first} und {overlapping}", asked) is None  # 9 of 20
    assert found(f"{first} und {first}", asked) is None  # 8 of 20


def test_words_out_of_order_are_not_the_question() -> None:
    assert found(f"so {' '.join(reversed(WORDS[:12]))}", question(12)) is None


@pytest.mark.parametrize(
    ("prompt", "contaminated"),
    [
        ("Hello, who are you?", True),
        ("Tell me Who are you? Thanks", True),
        ("who are you\n\nanswer in French", True),
        ("Who are you going to invite?", False),
        ("Do you know who are you?", False),
        ("Who are you Bob?", False),
    ],
)
def test_a_question_of_three_words_must_be_a_clause(prompt: str, contaminated: bool) -> None:
    assert (found(prompt, "Who are you?") is not None) is contaminated


def test_a_short_question_with_an_apostrophe_is_a_clause() -> None:
    assert found("Hi! What's your name?", "What’s your name?")


def test_thirteen_grams_ask_for_the_whole_of_shorter_questions() -> None:
    prompt = f"so {' '.join(WORDS[:9])} and on"
    assert found(prompt, question(12))
    assert found(prompt, question(12), ngram=13) is None
    assert found(f"so {question(12)}", question(12), ngram=13)
    assert found(f"so {' '.join(WORDS[:13])} on", question(20), ngram=13)  # 13 of 20


def test_the_smallest_ngram_needs_no_clause() -> None:
    assert found("but w1 w2 w3 then", question(3), ngram=3)
    with pytest.raises(ValueError, match="ngram is 2; give 3 or more"):
        Questions([], 2)


def test_text_without_spaces_is_searched_by_character() -> None:
    asked = "如果你吃了西瓜籽会发生什么？"
    assert found(f"请用一句话回答：{asked}谢谢", asked) == Match(CONTAINED, asked)
    assert found("西瓜很好吃", asked) is None


def test_the_first_listed_question_is_named_and_one_that_is_equal_before_it() -> None:
    listed = [question(9), question(8), question(12), question(8).upper()]
    assert found(question(12), *listed) == Match(EQUAL, question(12))
    assert found(f"so {question(12)}", *listed) == Match(CONTAINED, question(9))
    assert len(Questions(listed)) == 3  # the last is the second


def test_no_list_finds_nothing() -> None:
    assert Questions([]).find("anything") is None
    assert found("", question(8)) is None
    assert found("?!", question(3)) is None


def test_a_question_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\?\?\?'.*nothing to compare; remove it"):
        Questions(["fine", "???"])


def test_all_of_813_embedded_questions_are_found_and_no_prompt_without_one() -> None:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(3000)]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(low, high)))

    asked = [f"{text(5, 20).capitalize()}?" for _ in range(813)]
    questions = Questions(asked)
    plain = [f"{text(20, 200)}. {text(20, 200)}" for _ in asked]
    embedded = [f"{text(5, 100)}: {one} {text(5, 100)}" for one in asked]
    assert [questions.find(prompt) for prompt in plain] == [None] * 813
    assert [questions.find(prompt) for prompt in embedded] == [Match(CONTAINED, one) for one in asked]


def test_the_result_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from notus.curation.decontamination import Questions; words = [f'w{n}' for n in range(40)];"
        "print(Questions([' '.join(words[n : n + 9]) for n in (7, 3, 20)]).find('so ' + ' '.join(words)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(outputs) == 1
    assert "w7 w8" in outputs.pop()
