"""Reading prompts: every key, strings as turns or as text, system turns, and what is rejected."""

import json

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
    with pytest.raises(ValueError, match=r"read from \.txt, \.jsonl and \.json"):
        turns(tmp_path, ["hi"], name="prompts.csv")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        read_prompts(tmp_path / "latin.txt", strings_are_turns=True)
