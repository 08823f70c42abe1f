"""Two-turn answers of a toy model."""

import functools
import json
from pathlib import Path
from typing import Any

import fastchat
import pytest
import torch
from decoded import generate

from notus.data.chat import ChatEncoder
from notus.evaluation.decoding import KeptTokens, model_digest
from notus.evaluation.mt_bench import fastchat as inputs
from notus.evaluation.mt_bench import suite
from notus.model.export import load_causal_lm

OPTIONS: dict[str, Any] = {
    "max_new_tokens": 5,
    "seed": 1,
    "batch_size": 3,
    "chat_template": None,
    "add_empty_system": False,
}


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> Any:
    return load_causal_lm(model_folder, dtype=torch.float32, device="cpu")


@pytest.fixture
def questions(tmp_path: Path) -> list[inputs.Question]:
    return inputs.read_questions(str(fastchat.write_questions(tmp_path)))


def answer(loaded: Any, questions: Any, folder: Path, temperature: float | None = 0.0) -> Any:
    causal_lm, tokenizer = loaded
    kept = KeptTokens(folder / "kept", model_digest(causal_lm))
    complete = functools.partial(generate, *loaded, kept=kept, **OPTIONS)
    encoder = ChatEncoder(tokenizer)
    return suite.answer_turns(
        questions,
        complete,
        lambda talk: len(encoder.encode_prompt(talk)) < causal_lm.config.max_position_embeddings,
        model="toy",
        temperature=temperature,
    )


def test_the_second_turn_is_answered_after_the_first(loaded: Any, questions: Any, tmp_path: Path) -> None:
    found, cut_off = answer(loaded, questions, tmp_path)
    assert cut_off == 0
    assert [(each.question_id, each.model_id, len(each.turns)) for each in found] == [
        (81, "toy", 2),
        (101, "toy", 2),
        (111, "toy", 2),
        (151, "toy", 2),
    ]
    talks = [[{"role": "user", "content": question.turns[0]}] for question in questions]
    first = [text.strip() for text in generate(*loaded, talks, **OPTIONS)]
    assert [each.turns[0] for each in found] == first
    for talk, said, question in zip(talks, first, questions, strict=True):
        talk += [{"role": "assistant", "content": said}, {"role": "user", "content": question.turns[1]}]
    second = [text.strip() for text in generate(*loaded, talks, **OPTIONS)]
    assert [each.turns[1] for each in found] == second
    assert any(first)
    assert any(second)


def test_temperatures_are_fastchats_by_category(questions: Any) -> None:
    asked = []

    def complete(talks: Any, *, places: list[str], temperature: float) -> list[str]:
        asked.append((temperature, [talk[0]["content"] for talk in talks]))
        return ["x"] * len(talks)

    suite.answer_turns(questions, complete, lambda talk: True, model="toy", temperature=None)
    by_turn = [(0.7, ["first 81?"]), (0.0, ["first 101?", "first 111?"]), (0.1, ["first 151?"])]
    assert asked == by_turn * 2
    asked.clear()
    suite.answer_turns(questions, complete, lambda talk: True, model="toy", temperature=0.3)
    assert [temperature for temperature, _ in asked] == [0.3, 0.3]


def test_finished_answers_are_not_generated_again(
    loaded: Any, questions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answer(loaded, questions, tmp_path, temperature=None)
    monkeypatch.setattr(type(loaded[0]), "generate", None)  # any use of it fails
    assert answer(loaded, questions, tmp_path, temperature=None) == found


def test_a_conversation_that_fills_the_context_has_an_empty_answer(loaded: Any, tmp_path: Path) -> None:
    long = "sea " * 300
    rows = [
        {**fastchat.question(81), "turns": ["short?", long]},
        {**fastchat.question(151), "turns": ["short?", "short?"]},
        {**fastchat.question(101), "turns": ["only?"]},
    ]
    questions = inputs.read_questions(str(fastchat.write_lines(tmp_path / "q.jsonl", rows)))
    found, cut_off = answer(loaded, questions, tmp_path)
    assert cut_off == 1
    assert [len(each.turns) for each in found] == [2, 2, 1]
    assert found[0].turns[1] == ""
    assert found[0].turns[0] == found[1].turns[0] != ""


def test_answers_are_written_as_fastchat_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    given = [inputs.Answer.of(81, "toy", ["one\n", "twö"]), inputs.Answer.of("x", "toy", ["only"])]
    inputs.write_answers(path, given)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0].keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert lines[0]["choices"] == [{"index": 0, "turns": ["one\n", "twö"]}]
    assert lines[0]["answer_id"] != lines[1]["answer_id"]
    assert inputs.read_answers(str(path)) == given
