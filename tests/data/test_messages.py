"""Messages as data sets write them, each with the message that the templates get."""

import json
from typing import Any

import pytest

from notus.data.messages import MESSAGE_KEYS, read_messages, read_tools

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def read(turn: Any) -> dict[str, Any]:
    (message,) = read_messages([turn], "messages", "user")
    return message


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "user", "content": "q"}, {"role": "user", "content": "q"}),
        ({"from": "human", "value": "q"}, {"role": "user", "content": "q"}),
        ({"from": "gpt", "value": "a"}, {"role": "assistant", "content": "a"}),
        ({"role": "developer", "content": "s"}, {"role": "system", "content": "s"}),
        ({"role": "user", "content": "q", "from": None, "value": None}, {"role": "user", "content": "q"}),
        ({"role": "user", "content": "q", "name": "Ada"}, {"role": "user", "content": "q", "name": "Ada"}),
        # parts of text are joined as they are
        (
            {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}]},
            {"role": "user", "content": "a b"},
        ),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        # what a function returns
        (
            {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"},
            {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"},
        ),
        ({"role": "function", "content": "3", "name": "add"}, {"role": "tool", "content": "3", "name": "add"}),
        ({"from": "observation", "value": "3"}, {"role": "tool", "content": "3"}),
        # nothing
        (
            {
                "role": "assistant",
                "content": "a",
                "tool_calls": [],
                "reasoning_content": "",
                "name": None,
                "weight": None,
            },
            {"role": "assistant", "content": "a"},
        ),
        ({"role": "assistant", "content": "a", "images": [], "refusal": None}, {"role": "assistant", "content": "a"}),
        # unknown keys: `formats.unknown_columns` lists them
        ({"role": "user", "content": "q", "timestamp": 3}, {"role": "user", "content": "q"}),
    ],
)
def test_message(turn: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(turn) == expected


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_one_name(key: str) -> None:
    turn = {"role": "assistant", "content": "4", key: "2 + 2"}
    assert read(turn) == {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}


def test_equal_reasoning_under_two_names() -> None:
    turn = {"role": "assistant", "content": "4", "thinking": "t", "reasoning": "t"}
    assert read(turn)["reasoning_content"] == "t"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},  # as in transformers' documentation
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        # OpenAI's arguments are a string
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]},
        # Arrow: keys of the arguments of other calls
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "id": None, "function": {"name": "add", "arguments": {"a": 1, "b": 2, "x": None}}}],
        },
        {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]},
        {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'}},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
        {"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}]'},
        {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
    ],
)
def test_every_way_to_write_a_call(turn: dict[str, Any]) -> None:
    assert read(turn) == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        (" ", {}),
        ({}, {}),
        (None, {}),
        # null in a string is what the row says; null in an object is what Arrow fills in
        ('{"unit": null}', {"unit": None}),
        ({"unit": None}, {}),
        ({"a": {"b": None, "c": [1, None, {"d": None}]}}, {"a": {"c": [1, None, {}]}}),
    ],
)
def test_arguments(arguments: Any, expected: dict[str, Any]) -> None:
    turn = {
        "role": "assistant",
        "content": "x",
        "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": arguments}}],
    }
    assert read(turn)["tool_calls"] == [{"id": "c1", "function": {"name": "f", "arguments": expected}}]


@pytest.mark.parametrize(
    ("flags", "learned"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 1.0, "train": True}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"loss": False}, False),
        ({"weight": None, "train": False}, False),
    ],
)
def test_which_turns_are_learned(flags: dict[str, Any], learned: bool) -> None:
    expected = {"role": "assistant", "content": "a"} | ({} if learned else {"learn": False})
    assert read({"role": "assistant", "content": "a", **flags}) == expected
    if not learned:  # a turn of the user is never learned anyway
        assert read({"role": "user", "content": "a", **flags}) == {"role": "user", "content": "a"}


ASSISTANT = {"role": "assistant", "content": "a"}
USER = {"role": "user", "content": "q"}
DEEP: Any = "x"
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({**ASSISTANT, "weight": 0.5}, r"turn 1 has the weight 0.5, but must have 0 or 1"),
        ({**ASSISTANT, "weight": 10**5000}, r"turn 1 has the weight of type int"),
        ({**ASSISTANT, "weight": float("nan")}, r"the weight nan"),
        ({**ASSISTANT, "train": "no"}, r"the train of type str"),
        ({**ASSISTANT, "weight": 0, "train": True}, r"weight and train, which contradict"),
        ({**USER, "weight": 1}, r"has the weight 1, but is of role user; only assistant turns are learned"),
        ({**USER, "train": True}, r"only assistant turns are learned"),
        ({**ASSISTANT, "thinking": "a", "reasoning": "b"}, r"thinking and reasoning, which differ"),
        ({**ASSISTANT, "reasoning": {"text": "a"}}, r"'reasoning' is of type dict"),
        ({**USER, "reasoning_content": "a"}, r"has reasoning_content, but is of role user"),
        ({**USER, "tool_calls": [CALL]}, r"has tool_calls, but is of role user"),
        ({"role": "assistant", "content": None}, r"'content' is null"),
        ({"role": "assistant", "content": None, "tool_calls": []}, r"'content' is null"),
        ({"role": "user", "content": {"text": "q"}}, r"'content' is of type dict"),
        ({"role": "user", "content": ["q"]}, r"'content', part 1 is no object with a type"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, r"part 1 is of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"part 1, 'text' is null"),
        ({**USER, "content": "q", "value": "other"}, r"has both 'content' and 'value', which differ"),
        ({**USER, "images": ["a.png"]}, r"has 'images', which is not supported"),
        ({**ASSISTANT, "refusal": "No."}, r"has 'refusal', which is not supported"),
        ({**ASSISTANT, "train_detail": [{"begin_offset": 0}]}, r"has 'train_detail'"),
        ({**USER, "name": 3}, r"'name' is of type int"),
        ({**USER, "tools": [ADD]}, r"has tools; give them in a column 'tools', or in the system turn"),
        ({"from": "function_call", "value": "add(1, 2)"}, r"role function_call, 'value' is no JSON"),
        ({"from": "function_call", "value": "[]"}, r"'value' is of type list, but must be a list of calls"),
        ({"from": "function_call", "value": "3"}, r"'value' is of type int, but must be a list of calls"),
        ({**ASSISTANT, "tool_calls": ["add"]}, r"'tool_calls' 1 is of type str, but must be an object"),
        ({**ASSISTANT, "tool_calls": [{"function": {"arguments": {"a": 1}}}]}, r"'tool_calls' 1 names no function"),
        ({**ASSISTANT, "tool_calls": [CALL], "function_call": {"name": "f"}}, r"calls in 'tool_calls' and 'function_"),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "1, 2"}]}, r"arguments is no JSON"),
        (
            {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "[1]"}]},
            r"arguments is of type list, but must be an",
        ),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"a": DEEP}}]}, r"nested too deeply"),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": '{"a":' * 99_999}]}, r"nested too deeply"),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"a": 10**5000}}]}, r"more than 3,000 digits"),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": '{"a": ' + "1" * 5000 + "}"}]}, r"arguments is no JS"),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"a": b"x"}}]}, r"a value of type bytes"),
        # halves of surrogate pairs, wherever a template would print them
        ({**ASSISTANT, "reasoning": "x\ud800"}, r"'reasoning' holds half of a surrogate pair at character 1"),
        ({**ASSISTANT, "name": "\ud800"}, r"'name' holds half of a surrogate pair"),
        ({"role": "user", "content": [{"type": "text", "text": "\ud800"}]}, r"'text' holds half of a surrogate pair"),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"a": ["\ud800"]}}]}, r"half of a surrogate pair"),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"\ud800": 1}}]}, r"half of a surrogate pair"),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]}, r"half of a surrogate pair"),
    ],
)
def test_refused(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(turn)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("key 'messages', turn 1")


def test_keys_that_are_an_error_are_known() -> None:
    assert {"images", "train_detail", "weight", "thinking", "tool_calls", "from"} <= MESSAGE_KEYS


@pytest.mark.parametrize(
    "value",
    [
        [ADD],
        json.dumps([ADD]),
        [json.dumps(ADD)],
        # Arrow fills in the keys of other functions' parameters
        [
            {
                "type": "function",
                "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": None}}},
            }
        ],
    ],
)
def test_tools(value: Any) -> None:
    assert read_tools(value, "key 'tools'") == [ADD]


@pytest.mark.parametrize("value", [None, "", " ", "[]", "null", [], [{"function": None}]])
def test_no_tools(value: Any) -> None:
    assert read_tools(value, "key 'tools'") is None


def test_a_default_of_null_survives_in_a_string() -> None:
    assert read_tools('[{"name": "f", "default": null}]', "key 'tools'") == [{"name": "f"}]
    assert read_tools([{"name": "f", "default": None}], "key 'tools'") == [{"name": "f"}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("add", r"key 'tools' is no JSON"),
        ('{"name": "add"}', r"key 'tools' is of type dict, but must be a list of JSON schemas"),
        (3, r"key 'tools' is of type int"),
        ([3], r"function 1 is of type int, but must be an object"),
        (["add"], r"is no JSON"),
        ([{"name": "\ud800"}], r"half of a surrogate pair"),
        ("[" * 99_999, r"nested too deeply"),
    ],
)
def test_refused_tools(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tools(value, "key 'tools'")


LISTED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(LISTED),
        " " + json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], indent=2) + "\n",
        "\n\nHuman: q\n\nAssistant: a",
        "\n\nHuman: q\n\nAssistant:a\n",
    ],
)
def test_a_string_may_hold_a_conversation(text: str) -> None:
    assert read_messages(text, "prompt", "user") == LISTED


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[]",
        '[{"name": "x"}]',
        '[{"role": "user", "content": "q"}, 3]',
        '[{"role": "user", "content": "q"}] is how it is written.',
        "Human: is what they say",
        "As Human: I say\n\nAssistant: nothing",
        "[" * 99_999 + "]",
    ],
)
def test_other_strings_are_text(text: str) -> None:
    assert read_messages(text, "prompt", "user") == [{"role": "user", "content": text}]


def test_turns_of_a_string_must_alternate() -> None:
    with pytest.raises(ValueError, match=r"key 'chosen', turn 2 is of 'Human:', but must be of 'Assistant:'"):
        read_messages("\n\nHuman: q\n\nHuman: r\n\nAssistant: a", "chosen", "assistant")


def test_messages_as_python_prints_them() -> None:
    with pytest.raises(
        ValueError, match=r"key 'chosen' holds messages as Python prints them; store them as a list, or"
    ):
        read_messages(str(LISTED), "chosen", "assistant")
