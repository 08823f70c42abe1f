"""From records to what a judge is asked: the different completions of each, in an order that is drawn and recorded."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from notus.feedback.judge import Question
from notus.feedback.records import Record, digest_of

_FIRST, _AGAIN = "first", "again"


@dataclasses.dataclass(frozen=True)
class Item:
    """A record and what the judge is asked about it."""

    record: Record
    first: Question | None  # None: the record has no completions
    again: Question | None  # the same completions in another order; None: they are not rated again


def make_item(place: str, record: Record, *, identity: str, seed: int, again_share: float) -> Item:
    """Return a record with its questions. They depend on the record, the judge and the seed, and on no other record."""
    texts = list(dict.fromkeys(completion["response"] for completion in record["completions"]))
    if not texts:
        return Item(record, None, None)
    prompt = prompt_text(record)
    seen = [prompt, record.get("messages"), record.get("tools"), record.get("chat_template_kwargs")]
    digest = digest_of([seen, texts])
    order = _shuffled(len(texts), seed, _FIRST, digest)
    orders = [order]
    if len(texts) > 1 and _fraction([seed, "is rated again", digest]) < again_share:
        other = _shuffled(len(texts), seed, _AGAIN, digest)
        orders.append(other if other != order else other[1:] + other[:1])
    places = [next(place for place, each in enumerate(record["completions"]) if each["response"] == t) for t in texts]
    questions = [
        Question(
            key=digest_of([identity, seen, [texts[number] for number in each]]),
            place=place,
            prompt=prompt,
            completions=[texts[number] for number in each],
            order=[places[number] for number in each],
            messages=record.get("messages") or [{"role": "user", "content": record["instruction"]}],
            tools=record.get("tools"),
            template_kwargs=record.get("chat_template_kwargs") or {},
        )
        for each in orders
    ]
    return Item(record, questions[0], questions[1] if len(questions) > 1 else None)


def prompt_text(record: Mapping[str, Any]) -> str:
    """Return the prompt as a judge reads it: a single user turn as it is, several turns with their roles, and tools."""
    turns = record.get("messages")
    parts = [f"tools: {json.dumps(record['tools'], ensure_ascii=False)}"] if record.get("tools") else []
    if not turns or (len(turns) == 1 and turns[0]["role"] == "user" and isinstance(turns[0]["content"], str)):
        return "\n\n".join([*parts, turns[0]["content"] if turns else record["instruction"]])
    return "\n\n".join([*parts, *(f"{turn['role']}: {_turn_text(turn)}" for turn in turns)])


def _turn_text(turn: Mapping[str, Any]) -> str:
    """Return what a turn says, and which tools it calls."""
    said = [] if turn["content"] is None else [turn["content"]]
    called = [turn["tool_calls"]] if turn.get("tool_calls") else []
    parts = (each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in [*said, *called])
    return "\n".join(parts)


def _shuffled(length: int, seed: int, what: str, digest: str) -> list[int]:
    return sorted(range(length), key=lambda number: digest_of([seed, what, digest, number]))


def _fraction(value: Any) -> float:
    """Return a number in [0, 1) by a hash."""
    return int(digest_of(value)[:13], 16) / 16**13
