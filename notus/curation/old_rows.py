"""Rows of earlier outputs of `notus curate`, mixed into a new one: `--old PAIRS [PAIRS ...] --old-share S`.

A draw without replacement: each row has a number, a hash of the seed and of its content, and the rows with the lowest
numbers are taken. So the draw depends neither on the order of the files nor on how often a row stands in them, and a
file that holds old rows itself may be named beside those that they came from. Rows that the new output has as well are
left out. An old row whose prompt is also a new one stays: its answers are others.

Two passes over the files; 16 bytes in memory per row.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notus.data.sources import Placed, read_file

# The columns by which the forms are told apart; `notus.curation.ultrafeedback` writes them.
V1 = frozenset(
    [
        *("source", "instruction", "chosen_response", "rejected_response"),
        *("chosen_avg_rating", "rejected_avg_rating", "chosen_model"),
    ]
)
CLEANED = frozenset(
    [
        *("source", "prompt", "chosen", "chosen-rating", "chosen-model"),
        *("rejected", "rejected-rating", "rejected-model"),
    ]
)
LISTS = frozenset(["source", "prompt", "completions", "ratings", "models"])
OF_TEMPLATE = frozenset(["tools", "chat_template_kwargs"])  # only of conversations


@dataclass(frozen=True)
class Form:
    """What the rows of an output look like."""

    columns: frozenset[str]  # V1, CLEANED or LISTS
    conversations: bool  # prompts of pairs are lists of messages, and rows have OF_TEMPLATE

    @property
    def name(self) -> str:
        """For people."""
        kind = {V1: "v1 pairs", CLEANED: "cleaned pairs", LISTS: "lists"}[self.columns]
        return f"{kind} of conversations" if self.conversations else kind


@dataclass(frozen=True)
class Drawn:
    """What was drawn."""

    rows: int  # how many
    wanted: int  # how many the share asks for
    found: int  # different ones in the files, without those that are new
    repeated: int  # left out: they stand there more than once, or are new
    new: int  # rows of the new output

    def __str__(self) -> str:
        share = self.rows / (self.rows + self.new)
        line = f"{self.rows:,} of {self.found:,} old rows drawn: {share:.1%} of the {self.rows + self.new:,} rows"
        if self.rows < self.wanted:
            line += f"; the share asks for {self.wanted:,}, so all there are were taken"
        return f"{line}; {self.repeated:,} old rows that repeat another were left out" if self.repeated else line


def form_of_files(paths: Sequence[Path]) -> Form:
    """Return the form that holds the rows of all files: of pairs the widest of theirs. Reads all rows.

    Raises ValueError, naming file and line, for a row that `notus curate` did not write, and for pairs beside lists.
    """
    forms: dict[Form, str] = {}
    for place, row in _read(paths):
        forms.setdefault(_form_of(row, place), place)
    widest = max(forms, key=_width)
    for form, place in forms.items():
        if (form.columns == LISTS) != (widest.columns == LISTS):
            raise ValueError(f"{place}: a row of {form.name}, but {forms[widest]} has {widest.name}; give one kind")
    return widest


def draw_old(
    paths: Sequence[Path], form: Form, share: float, seed: int, new: Sequence[bytes]
) -> tuple[Callable[[], Iterator[dict[str, Any]]], Drawn]:
    """Draw old rows that make `share` of the whole output, to the nearest row; all of them if there are too few.

    Args:
        paths: files of rows that `form` holds.
        form: of the new rows; old ones are brought into it.
        share: above 0, below 1.
        seed: of the draw.
        new: `row_digest` of each row of the new output.

    Returns:
        What yields the drawn rows, in the order of the files; and what was drawn.
    """
    assert 0 < share < 1
    wanted = round(len(new) * share / (1 - share))
    known, numbers, repeated = set(new), {}, 0
    for place, row in _read(paths):
        digest = row_digest(_brought(row, form, place))
        repeated += digest in known or digest in numbers
        if digest not in known:
            numbers[digest] = hashlib.blake2b(digest, digest_size=8, key=str(seed).encode()).digest()
    taken = set(sorted(numbers, key=lambda digest: numbers[digest])[:wanted])

    def rows() -> Iterator[dict[str, Any]]:
        left = set(taken)
        for place, row in _read(paths):
            brought = _brought(row, form, place)
            if (digest := row_digest(brought)) in left:
                left.remove(digest)
                yield brought

    return rows, Drawn(len(taken), wanted, len(numbers), repeated, len(new))


def _read(paths: Sequence[Path]) -> Iterator[Placed]:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; --old takes what `notus curate` wrote")
        empty = True
        for placed in read_file(path):
            empty = False
            yield placed
        if empty:
            raise ValueError(f"{path}: the file holds no rows; leave it out of --old")


def _form_of(row: Any, place: str) -> Form:
    columns = frozenset(row) if isinstance(row, dict) else frozenset()
    for known in (V1, CLEANED, LISTS):
        if columns - OF_TEMPLATE == known:
            as_messages = known == CLEANED and not isinstance(row["prompt"], str)
            return Form(known, as_messages or not columns.isdisjoint(OF_TEMPLATE))
    raise ValueError(
        f"{place}: not a row that `notus curate` wrote (its columns are {', '.join(sorted(columns)) or 'none'}); "
        "--old takes its earlier outputs. Other rows can be mixed in by a source of their own in data.train"
    )


def is_plain_text(row: dict[str, Any]) -> bool:
    """Whether a row of `CLEANED` or `LISTS` is text and what continues it, not messages; no row of `V1` is."""
    answers = row.get("completions") or [row.get("chosen")]
    return isinstance(answers[0], str)


def _width(form: Form) -> tuple[bool, bool]:
    return form.conversations, form.columns == CLEANED


def _brought(row: dict[str, Any], form: Form, place: str) -> dict[str, Any]:
    """The row in a form that is at least as wide as its own."""
    own = _form_of(row, place)
    if own.columns == V1 and form.columns == CLEANED:
        row = _cleaned(row)
    if form.columns == CLEANED and form.conversations and not own.conversations and not is_plain_text(row):
        sides = {side: row[side][-1:] for side in ("chosen", "rejected")}
        row = {**row, "prompt": [{"role": "user", "content": row["prompt"]}], **sides}
    if form.conversations:
        given = {name: row.get(name) for name in sorted(OF_TEMPLATE, reverse=True)}
        row = {**row, **{name: json.loads(value) if isinstance(value, str) else value for name, value in given.items()}}
    return row


def _cleaned(row: dict[str, Any]) -> dict[str, Any]:
    pair = {"source": row["source"], "prompt": row["instruction"]}
    for side in ("chosen", "rejected"):
        answer = {"role": "assistant", "content": row[f"{side}_response"]}
        pair[side] = [{"role": "user", "content": row["instruction"]}, answer]
        pair[f"{side}-rating"] = row[f"{side}_avg_rating"]
        pair[f"{side}-model"] = row.get(f"{side}_model")  # v1 has no rejected_model
    return pair


def row_digest(row: dict[str, Any]) -> bytes:
    """Return a digest of a row's content, whatever the order of its columns and whether Parquet filled in nulls."""
    return hashlib.blake2b(json.dumps(_without_nulls(row), sort_keys=True).encode(), digest_size=16).digest()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
