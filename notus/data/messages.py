"""A message of a conversation, as the common data sets write it, read into one normal form.

The normal form is that of transformers' chat templates: `role`, `content`, and only where given `reasoning_content`,
`tool_calls`, `name` and `tool_call_id`. `"learn": False` marks an assistant turn that must not be learned. `tools`
stands in a system turn that brings its own functions; `formats.normalize` moves them to the record.

What is read, besides {role, content}:

- {from, value}, ShareGPT's keys, and the roles of `ROLES`.
- `content` as a list of parts {type: text, text}, which are joined without a separator. Other parts are an error.
- `tool_calls`, or OpenAI's older `function_call`, or the role `function_call` (`tool_call`) whose content is the JSON
  of one call or of a list. Each call becomes {type, function: {name, arguments}}. `arguments` become an object where
  they are a string of JSON, because that is what the templates expect.
- `reasoning_content`, also called `thinking` or `reasoning`.
- `weight` (OpenAI), `train` or `loss`: 0, 1 or a boolean, whether an assistant turn is learned.

Arrow gives every object the keys of all, with null for those that it does not have. So null stands for "absent"
everywhere, and keys that are null are taken out of tool calls, tools and template arguments at any depth. A null that
matters (a default, say) survives in `arguments` or `tools` that are written as a string of JSON.

A string may hold a whole conversation: the JSON of a list of messages, or Anthropic's
"\\n\\nHuman: ...\\n\\nAssistant: ...".
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
Turns = list[Message] | str  # a string is plain text, for which no template is used

_CALLS = ("function_call", "tool_call")  # roles of assistant turns whose content is the JSON of their calls
ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    **dict.fromkeys(_CALLS, "assistant"),
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_LEARNED = ("weight", "train", "loss")
_UNSUPPORTED = (
    *("image", "images", "audio", "audios", "video", "videos"),
    *("refusal", "train_detail", "training_detail"),
)
_BASIC = ("role", "content", "from", "value")
_EXTRAS = ("tool_calls", "function_call", "name", "tool_call_id", "tools")
MESSAGE_KEYS = frozenset([*_BASIC, *_EXTRAS, *_REASONING, *_LEARNED, *_UNSUPPORTED])
"""Keys of a message that are read, or are an error; all others have no effect."""

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_PRINTED_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")
# Scripts without spaces between words: Thai to Burmese, Khmer, Chinese and Japanese, their full and half widths.
_UNSPACED = re.compile(
    r"[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\ua4cf"
    r"\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_MOST_NAMES = 20  # of columns or keys, in an error
_NAME_LENGTH = 40
_MOST_BITS = 10_000  # of an integer: Python prints no more than 4,300 digits


def read_messages(value: Any, key: str, role_of_text: str) -> list[Message]:
    """Read a list of messages, a single one, or a string: a whole conversation, or one turn of `role_of_text`.

    Raises ValueError, naming the key and turn, for what is no message and for what cannot be learned from.
    """
    if isinstance(value, str):
        found = read_string(value, key)
        return [{"role": role_of_text, "content": found}] if isinstance(found, str) else found
    if isinstance(value, Mapping):  # ShareGPT's chosen and rejected are single messages
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise ValueError(f"key '{key}' is {described(value)}, but must be a string or a list of messages")
    return [_message(turn, f"key '{key}', turn {number}") for number, turn in enumerate(value, start=1)]


def read_string(text: str, key: str) -> Turns:
    """Return the conversation that a string holds, or the string. Errors as in `read_messages`."""
    check_text(text, f"key '{key}'")
    listed = listed_messages(text)
    if listed:
        return read_messages(listed, key, "user")
    if _PRINTED_MESSAGES.match(text) and text.rstrip().endswith("]"):
        raise ValueError(f"key '{key}' holds messages as Python prints them; store them as a list, or as JSON")
    return _dialogue(text, key) if is_dialogue(text) else text


def listed_messages(text: str) -> list[Any]:
    """The list of messages, unread, whose JSON a string is; empty if it is anything else."""
    if not text.lstrip().startswith("[") or not text.rstrip().endswith("]"):
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # then it is a string that begins with a bracket
        return []
    return found if isinstance(found, list) and all(map(_looks_like_a_message, found)) else []


def _looks_like_a_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return {"from", "value"} <= set(value) or ("role" in value and not {"content", "tool_calls"}.isdisjoint(value))


def is_dialogue(text: str) -> bool:
    """Whether a string is a conversation in Anthropic's form, "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    return text.startswith("\n\nHuman:")


def _dialogue(text: str, key: str, first: str = "Human") -> list[Message]:
    pieces = _SPEAKER.split(text)[1:]  # speaker, words, speaker, words, ...
    speakers, words = pieces[::2], pieces[1::2]
    expected = first
    for number, speaker in enumerate(speakers, start=1):
        if speaker != expected:
            raise ValueError(
                f"key '{key}', turn {number} is of '{speaker}:', but must be of '{expected}:'; the turns of "
                "Human and Assistant must alternate"
            )
        expected = "Assistant" if speaker == "Human" else "Human"
    return [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in zip(speakers, words, strict=True)]


def dialogue_answer(text: str, key: str) -> list[Message]:
    """Read what follows a prompt of the form "\\n\\nHuman: ...\\n\\nAssistant:": an answer, perhaps more turns."""
    check_text(text, f"key '{key}'")
    begins = text.lstrip().startswith("Assistant:")
    return _dialogue(text if begins else f"Assistant: {text}", key, first="Assistant")


def bare(messages: Sequence[Message]) -> list[Message]:
    """The messages without their marks of what is learned."""
    return [{key: value for key, value in message.items() if key != "learn"} for message in messages]


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{place} is {described(turn)}, but must be an object with role and content")
    extras = {key: value for key, value in turn.items() if key not in _BASIC and not is_empty(value)}
    role, content_key = _role(turn, extras, place)
    message: Message = {"role": ROLES[role], "content": ""}
    if extras or role in _CALLS:
        message |= _read_extras(turn, extras, place, role, content_key)
    if role not in _CALLS:
        message["content"] = _content(turn.get(content_key), f"{place}, '{content_key}'", "tool_calls" in message)
    return message


def _role(turn: Mapping[str, Any], extras: Mapping[str, Any], place: str) -> tuple[str, str]:
    """The role as it is called there, and the key of the content."""
    # Arrow gives every message the keys of all: one that is absent here may be there as None.
    is_sharegpt = turn.get("role") is None and turn.get("from") is not None
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    has_calls = "tool_calls" in extras or "function_call" in extras
    if role_key not in turn or (content_key not in turn and not has_calls):
        found = listed(turn) or "none"
        raise ValueError(f"{place} has the keys {found}, but must have role and content, or from and value")
    contents = [turn[key] for key in ("content", "value") if turn.get(key) is not None]
    if len(contents) > 1 and contents[0] != contents[1]:
        raise ValueError(f"{place} has both 'content' and 'value', which differ; remove one")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else described(role)
        raise ValueError(f"{place} has the unknown role {shown}; known are {', '.join(ROLES)}")
    return role, content_key


def _read_extras(
    turn: Mapping[str, Any], extras: Mapping[str, Any], place: str, role: str, content_key: str
) -> Message:
    """What a message has besides role and content."""
    for key in _UNSUPPORTED:
        if key in extras:
            raise ValueError(f"{place} has '{key}', which is not supported; remove it, or leave the row out")
    calls = {key: extras[key] for key in ("tool_calls", "function_call") if key in extras}
    if role in _CALLS:
        calls[content_key] = turn.get(content_key)
        place = f"{place} of role {role}"
    found = _reasoning(extras, place) | _calls(calls, place)
    for key in found:
        if ROLES[role] != "assistant":
            raise ValueError(f"{place} has {key}, but is of role {role}; only an assistant's turn can have them")
    found |= _names(extras, place, role)
    if not _is_learned(extras, place, role) and ROLES[role] == "assistant":
        found["learn"] = False
    return found


def _content(value: Any, place: str, has_calls: bool) -> str:
    if value is None and has_calls:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "".join(_part(part, f"{place}, part {number}") for number, part in enumerate(value, start=1))
    check_text(value, place)
    return str(value)


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        shown = f"of type {kind[:40]!r}" if isinstance(kind, str) else "no object with a type"
        raise ValueError(f"{place} is {shown}; only parts of type 'text' are supported")
    check_text(part.get("text"), f"{place}, 'text'")
    return str(part["text"])


def _reasoning(extras: Mapping[str, Any], place: str) -> Message:
    found = {key: extras[key] for key in _REASONING if key in extras}
    for key, value in found.items():
        check_text(value, f"{place}, '{key}'")
    if len(set(found.values())) > 1:
        raise ValueError(f"{place} has {' and '.join(found)}, which differ; keep one")
    return {"reasoning_content": next(iter(found.values()))} if found else {}


def _names(extras: Mapping[str, Any], place: str, role: str) -> Message:
    found: Message = {key: extras[key] for key in ("name", "tool_call_id") if key in extras}
    for key, value in found.items():
        check_text(value, f"{place}, '{key}'")
    if "tools" not in extras:
        return found
    if ROLES[role] != "system":
        raise ValueError(f"{place} has tools; give them in a column 'tools', or in the system turn")
    tools = read_tools(extras["tools"], f"{place}, 'tools'")
    return {**found, "tools": tools} if tools else found


def _is_learned(extras: Mapping[str, Any], place: str, role: str) -> bool:
    found = {key: extras[key] for key in _LEARNED if key in extras}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            shown = value if isinstance(value, float) else described(value)
            raise ValueError(f"{place} has the {key} {shown}, but must have 0 or 1: a turn is learned or it is not")
        if value and ROLES[role] != "assistant":
            raise ValueError(f"{place} has the {key} {value}, but is of role {role}; only assistant turns are learned")
    if len({bool(value) for value in found.values()}) > 1:
        raise ValueError(f"{place} has {' and '.join(found)}, which contradict each other; keep one")
    return all(found.values())


def _calls(found: Mapping[str, Any], place: str) -> Message:
    """The calls that stand at one of several keys, as {"tool_calls": [...]}; empty if there are none."""
    if len(found) > 1:
        raise ValueError(f"{place} has calls in {' and '.join(map(repr, found))}; keep one")
    for key, value in found.items():
        calls = parse_json(value, f"{place}, '{key}'") if isinstance(value, str) else value
        calls = [calls] if isinstance(calls, Mapping) else calls
        if not isinstance(calls, Sequence) or isinstance(calls, str | bytes) or not calls:
            raise ValueError(f"{place}, '{key}' is {described(calls)}, but must be a list of calls")
        return {"tool_calls": [_call(call, f"{place}, '{key}' {n}") for n, call in enumerate(calls, start=1)]}
    return {}


def _call(call: Any, place: str) -> dict[str, Any]:
    call = read_object(call, place)
    if "function" not in call:  # {name, arguments}, as ShareGPT has them
        flat = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        call = {"type": "function", **call, "function": flat}
    function = call["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{place} names no function; give {{name, arguments}}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{place}, arguments") if arguments.strip() else {}
        check_json(arguments, f"{place}, arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{place}, arguments is {described(arguments)}, but must be an object, or its JSON")
    return {**call, "function": {**function, "arguments": arguments}}


def read_tools(value: Any, place: str) -> list[Any] | None:
    """Read the JSON schemas of functions: a list of objects, or its JSON, or a list of the JSON of each.

    None if there are none. Raises ValueError for anything else.
    """
    if isinstance(value, str):
        value = parse_json(value, place) if value.strip() else None
        check_json(value, place)
        return _schemas(value, place) if not is_empty(value) else None
    return None if is_empty(value) else _schemas(value, place)


def _schemas(value: Any, place: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{place} is {described(value)}, but must be a list of JSON schemas, or its JSON")
    return [
        read_object(parse_json(each, place) if isinstance(each, str) else each, f"{place}, function {number}")
        for number, each in enumerate(value, start=1)
    ]


def read_object(value: Any, place: str) -> dict[str, Any]:
    """Return an object of a row without the keys that are null, at any depth. ValueError if it is none."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {described(value)}, but must be an object")
    check_json(value, place)
    found: dict[str, Any] = without_nulls(value)
    return found


def parse_json(text: str, place: str) -> Any:
    """Parse JSON. ValueError with the reason if it is none."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error


def without_nulls(value: Any) -> Any:
    """A copy of what JSON can hold without the keys of objects that are null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def check_json(value: Any, place: str) -> None:
    """Raise ValueError for what a template cannot print as JSON."""
    try:
        _check_json(value, place)
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply") from error


def _check_json(value: Any, place: str) -> None:
    if isinstance(value, str):
        check_text(value, place)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            check_text(key, f"{place}, a key")
            _check_json(each, place)
    elif isinstance(value, list | tuple):
        for each in value:
            _check_json(each, place)
    elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"{place} holds an integer of more than 3,000 digits; write it as a string")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ValueError(f"{place} holds a value {described(value)}; only what JSON has can be used")


def check_text(value: Any, place: str) -> None:
    """Raise ValueError unless the value is a string that can be encoded."""
    if not isinstance(value, str):
        raise ValueError(f"{place} is {described(value)}, but must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half of a surrogate pair at character {error.start}; remove it") from error


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, an empty string, or lists and objects of nothing else."""
    if isinstance(value, str):
        return not value
    waiting = [value]
    while waiting:  # a loop, because the files may nest as deep as they like
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif value is not None and value != "" and value != b"":
            return False
    return True


def is_letter(text: str) -> bool:
    """Whether a character is a letter or digit of a script that puts spaces between words; an empty string is not."""
    return text.isalnum() and not _UNSPACED.match(text)


def listed(names: Iterable[Any]) -> str:
    """Names for error messages, few and short: of long lists the first, and how many there are."""
    every = list(names)
    shown = [f"{name!s:.{_NAME_LENGTH}}" for name in every[:_MOST_NAMES]]
    rest = [f"... ({len(every):,} in all)"] if len(every) > _MOST_NAMES else []
    return ", ".join([*shown, *rest])


def described(value: Any) -> str:
    """What a value is, for error messages."""
    return "null" if value is None else f"of type {type(value).__name__}"
