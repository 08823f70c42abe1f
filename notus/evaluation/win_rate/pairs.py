"""Prompts and two answers to each: read from files, and matched by the prompt."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from notus.data.formats import Turns
from notus.data.sources import read_file
from notus.evaluation.prompts import read_prompt, read_prompts

ANSWERS = ("completion", "output", "answer")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt: where it stands, for errors; as a model gets it; and as a judge reads it."""

    place: str
    turns: Turns
    text: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a prompt."""

    prompt: str
    answer: str
    against: str


def read_asked(path: Path) -> list[Asked]:
    """The prompts of a .txt, .jsonl or .json file, as `read_prompts` reads them; each may be there once.

    Raises ValueError, naming file and line.
    """
    prompts = read_prompts(path, strings_are_turns=False)
    return _once([Asked(prompt.place, prompt.turns, _text(prompt.turns)) for prompt in prompts])


def read_answers(path: Path) -> tuple[list[Asked], list[str]]:
    """A .jsonl or .json file of prompts with their answers: what `notus generate` writes, or AlpacaEval's outputs.

    Raises ValueError, naming file and line, for an entry without an answer or a prompt, and a prompt that is there
    twice.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    asked, answers = [], []
    for place, row in _objects(path):
        key = next((key for key in ANSWERS if isinstance(row.get(key), str)), None)
        if key is None:
            raise ValueError(f"{place}: no text under one of the keys {', '.join(ANSWERS)}; give an answer")
        answers.append(row.pop(key).strip())  # as answers that are generated here
        value, messages = read_prompt(row, place)
        turns = value if isinstance(value, str) else messages
        asked.append(Asked(place, turns, _text(turns)))
    if not asked:
        raise ValueError(f"{path}: the file is empty; give at least one answer")
    return _once(asked), answers


def match(asked: list[Asked], others: list[Asked], answers: list[str], name: str) -> list[str]:
    """The answers to `others`, in the order of `asked`. Raises ValueError unless the prompts are the same."""
    by_text = {other.text: answer for other, answer in zip(others, answers, strict=True)}
    texts = {one.text for one in asked}
    for one in asked:
        if one.text not in by_text:
            raise ValueError(f"{name}: no answer to the prompt of {one.place}; give both models the same prompts")
    for other in others:
        if other.text not in texts:
            raise ValueError(f"{other.place}: the other side has no such prompt; give both models the same prompts")
    return [by_text[one.text] for one in asked]


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, row in read_file(path):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: {type(row).__name__}, not an object; give a prompt with its answer")
        yield place, dict(row)


def _once(asked: list[Asked]) -> list[Asked]:
    seen: dict[str, str] = {}
    for one in asked:
        if one.text in seen:
            raise ValueError(f"{one.place}: the prompt of {seen[one.text]} again; remove one of them")
        seen[one.text] = one.place
    return asked


def _text(turns: Turns) -> str:
    """A single turn as it is; several with their roles."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
