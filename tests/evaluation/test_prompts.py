"""Reading prompts: every key, strings as turns or as text, system turns, and what is rejected."""

import gzip
import json
import pickle

import pytest

from notus.evaluation.prompts import read_prompts

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}


def turns(tmp_path, rows, name="prompts.jsonl", **options):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return [prompt.turns for prompt in read_prompts(path, **{"strings_are_turns": True, **options})]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi"},
        {"instruction": "hi", "chosen_response": "x"},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"messages": [USER, ANSWER]},  # the answer is to be written anew
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": "x"},
    ],
)
def test_forms(tmp_path, row):
    assert turns(tmp_path, [row]) == [[USER]]


def test_strings_as_text_stay_whole_and_messages_messages(tmp_path):
    assert turns(tmp_path, [{"prompt": " hi"}, {"prompt": [USER]}], strings_are_turns=False) == [
        " hi",
        [USER],
    ]


def test_text_file_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n  two\n".encode())
    found = read_prompts(path, strings_are_turns=False)
    assert [(prompt.turns, prompt.row) for prompt in found] == [
        ("one", {"prompt": "one"}),
        ("  two", {"prompt": "  two"}),
    ]
    assert found[1].place == f"{path}, line 3"


def test_json_array(tmp_path):
    rows = json.dumps([{"instruction": "hi", "dataset": "d"}])
    assert turns(tmp_path, [rows], name="eval.json") == [[USER]]


def test_system_turn_where_there_is_none(tmp_path):
    rows = [{"prompt": "hi"}, {"messages": [{"role": "system", "content": ""}, USER]}]
    found = turns(tmp_path, rows, system="be brief")
    assert found == [[SYSTEM, USER], [{"role": "system", "content": ""}, USER]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hi"}, "line 2: holds no prompt; give an object with one of the keys prompt, messages"),
        (["hi"], "line 2: holds no prompt"),
        ({"prompt": 3}, "line 2: key 'prompt' is of type int"),
        (
            {"messages": [{"role": "wizard", "content": "hi"}]},
            "line 2: key 'messages', turn 1 has the unknown role",
        ),
        ({"messages": [ANSWER]}, "line 2: key 'messages' holds an answer alone"),
        ({"messages": []}, "line 2: key 'messages' holds no turn"),
        (
            {"prompt": "hi", "completion": "x"},
            "line 2: has a key 'completion', which the result would replace",
        ),
        ("{", "line 2: not valid JSON"),
    ],
)
def test_rejects_rows(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"prompts\.jsonl, ") as caught:
        turns(tmp_path, [{"prompt": "hi"}, row])
    assert message in str(caught.value)


def test_rejects_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl", strings_are_turns=True)
    with pytest.raises(ValueError, match="holds no prompts"):
        turns(tmp_path, ["", ""], name="empty.txt")
    with pytest.raises(ValueError, match=r"read from \.txt, \.jsonl"):
        turns(tmp_path, ["hi"], name="prompts.xlsx")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        read_prompts(tmp_path / "latin.txt", strings_are_turns=True)


def test_tables_and_packed_files(tmp_path):
    (tmp_path / "prompts.csv").write_text('id,prompt\n7,"a, ""b""\nc"\n')
    (prompt,) = read_prompts(tmp_path / "prompts.csv", strings_are_turns=True)
    assert prompt.turns == [{"role": "user", "content": 'a, "b"\nc'}]
    assert prompt.row == {"id": "7", "prompt": 'a, "b"\nc'}
    (tmp_path / "prompts.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n'))
    (prompt,) = read_prompts(tmp_path / "prompts.jsonl.gz", strings_are_turns=False)
    assert prompt.turns == "x"
    assert prompt.place == f"{tmp_path / 'prompts.jsonl.gz'}, line 1"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "hi", "system": "be brief"}, [SYSTEM, USER]),
        ({"instruction": "hi", "input": "there"}, [{"role": "user", "content": "hi\nthere"}]),
        ({"instruction": "hi", "history": [["hi", "hello"]]}, [USER, ANSWER, USER]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, [USER]),
        ({"prompt": json.dumps([SYSTEM, USER])}, [SYSTEM, USER]),
        ({"prompt": "\n\nHuman: hi\n\nAssistant:"}, [USER]),
    ],
)
@pytest.mark.parametrize("strings_are_turns", [True, False])
def test_a_prompt_is_read_as_a_row_of_data(tmp_path, row, wanted, strings_are_turns):
    assert turns(tmp_path, [row], strings_are_turns=strings_are_turns) == [wanted]


def test_tools_and_template_arguments_come_with_a_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": [USER], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}))
    (prompt,) = read_prompts(path, strings_are_turns=True)
    assert (prompt.turns, prompt.tools, prompt.template_kwargs) == ([USER], [TOOL], {"enable_thinking": False})
    pickle.dumps(prompt)  # for the other ranks


def test_what_would_change_the_meaning_is_never_dropped(tmp_path):
    for row, message in (
        ({"prompt": "hi", "tools": [TOOL]}, "key 'tools' is for the chat template, but the row is plain text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "line 1: key 'messages'"),
    ):
        with pytest.raises(ValueError, match=message):
            turns(tmp_path, [row], strings_are_turns=False)
