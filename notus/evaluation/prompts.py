"""Prompts from a file: which key holds them, and whether a string is a user turn or plain text to continue."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from notus.data.formats import Message, Turns, normalize
from notus.data.sources import read_file

KEYS = ("prompt", "messages", "conversations", "instruction")
RESULTS = ("completion", "completions")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to complete."""

    place: str  # where it stands, for errors
    row: dict[str, Any]  # the entry as it was read
    turns: Turns  # messages that end before the answer, or text to continue

    @property
    def text(self) -> str:
        """The prompt as a judge reads it: a single turn as it is, several with their roles."""
        if isinstance(self.turns, str):
            return self.turns
        if len(self.turns) == 1:
            return self.turns[0]["content"]
        return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in self.turns)


def read_prompts(path: Path, *, strings_are_turns: bool, system: str | None = None) -> list[Prompt]:
    """Read a .txt file, one prompt a line, or a .jsonl or .json file of objects with one of `KEYS`.

    A string is the user's turn if `strings_are_turns`, else text to continue. `system` is the text of a system turn for
    conversations without one. Raises ValueError, naming file and line, for what is no prompt, and for a file without
    any.
    """
    prompts = []
    for place, row in _rows(path):
        value, turns = read_prompt(row, place)
        if isinstance(value, str) and not strings_are_turns:
            prompts.append(Prompt(place, row, value))
            continue
        if system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        prompts.append(Prompt(place, row, turns))
    if not prompts:
        raise ValueError(f"{path}: the file holds no prompts; give at least one")
    return prompts


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    if path.suffix in (".jsonl", ".json"):
        yield from read_file(path)
        return
    if path.suffix != ".txt":
        raise ValueError(f"{path}: prompts are read from .txt, .jsonl and .json files; convert it")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}, line {number}", {"prompt": line.removesuffix("\r")}


def read_prompt(row: Any, place: str) -> tuple[Any, list[Message]]:
    """Return a row's prompt as it stands there, and as messages that end before the answer.

    Raises ValueError if it has none.
    """
    key = next((key for key in KEYS if key in row), None) if isinstance(row, dict) else None
    if key is None:
        raise ValueError(f"{place}: holds no prompt; give an object with one of the keys {', '.join(KEYS)}")
    taken = [name for name in RESULTS if name in row]
    if taken:
        raise ValueError(f"{place}: has a key {taken[0]!r}, which the result would replace; rename it")
    return row[key], _messages(row[key], key, place)


def _messages(value: Any, key: str, place: str) -> list[Message]:
    """Checked messages; a last assistant turn is the answer to write anew, so it is left out."""
    answered = {"prompt": value, "completion": [{"role": "assistant", "content": ""}]}
    try:
        messages = normalize(answered, "sft").prompt
    except ValueError as error:
        reason = str(error).replace("key 'prompt'", f"key '{key}'")
        raise ValueError(f"{place}: {reason}") from error
    assert not isinstance(messages, str)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{place}: key '{key}' holds an answer alone; give the turns before it")
    return messages
