"""The text that asks a language model for ratings: rating.txt, or a file that the user puts in its place."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from notus.feedback.judge import Question
from notus.feedback.records import ASPECTS, NOT_RATED

REQUIRED = ("{prompt}", "{completions}", "{answer_format}")
PLACEHOLDERS = (*REQUIRED, "{mark}")
RATINGS = ("1", "2", "3", "4", "5", NOT_RATED)
# "## Aspect: honesty" and all lines until the next that begins with "## "
_SECTION = re.compile(r"^## Aspect:[ \t]*(\S+)[ \t]*\n(?:(?!## ).*(?:\n|\Z))*", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Instructions:
    """The instructions of a judge model. `template` holds the sections of these `aspects` alone."""

    template: str
    aspects: Sequence[str]

    @property
    def digest(self) -> str:
        """Return a digest, which other instructions do not have."""
        return hashlib.sha256(json.dumps([self.template, list(self.aspects), _FORM]).encode()).hexdigest()

    def text(self, question: Question) -> str:
        """Return the user turn that asks `question`."""
        mark = make_mark(question)
        completions = "\n\n".join(
            f'<completion number="{number}" mark="{mark}">\n{text}\n</completion mark="{mark}">'
            for number, text in enumerate(question.completions, start=1)
        )
        values = {
            "{prompt}": f'<prompt mark="{mark}">\n{question.prompt}\n</prompt mark="{mark}">',
            "{completions}": completions,
            "{answer_format}": answer_format(len(question.completions), self.aspects),
            "{mark}": mark,
        }
        # in one pass, because prompts and completions may hold placeholders
        return re.sub("|".join(map(re.escape, PLACEHOLDERS)), lambda match: values[match[0]], self.template)


_FORM = "completion_N"  # the form of the answer that is asked for; a part of the digest


def make_mark(question: Question) -> str:
    """Return the mark of a question's tags: no text in it holds the mark, so none can imitate a tag.

    It is a hash of the question, so that the same question is asked in the same words; whoever wrote a completion
    could know the mark only by solving for its own hash.
    """
    texts = "\0".join([question.prompt, *question.completions])
    number = 0
    while (mark := hashlib.sha256(f"{question.key} {number}".encode()).hexdigest()[:12]) in texts:
        number += 1
    return mark


def answer_format(count: int, aspects: Sequence[str]) -> str:
    """Return, in words, the JSON that the judge of `count` completions answers with."""
    ratings = ", ".join(f'"{aspect}": {{"rationale": "...", "rating": "..."}}' for aspect in aspects)
    lines = ",\n".join(f'  "completion_{number}": {{{ratings}}}' for number in range(1, count + 1))
    return f"Answer with one JSON object of this form and nothing else:\n{{\n{lines}\n}}"


def answer_schema(count: int, aspects: Sequence[str]) -> dict[str, Any]:
    """Return the JSON schema of the same: every completion and every aspect is there, once."""
    rating = _object({"rationale": {"type": "string"}, "rating": {"type": "string", "enum": list(RATINGS)}})
    completion = _object(dict.fromkeys(aspects, rating))
    return _object({f"completion_{number}": completion for number in range(1, count + 1)})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def check_aspects(aspects: Sequence[str]) -> None:
    """Raise ValueError for names that could not be keys of an answer, or that stand there twice."""
    for aspect in aspects:
        if not _NAME.fullmatch(aspect):
            raise ValueError(f"--aspects {aspect}: name an aspect in letters, digits, _ and -, as {ASPECTS[0]}")
    plain = [aspect.lower().replace("-", "_") for aspect in aspects]
    if len(set(plain)) < len(plain):
        raise ValueError(f"--aspects {' '.join(aspects)}: an aspect is named twice; name each once")


def read_instructions(path: str | None, aspects: Sequence[str]) -> Instructions:
    """Return our own instructions, or those of a user's file, for these aspects.

    Raises ValueError if a placeholder, or the section of an aspect, is not there.
    """
    check_aspects(aspects)
    if path is None:
        template = resources.files("notus.feedback").joinpath("rating.txt").read_text(encoding="utf-8")
    else:
        template = _read(path)
    sections = {match[1] for match in _SECTION.finditer(template)}
    for aspect in aspects:
        if aspect not in sections:
            where = f"--instructions {path}" if path else f"--aspects {aspect}: our own instructions"
            raise ValueError(
                f'{where}: no section "## Aspect: {aspect}"; write one, with the scale from 1 to 5, into a file '
                "for --instructions"
            )
    return Instructions(_SECTION.sub(lambda match: match[0] if match[1] in aspects else "", template), tuple(aspects))


def _read(path: str) -> str:
    try:
        template = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--instructions {path}: cannot be read ({error}); check the path") from error
    for name in REQUIRED:
        if template.count(name) != 1:
            found = "no" if name not in template else "more than one"
            raise ValueError(f"--instructions {path}: {found} {name}; it needs {', '.join(REQUIRED)}, each once")
    return template
