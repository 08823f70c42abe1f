"""FastChat's files, read and checked: questions, reference answers, answers, the judge's prompts.

Each is a local file, or one on the hub, written hf://datasets/OWNER/NAME/FILE or hf://spaces/OWNER/NAME/FILE.
"""

import dataclasses
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.data.sources import read_file
from notus.runtime.process import first_line

# LMSYS's own 80 questions; the space has no reference answers and no prompts for the judge.
HUB_ID = "lmsys/mt-bench"
QUESTIONS = f"hf://spaces/{HUB_ID}/data/mt_bench/question.jsonl"
FASTCHAT = "lm-sys/FastChat has it, as fastchat/llm_judge/data/"
# Judged against a reference answer, as FastChat's NEED_REF_CATS.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard-200")
HIGHEST = 10
UNREAD = -1  # the score of a judgment without a rating
# Of the prompts for turn 1 and 2; True: with a reference answer.
PROMPTS = {
    False: ("single-v1", "single-v1-multi-turn"),
    True: ("single-math-v1", "single-math-v1-multi-turn"),
}
_FIELDS = ({"question", "answer"}, {"question_1", "question_2", "answer_1", "answer_2"})
_JUDGED = ("answer", "answer_2")  # what a template must hold
_REFERENCE_FIELDS = ({"ref_answer_1"}, {"ref_answer_1", "ref_answer_2"})

QuestionId = int | str


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of one turn or two; `reference`: an answer to each turn, or none at all; `place`: for errors."""

    id: QuestionId
    category: str
    turns: Sequence[str]
    reference: Sequence[str]
    place: str

    @property
    def needs_reference(self) -> bool:
        """Whether it is judged against a reference answer."""
        return self.category in REFERENCE_CATEGORIES


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to each turn of a question."""

    question_id: QuestionId
    model: str
    turns: Sequence[str]


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """What the judge is told: a system prompt, if any, and a template for the user's turn."""

    name: str
    system: str
    template: str


def read_questions(name: str, references: str | None = None) -> list[Question]:
    """Questions, with the reference answers of `references` in the place of their own, if that is given.

    Raises ValueError, naming file and line, for what is no question, or one that is there twice.
    """
    of_file = {answer.question_id: answer.turns for answer in read_answers(references)} if references else {}
    questions: dict[QuestionId, Question] = {}
    for place, row in _rows(name):
        question_id = _id(row, place)
        turns = _texts(row.get("turns"), f"{place}: key 'turns'")
        if question_id in questions:
            raise ValueError(f"{place}: question {question_id} is there twice; remove one")
        if not 1 <= len(turns) <= 2:
            raise ValueError(f"{place}: has {len(turns)} turns; MT-Bench's questions have two, or one")
        own = row.get("reference") or []
        reference = of_file.get(question_id) or _texts(own, f"{place}: key 'reference'")
        questions[question_id] = Question(question_id, _text(row, "category", place), turns, reference, place)
    return list(questions.values())


def check_references(questions: Sequence[Question]) -> None:
    """Raise ValueError, naming the first question without the reference answers that its category needs."""
    for question in questions:
        if question.needs_reference and len(question.reference) < len(question.turns):
            raise ValueError(
                f"{question.place}: question {question.id} ({question.category}) is judged against reference answers, "
                f"and has not one for every turn; give them with --references FILE ({FASTCHAT}mt_bench/"
                "reference_answer/gpt-4.jsonl)"
            )


def read_answers(name: str) -> list[Answer]:
    """Answers as FastChat writes them, the first choice of each; the last of those to one question by one model.

    Raises ValueError, naming file and line, for what is no answer.
    """
    answers = {}
    for place, row in _rows(name):
        try:
            turns = row["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{place}: holds no choices with turns; give FastChat's answers") from error
        answer = Answer(_id(row, place), _text(row, "model_id", place), _texts(turns, f"{place}: key 'turns'"))
        answers[answer.question_id, answer.model] = answer
    return list(answers.values())


def read_judge_prompts(name: str) -> Mapping[str, JudgePrompt]:
    """The four of `PROMPTS`, by name. Raises ValueError, naming file and prompt, for one that cannot be used."""
    rows = {str(row.get("name")): (place, row) for place, row in _rows(name)}
    prompts = {}
    for with_reference, of_turns in PROMPTS.items():
        for turn, wanted in enumerate(of_turns):
            if wanted not in rows:
                raise ValueError(f"{name}: has no prompt {wanted!r}; give FastChat's ({FASTCHAT}judge_prompts.jsonl)")
            fields = _FIELDS[turn] | (_REFERENCE_FIELDS[turn] if with_reference else set())
            prompts[wanted] = _judge_prompt(*rows[wanted], fields, _JUDGED[turn])
    return prompts


def _judge_prompt(place: str, row: dict[str, Any], fields: set[str], judged: str) -> JudgePrompt:
    template, system = _text(row, "prompt_template", place), row.get("system_prompt", "")
    if row.get("output_format") != "[[rating]]" or not isinstance(system, str):
        raise ValueError(f"{place}: prompt {row['name']!r} does not ask for [[rating]]; give one that does")
    used = _fields(template, place)
    if not used <= fields:
        unknown = ", ".join(sorted(f"{{{field}}}" for field in used - fields))
        raise ValueError(f"{place}: the template holds {unknown}; it can hold {', '.join(sorted(fields))}")
    if judged not in used:
        raise ValueError(f"{place}: the template does not hold {{{judged}}}, so the judge would not see what it judges")
    return JudgePrompt(row["name"], system, template)


def _fields(template: str, place: str) -> set[str]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{place}: the template cannot be filled in ({error}); write other braces twice") from error
    odd = next((field for _, field, form, conversion in parts if form or conversion), None)
    if odd is not None:
        raise ValueError(f"{place}: the template cannot be filled in; write {{{odd}}} with nothing after the name")
    return {field for _, field, _, _ in parts if field is not None}


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a file, which has some."""
    path, empty = _find(name), True
    for place, row in read_file(path):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: is no JSON object; give FastChat's files")
        empty = False
        yield place, row
    if empty:
        raise ValueError(f"{name}: the file is empty; give at least one entry")


def _find(name: str) -> Path:
    """A local file, or the local copy of one on the hub."""
    if not name.startswith("hf://"):
        if not Path(name).is_file():
            raise ValueError(f"{name}: there is no such file; check the path")
        return Path(name)
    kind, *parts = name.removeprefix("hf://").split("/")
    if kind not in ("datasets", "spaces") or len(parts) < 3:
        raise ValueError(f"{name}: write hf://datasets/OWNER/NAME/FILE or hf://spaces/OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), repo_type=kind.removesuffix("s")))
    except Exception as error:  # the hub client raises of many kinds
        raise ValueError(f"{name}: cannot be fetched ({first_line(error)}); give a file of your own") from error


def _id(row: dict[str, Any], place: str) -> QuestionId:
    value = row.get("question_id")
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f"{place}: has no question_id; give FastChat's files")
    return value


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place}: key {key!r} holds no text; give FastChat's files")
    return value


def _texts(value: Any, where: str) -> list[str]:
    """A list of texts; numbers, which translated reference files hold, are taken as such."""
    if not isinstance(value, list) or not all(isinstance(text, str | int | float) for text in value):
        raise ValueError(f"{where} is {json.dumps(value)[:60]}, not a list of texts; give FastChat's files")
    return [str(text) for text in value]
