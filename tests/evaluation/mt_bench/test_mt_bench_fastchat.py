"""FastChat's files: what is read from them, and what bad ones get."""

from pathlib import Path
from typing import Any

import fastchat
import pytest

from notus.evaluation.mt_bench import fastchat as inputs


def test_questions_as_fastchat_has_them(tmp_path: Path) -> None:
    path = fastchat.write_questions(tmp_path)
    questions = inputs.read_questions(str(path))
    assert [question.question_id for question in questions] == [81, 101, 111, 151]
    assert [question.needs_reference for question in questions] == [False, True, True, False]
    assert questions[1].turns == ["first 101?", "second 101?"]
    assert questions[1].reference == ["right 101 one", "right 101 two"]
    assert questions[0].reference == []
    inputs.check_references(questions)


def test_references_of_a_file_stand_in_the_place_of_the_questions_own(tmp_path: Path) -> None:
    path = fastchat.write_questions(tmp_path)
    references = fastchat.write_lines(tmp_path / "gpt-4.jsonl", [fastchat.answer(111, "gpt-4")])
    by_id = {question.question_id: question for question in inputs.read_questions(str(path), str(references))}
    assert by_id[111].reference == ["answer 111 one", "answer 111 two"]
    assert by_id[101].reference == ["right 101 one", "right 101 two"]


def test_a_reference_that_is_a_number_is_its_digits(tmp_path: Path) -> None:
    row = {**fastchat.question(111), "reference": [12000, 0.19]}
    (question,) = inputs.read_questions(str(fastchat.write_lines(tmp_path / "question.jsonl", [row])))
    assert question.reference == ["12000", "0.19"]


def test_a_missing_reference_is_told_with_the_file_to_give(tmp_path: Path) -> None:
    row = {**fastchat.question(101), "reference": ["only one"]}
    path = fastchat.write_lines(tmp_path / "question.jsonl", [row])
    questions = inputs.read_questions(str(path))
    with pytest.raises(ValueError, match=r"question\.jsonl, line 1: question 101 \(reasoning\).*--references FILE"):
        inputs.check_references(questions)


GOOD = fastchat.question(81)
OTHER = fastchat.question(151)
BAD_QUESTIONS = {
    "Input should be": 3,
    "key 'question_id": {**OTHER, "question_id": None},
    "key 'category'": {**OTHER, "category": 7},
    "key 'turns'": {**OTHER, "turns": None},
    "key 'turns.1'": {**OTHER, "turns": ["a", ["b"]]},
    "key 'turns': List should have at least": {**OTHER, "turns": []},
    "key 'turns': List should have at most": {**OTHER, "turns": ["a", "b", "c"]},
    "key 'reference'": {**OTHER, "reference": "text"},
    "the same question_id": GOOD,
}


@pytest.mark.parametrize("told", BAD_QUESTIONS)
def test_what_is_no_question_is_told_with_its_line(told: str, tmp_path: Path) -> None:
    path = fastchat.write_lines(tmp_path / "question.jsonl", [GOOD, BAD_QUESTIONS[told]])
    with pytest.raises(ValueError, match=rf"question\.jsonl, line 2: {told}"):
        inputs.read_questions(str(path))


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: there is no such file"):
        inputs.read_questions(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="the file is empty"):
        inputs.read_questions(str(fastchat.write_lines(tmp_path / "question.jsonl", [])))


def test_the_last_answer_of_a_model_to_a_question_counts(tmp_path: Path) -> None:
    rows = [fastchat.answer(81, "a"), fastchat.answer(81, "b"), fastchat.answer(81, "a", mark="!")]
    answers = inputs.read_answers(str(fastchat.write_lines(tmp_path / "a.jsonl", rows)))
    assert answers == [
        inputs.Answer.of(81, "a", ["answer 81 one!", "answer 81 two!"]),
        inputs.Answer.of(81, "b", ["answer 81 one", "answer 81 two"]),
    ]


@pytest.mark.parametrize("choices", [None, [], [{}], [{"turns": "text"}], [{"turns": [None]}], "text"])
def test_what_is_no_answer_is_told_with_its_line(choices: Any, tmp_path: Path) -> None:
    path = fastchat.write_lines(tmp_path / "a.jsonl", [{**fastchat.answer(81), "choices": choices}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1.*give FastChat's"):
        inputs.read_answers(str(path))


def test_the_four_prompts_are_found_among_others(tmp_path: Path) -> None:
    prompts = inputs.read_judge_prompts(str(fastchat.write_prompts(tmp_path)))
    assert set(prompts) == {"single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"}
    assert prompts["single-v1"].system_prompt == "You are a helpful assistant."
    assert prompts["single-math-v1"].prompt_template == "Q {question} R {ref_answer_1} A {answer}"


BAD_PROMPTS = {
    "key 'output_format'": {"output_format": "[[A]]"},
    "holds {ref_answer_1}; it can hold answer, question": {"prompt_template": "{question} {answer} {ref_answer_1}"},
    "holds {question.__class__}": {"prompt_template": "{question.__class__}"},
    "holds {0}": {"prompt_template": "{0}"},
    "cannot be filled in": {"prompt_template": "{question"},
    "holds {answer:{answer}}": {"prompt_template": "{question} {answer:{answer}}"},
    "holds {question!s}": {"prompt_template": "{question!s} {answer}"},
    "does not hold {answer}, so the judge": {"prompt_template": "{question}"},
    "key 'prompt_template'": {"prompt_template": ""},
}


@pytest.mark.parametrize("told", BAD_PROMPTS)
def test_a_prompt_that_cannot_be_used_is_told_with_its_line(told: str, tmp_path: Path) -> None:
    rows = [{**row, **BAD_PROMPTS[told]} if row["name"] == "single-v1" else row for row in fastchat.PROMPTS]
    path = fastchat.write_lines(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: .*" + told.replace("{", r"\{")):
        inputs.read_judge_prompts(str(path))


def test_a_missing_prompt_is_named(tmp_path: Path) -> None:
    path = fastchat.write_lines(tmp_path / "p.jsonl", fastchat.PROMPTS[:-1])
    with pytest.raises(ValueError, match=r"has no prompt 'single-math-v1-multi-turn'.*judge_prompts\.jsonl"):
        inputs.read_judge_prompts(str(path))


def test_a_file_of_the_hub_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*args: str, **options: str) -> str:
        asked.append((*args, options))
        return str(fastchat.write_questions(tmp_path))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(inputs.read_questions(inputs.QUESTIONS)) == 4
    inputs.read_questions("hf://datasets/me/mine/a/question.jsonl")
    assert asked == [
        ("lmsys/mt-bench", "data/mt_bench/question.jsonl", {"repo_type": "space"}),
        ("me/mine", "a/question.jsonl", {"repo_type": "dataset"}),
    ]


def test_a_hub_out_of_reach_asks_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf://spaces/.*question\.jsonl: cannot be fetched .*; give a file"):
        inputs.read_questions(inputs.QUESTIONS.replace("mt-bench", "no-such-space"))


@pytest.mark.parametrize("name", ["hf://lmsys/mt-bench/question.jsonl", "hf://spaces/lmsys/mt-bench", "hf://"])
def test_an_address_of_the_hub_without_its_parts(name: str) -> None:
    with pytest.raises(ValueError, match="write hf://datasets/OWNER/NAME/FILE"):
        inputs.read_questions(name)
