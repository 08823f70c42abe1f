"""Files in FastChat's formats, small: questions, reference answers, answers, prompts for the judge, judgments."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Two categories that are judged against a reference, two that are not; the ids are FastChat's.
CATEGORIES = {81: "writing", 101: "reasoning", 111: "math", 151: "humanities"}


def write_lines(path: Path, lines: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def question(question_id: int) -> dict[str, Any]:
    category = CATEGORIES[question_id]
    row = {
        "question_id": question_id,
        "category": category,
        "turns": [f"first {question_id}?", f"second {question_id}?"],
    }
    if category in ("reasoning", "math"):
        row["reference"] = [f"right {question_id} one", f"right {question_id} two"]
    return row


def write_questions(folder: Path) -> Path:
    return write_lines(folder / "question.jsonl", map(question, CATEGORIES))


def answer(question_id: int, model: str = "toy", mark: str = "") -> dict[str, Any]:
    turns = [f"answer {question_id} one{mark}", f"answer {question_id} two{mark}"]
    return {
        "question_id": question_id,
        "answer_id": "x",
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": 1.0,
    }


def write_answers(folder: Path, *models: str, mark: str = "") -> Path:
    rows = [answer(each, model, mark) for model in models or ("toy",) for each in CATEGORIES]
    return write_lines(folder / "answers.jsonl", rows)


def prompt(name: str, template: str, system: str = "Judge.") -> dict[str, str]:
    return {
        "name": name,
        "type": "single",
        "system_prompt": system,
        "prompt_template": template,
        "output_format": "[[rating]]",
    }


PROMPTS = [
    {"name": "pair-v2", "type": "pairwise", "output_format": "[[A]]"},
    prompt("single-v1", "Q {question} A {answer}", "You are a helpful assistant."),
    prompt("single-math-v1", "Q {question} R {ref_answer_1} A {answer}"),
    prompt("single-v1-multi-turn", "Q {question_1} A {answer_1} Q {question_2} A {answer_2}"),
    prompt(
        "single-math-v1-multi-turn",
        "R {ref_answer_1} R {ref_answer_2} Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    ),
]


def write_prompts(folder: Path) -> Path:
    return write_lines(folder / "judge_prompts.jsonl", PROMPTS)


def judgment(question_id: int, turn: int, score: float, model: str = "toy", judge: str = "gpt-4") -> dict[str, Any]:
    return {
        "question_id": question_id,
        "model": model,
        "judge": [judge, "single-v1"],
        "user_prompt": "asked",
        "judgment": f"Rating: [[{score}]]",
        "score": score,
        "turn": turn,
        "tstamp": 1.0,
    }
