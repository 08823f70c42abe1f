"""The formats of a data row, each read into one normal form: a prompt and its completions.

The columns say which format a row has. The first line that fits decides:

    task  columns                                          contents
    ----  -----------------------------------------------  ------------------------------------------------------
    DPO   conversations, chosen, rejected                  ShareGPT; `conversations` is the prompt
    DPO   instruction, chosen_response, rejected_response  Argilla v1: strings, a user turn and its two answers
    DPO   prompt, chosen, rejected                         all strings: plain text; otherwise messages, either
                                                           what follows the prompt or the whole conversations
                                                           (Argilla's cleaned release)
    DPO   chosen, rejected                                 whole conversations; the leading turns that they share
                                                           are the prompt
    SFT   messages                                         a conversation; every assistant turn is learned
    SFT   prompt, completion                               both strings: plain text; otherwise messages
    SFT   the columns of a DPO row                         the chosen side
    SFT   conversations                                    as `messages`

A message is {role, content} or {from, value}. Its role is system, user (human) or assistant (gpt). Where messages are
expected, a string stands for one turn: of the user in a prompt, of the assistant in a completion. If a prompt string
stands beside whole conversations, it is taken for a copy of their first turn and is not read.

Of the other columns two things are kept for reports: `source`, a string, and the ratings of chosen and rejected,
numbers in `chosen_avg_rating` and `rejected_avg_rating` (Argilla v1), `chosen-rating` and `rejected-rating` (cleaned)
or `score_chosen` and `score_rejected` (UltraFeedback binarized). All else is ignored.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Turns = list[Message] | str  # a string is plain text, for which no template is used
Task = Literal["dpo", "sft"]

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

PAIR_FORMS = (
    ("conversations", "chosen", "rejected"),
    ("instruction", "chosen_response", "rejected_response"),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
)
RATINGS = (
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("chosen-rating", "rejected-rating"),
    ("score_chosen", "score_rejected"),
)
SFT_FORMS = (("messages",), ("prompt", "completion"), *PAIR_FORMS, ("conversations",))


class Record(NamedTuple):
    """A prompt and its K completions, all messages or all plain text. DPO: chosen, rejected; SFT: one.

    Attributes:
        prompt: what stands before the completions.
        completions: messages that follow it; K of them.
        tools: functions that the conversation may call, as JSON schemas, for the chat template.
        template_kwargs: further arguments of the chat template.
    """

    prompt: Turns
    completions: tuple[Turns, ...]
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = MappingProxyType({})


class Provenance(NamedTuple):
    """Where a row came from and how its answers were rated, as its data say; None: they do not."""

    source: str | None
    chosen_rating: float | None
    rejected_rating: float | None


def normalize(row: Mapping[str, Any], task: Task) -> Record:
    """Read one row of any of the forms above.

    Raises ValueError, naming the key and turn, for columns of no known form, contents that are no strings,
    unknown roles, and conversations that do not fit their prompt.
    """
    form = find_form(row, task)
    if form == ("messages",) or form == ("conversations",):
        return _conversation(_messages(row[form[0]], form[0], "user"))
    if form == ("prompt", "completion"):
        return _answers(row, "prompt", form[1:])
    record = _pair(row, form)
    return record if task == "dpo" else Record(record.prompt, record.completions[:1])


def find_form(row: Mapping[str, Any], task: Task) -> tuple[str, ...]:
    """The columns that are read from rows with these columns; ValueError if they are of no known form."""
    if not isinstance(row, Mapping):
        raise ValueError(f"the row is {_described(row)}, but must be an object with the columns of a form")
    forms = PAIR_FORMS if task == "dpo" else SFT_FORMS
    for form in forms:
        if all(column in row for column in form):
            return form
    accepted = "; ".join("+".join(form) for form in forms)
    remedy = "rename the columns"
    if {"instruction", "completions"} <= set(row):
        remedy = "these are UltraFeedback's: make pairs of them with `python -m notus curate` first"
    raise ValueError(
        f"the columns {', '.join(map(str, row)) or '(none)'} are of no known {task} form ({accepted}); {remedy}"
    )


def read_provenance(row: Mapping[str, Any]) -> Provenance:
    """What stands in a row's `source` and ratings; never an error, because training does not need them."""
    source = row.get("source")
    if isinstance(source, str):
        source = source.encode(errors="replace").decode()  # half of a surrogate pair cannot be stored
    columns = next((pair for pair in RATINGS if pair[0] in row or pair[1] in row), RATINGS[0])
    return Provenance(source if isinstance(source, str) else None, *(_rating(row.get(column)) for column in columns))


def _rating(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e30 else None  # NaN compares false; beyond, fp32 overflows


def _pair(row: Mapping[str, Any], form: tuple[str, ...]) -> Record:
    if form == ("instruction", "chosen_response", "rejected_response"):
        for column in form:
            _check_text(row[column], f"key '{column}'")
        return Record(
            [{"role": "user", "content": row["instruction"]}],
            tuple([{"role": "assistant", "content": row[column]}] for column in form[1:]),
        )
    if form == ("chosen", "rejected"):
        return _shared_turns(*(_whole_conversation(row[column], column) for column in form))
    return _answers(row, form[0], form[1:])


def _answers(row: Mapping[str, Any], prompt_column: str, columns: tuple[str, ...]) -> Record:
    """An explicit prompt, and the completions in `columns`."""
    prompt, values = row[prompt_column], [row[column] for column in columns]
    if all(isinstance(value, str) for value in (prompt, *values)):
        for column in (prompt_column, *columns):
            _check_text(row[column], f"key '{column}'")
        return Record(prompt, tuple(values))
    base = _messages(prompt, prompt_column, "user")
    completions = [_messages(value, column, "assistant") for value, column in zip(values, columns, strict=True)]
    if isinstance(prompt, str) and not any(_is_continuation(turns) for turns in completions):
        return _shared_turns(*completions)
    rest = [_after(base, turns, column) for turns, column in zip(completions, columns, strict=True)]
    if not base:
        raise ValueError(f"key '{prompt_column}' holds no turn; a completion needs a prompt")
    return Record(base, tuple(rest))


def _shared_turns(*conversations: list[Message]) -> Record:
    """Split whole conversations into the leading turns they share, and the rest: a turn of each at least."""
    room = min(len(turns) for turns in conversations) - 1
    leading = zip(*(turns[: max(room, 0)] for turns in conversations), strict=True)
    shared = len(list(takewhile(lambda turns: all(turn == turns[0] for turn in turns), leading)))
    if shared == 0:
        raise ValueError("the conversations share no leading turn, so there is no prompt; add a key 'prompt'")
    return Record(conversations[0][:shared], tuple(turns[shared:] for turns in conversations))


def _conversation(messages: list[Message]) -> Record:
    """A conversation to learn every answer of: the prompt is what stands before the first."""
    first = len(list(takewhile(lambda message: message["role"] != "assistant", messages)))
    if first == 0 and messages:  # an answer to nothing is context only
        rest = _conversation(messages[1:])
        return Record([messages[0], *rest.prompt], rest.completions)
    return Record(messages[:first], (messages[first:],))


def _is_continuation(turns: list[Message]) -> bool:
    """Whether the turns continue a prompt, rather than begin a conversation."""
    return not turns or turns[0]["role"] == "assistant"


def _after(base: list[Message], turns: list[Message], column: str) -> list[Message]:
    """What follows the prompt, of turns that may repeat it."""
    if base and turns[: len(base)] == base:
        return turns[len(base) :]
    if not _is_continuation(turns):
        raise ValueError(
            f"key '{column}' begins with a {turns[0]['role']} turn, but not with the prompt's turns; give "
            "what follows the prompt, or the whole conversation"
        )
    return turns


def _whole_conversation(value: Any, column: str) -> list[Message]:
    if isinstance(value, str):
        raise ValueError(f"key '{column}' is a string, so there is no prompt; add a key 'prompt', or give messages")
    return _messages(value, column, "assistant")


def _messages(value: Any, key: str, role_of_text: str) -> list[Message]:
    if isinstance(value, str):
        _check_text(value, f"key '{key}'")
        return [{"role": role_of_text, "content": value}]
    if isinstance(value, Mapping):  # ShareGPT's chosen and rejected are single messages
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise ValueError(f"key '{key}' is {_described(value)}, but must be a string or a list of messages")
    return [_message(turn, f"key '{key}', turn {number}") for number, turn in enumerate(value, start=1)]


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{place} is {_described(turn)}, but must be an object with role and content")
    # Arrow gives every message the keys of all: one that is absent here may be there as None.
    if turn.get("role") is None and turn.get("from") is not None:
        role_key, content_key = "from", "value"
    else:
        role_key, content_key = "role", "content"
    if role_key not in turn or content_key not in turn:
        found = ", ".join(map(str, turn)) or "none"
        raise ValueError(f"{place} has the keys {found}, but must have role and content, or from and value")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{place} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    _check_text(turn[content_key], f"{place}, '{content_key}'")
    return {"role": ROLES[role], "content": turn[content_key]}


def _check_text(value: Any, place: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{place} is {_described(value)}, but must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half of a surrogate pair at character {error.start}; remove it") from error


def _described(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
