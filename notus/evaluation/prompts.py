"""Prompts from a file: which key holds them, and whether a string is a user turn or plain text to continue.

A prompt is read as the same row of training data would be, with the columns that belong to it (`CONTEXT`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from notus.data.formats import Record, Turns, normalize
from notus.data.sources import SUFFIXES, data_suffix, read_file

KEYS = ("prompt", "messages", "conversations", "instruction")
CONTEXT = ("system", "tools", "chat_template_kwargs", "input", "history")
_ANSWER = "-"
RESULTS = ("completion", "completions")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to complete."""

    place: str  # where it stands, for errors
    turns: Turns  # messages that end before the answer, or text to continue
    row: dict[str, Any] = dataclasses.field(default_factory=dict)  # the entry as it was read
    # tools, template_kwargs: for the chat template; see `Record`
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as a judge reads it: a single turn as it is, several with their roles."""
        if isinstance(self.turns, str):
            return self.turns
        if len(self.turns) == 1:
            return str(self.turns[0]["content"])
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.turns)


def read_prompts(path: Path, *, strings_are_turns: bool, system: str | None = None) -> list[Prompt]:
    """Read a .txt file, one prompt a line, or a data file (JSON, CSV, Parquet) whose rows have one of `KEYS`.

    A string is the user's turn if `strings_are_turns`, else text to continue. `system` is the text of a system turn for
    conversations without one. Raises ValueError, naming file and line, for what is no prompt, and for a file without
    any.
    """
    prompts = [read_prompt(row, place, strings_are_turns=strings_are_turns) for place, row in _rows(path)]
    if system is not None:
        prompts = [_with_system(prompt, system) for prompt in prompts]
    if not prompts:
        raise ValueError(f"{path}: the file holds no prompts; give at least one")
    return prompts


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    if data_suffix(path) is not None:
        yield from read_file(path)
        return
    if path.suffix != ".txt":
        raise ValueError(f"{path}: prompts are read from .txt, {', '.join(SUFFIXES)} files; convert it")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}, line {number}", {"prompt": line.removesuffix("\r")}


def _with_system(prompt: Prompt, system: str) -> Prompt:
    if isinstance(prompt.turns, str) or prompt.turns[0]["role"] == "system":
        return prompt
    return dataclasses.replace(prompt, turns=[{"role": "system", "content": system}, *prompt.turns])


def read_prompt(row: Any, place: str, *, strings_are_turns: bool) -> Prompt:
    """Return a row's prompt: messages that end before the answer; or a string, unless these are turns.

    Raises ValueError if it has none.
    """
    key = next((key for key in KEYS if key in row), None) if isinstance(row, dict) else None
    if key is None:
        raise ValueError(f"{place}: holds no prompt; give an object with one of the keys {', '.join(KEYS)}")
    taken = [name for name in RESULTS if name in row]
    if taken:
        raise ValueError(f"{place}: has a key {taken[0]!r}, which the result would replace; rename it")
    try:
        record = _read(row, key, strings_are_turns)
    except ValueError as error:
        reason = str(error).replace("key 'prompt'", f"key '{key}'")
        raise ValueError(f"{place}: {reason}") from error
    turns = record.prompt
    if not isinstance(turns, str) and turns[-1]["role"] == "assistant":  # the answer to write anew
        turns = turns[:-1]
        if not turns:
            raise ValueError(f"{place}: key '{key}' holds an answer alone; give the turns before it")
    return Prompt(place, turns, row, record.tools, dict(record.template_kwargs))  # a proxy cannot be sent to ranks


def _read(row: Mapping[str, Any], key: str, strings_are_turns: bool) -> Record:
    """Read the prompt under `key` as a row of training data, to which an answer is added."""
    value, context = row[key], {name: row[name] for name in CONTEXT if row.get(name) is not None}
    if key == "instruction" and (context.get("input") or context.get("history")):
        return normalize({"instruction": value, "output": _ANSWER, **context}, "sft")
    if isinstance(value, str) and not strings_are_turns:
        return normalize({"prompt": value, "completion": _ANSWER, **context}, "sft")
    return normalize({"prompt": value, "completion": [{"role": "assistant", "content": ""}], **context}, "sft")
