"""FastChat's files: questions, reference answers, answers, the judge's prompts, judgments.

Each is a local file, or one on the hub, written hf://datasets/OWNER/NAME/FILE or hf://spaces/OWNER/NAME/FILE.
"""

import hashlib
import json
import string
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from notus.evaluation.input_files import check_unique, fetch, parse_entry, read_entries
from notus.runtime.files import write_text

# LMSYS's own 80 questions; the space has no reference answers and no prompts for the judge.
HUB_ID = "lmsys/mt-bench"
QUESTIONS = f"hf://spaces/{HUB_ID}/data/mt_bench/question.jsonl"
FASTCHAT = "lm-sys/FastChat has it, as fastchat/llm_judge/data/"
# Judged against a reference answer, as FastChat's NEED_REF_CATS.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard-200")
HIGHEST = 10
UNREAD = -1  # the score of a judgment without a rating
# The judge's prompts by (turn, whether there is a reference answer): the name, what the template can hold, and what it
# must hold, because the judge would not see what it judges.
PROMPTS = {
    (1, False): ("single-v1", {"question", "answer"}, "answer"),
    (1, True): ("single-math-v1", {"question", "answer", "ref_answer_1"}, "answer"),
    (2, False): ("single-v1-multi-turn", {"question_1", "question_2", "answer_1", "answer_2"}, "answer_2"),
    (2, True): (
        "single-math-v1-multi-turn",
        {"question_1", "question_2", "answer_1", "answer_2", "ref_answer_1", "ref_answer_2"},
        "answer_2",
    ),
}


def _is_score(value: float) -> float:
    if not (value == UNREAD or 0 <= value <= HIGHEST):  # NaN is neither
        raise ValueError(f"a score is {UNREAD} or 0 to {HIGHEST}")
    return value


QuestionId = StrictInt | StrictStr
Text = Annotated[str, Field(min_length=1)]
Turn = Annotated[str, Field(coerce_numbers_to_str=True)]  # translated reference files hold numbers


class Question(BaseModel):
    """A question of one turn or two; `reference`: an answer to each turn, or none at all; `place`: for errors."""

    model_config = ConfigDict(frozen=True)

    question_id: QuestionId
    category: Text
    turns: Annotated[list[Turn], Field(min_length=1, max_length=2)]
    reference: Annotated[list[Turn], BeforeValidator(lambda value: value or [])] = []
    place: str = ""

    @property
    def needs_reference(self) -> bool:
        """Whether it is judged against a reference answer."""
        return self.category in REFERENCE_CATEGORIES


class _Choice(BaseModel):
    turns: list[Turn]


class Answer(BaseModel):
    """A model's answer to each turn of a question, which is the first of its choices."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    question_id: QuestionId
    model_id: Text
    choices: Annotated[list[_Choice], Field(min_length=1)]

    @property
    def turns(self) -> list[str]:
        """The answers by turn."""
        return self.choices[0].turns

    @classmethod
    def of(cls, question_id: int | str, model: str, turns: list[str]) -> "Answer":
        """Make an answer of one choice."""
        return cls(question_id=question_id, model_id=model, choices=[_Choice(turns=turns)])


class JudgePrompt(BaseModel):
    """What the judge is asked with: a system prompt, if any, and a template for the user's turn."""

    model_config = ConfigDict(frozen=True)

    name: str
    system_prompt: str = ""
    prompt_template: Text
    output_format: Literal["[[rating]]"]


class Judgment(BaseModel):
    """A verdict on one turn of an answer. `judge`: the judge's name, then its prompt's; old files have none."""

    question_id: QuestionId
    model: str
    judge: Annotated[list[str], Field(min_length=1)] = [""]
    system_prompt: str | None = None  # FastChat has no such key, and ignores it
    user_prompt: str | None = None
    judgment: str | None = None
    score: Annotated[StrictInt | StrictFloat, AfterValidator(_is_score)]
    turn: Literal[1, 2]
    tstamp: float = Field(default_factory=time.time)

    @property
    def key(self) -> tuple[Any, ...]:
        """What is judged, and with which prompts: a verdict is used again only where all of it is the same."""
        return self.question_id, self.model, self.turn, *self.judge, self.system_prompt, self.user_prompt


def read_questions(name: str, references: str | None = None) -> list[Question]:
    """Read questions; the reference answers of the file `references` replace their own.

    Raises ValueError, naming file and line, for what is no question, or one that is there twice.
    """
    of_file = {answer.question_id: answer.turns for answer in read_answers(references)} if references else {}
    rows = read_entries(_find(name), Question, "FastChat's questions")
    check_unique([(place, row.question_id) for place, row in rows], "question_id")
    return [
        row.model_copy(update={"place": place, "reference": of_file.get(row.question_id) or row.reference})
        for place, row in rows
    ]


def check_references(questions: Sequence[Question]) -> None:
    """Raise ValueError, naming the first question without the reference answers that its category needs."""
    for question in questions:
        if question.needs_reference and len(question.reference) < len(question.turns):
            raise ValueError(
                f"{question.place}: question {question.question_id} ({question.category}) is judged against reference "
                f"answers, and has not one for every turn; give them with --references FILE ({FASTCHAT}mt_bench/"
                "reference_answer/gpt-4.jsonl)"
            )


def read_answers(name: str) -> list[Answer]:
    """Read answers; of several by one model to one question the last one.

    Raises ValueError, naming file and line, for what is no answer.
    """
    rows = read_entries(_find(name), Answer, "FastChat's answers")
    return list({(answer.question_id, answer.model_id): answer for _, answer in rows}.values())


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write answers in FastChat's format, whole or not at all. Raises OSError."""
    lines = []
    for answer in answers:
        content = json.dumps([answer.model_id, answer.question_id, answer.turns])
        line = {
            "question_id": answer.question_id,
            "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
            "model_id": answer.model_id,
            "choices": [{"index": 0, "turns": answer.turns}],
            "tstamp": time.time(),
        }
        lines.append(json.dumps(line) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))


class _AnyPrompt(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str


def read_judge_prompts(name: str) -> Mapping[str, JudgePrompt]:
    """Read the four of `PROMPTS`, by name. Raises ValueError, naming file and prompt, for one that cannot be used."""
    wanted = "FastChat's judge_prompts.jsonl"
    rows = {row.name: (place, row.model_dump()) for place, row in read_entries(_find(name), _AnyPrompt, wanted)}
    prompts = {}
    for prompt_name, fields, judged in PROMPTS.values():
        if prompt_name not in rows:
            raise ValueError(f"{name}: has no prompt {prompt_name!r}; give FastChat's ({FASTCHAT}judge_prompts.jsonl)")
        place, row = rows[prompt_name]
        prompts[prompt_name] = prompt = parse_entry(row, JudgePrompt, place, wanted)
        _check_template(prompt.prompt_template, place, fields, judged)
    return prompts


def _check_template(template: str, place: str, fields: set[str], judged: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{place}: the template cannot be filled in ({error}); write other braces twice") from error
    used = {
        field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        for _, field, form, conversion in parts
        if field is not None
    }
    if not used <= fields:
        unknown = ", ".join(sorted(f"{{{field}}}" for field in used - fields))
        raise ValueError(f"{place}: the template holds {unknown}; it can hold {', '.join(sorted(fields))}")
    if judged not in used:
        raise ValueError(f"{place}: the template does not hold {{{judged}}}, so the judge would not see what it judges")


def read_judgments(path: Path) -> list[Judgment]:
    """Read FastChat's `JUDGE_single.jsonl`. Raises ValueError, naming the line, for what is no such judgment."""
    rows = read_entries(path, Judgment, "judgments of single answers, which FastChat calls JUDGE_single.jsonl")
    return [row for _, row in rows]


def _find(name: str) -> Path:
    """Return a local file, or the local copy of one on the hub."""
    if not name.startswith("hf://"):
        return Path(name)
    kind, *parts = name.removeprefix("hf://").split("/")
    if kind not in ("datasets", "spaces") or len(parts) < 3:
        raise ValueError(f"{name}: write hf://datasets/OWNER/NAME/FILE or hf://spaces/OWNER/NAME/FILE")
    return fetch("/".join(parts[:2]), "/".join(parts[2:]), kind.removesuffix("s"), "a file of your own")
