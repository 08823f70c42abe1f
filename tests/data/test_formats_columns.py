"""Columns beside those of a form: what they change, and what is refused because it would be lost."""

import csv
import inspect
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from toys import toy_tokenizer
from transformers import PreTrainedTokenizerBase

from notus.data.chat import ChatEncoder
from notus.data.formats import (
    Record,
    guess_task,
    normalize,
    read_provenance,
    readings,
    unknown_columns,
    used_columns,
)
from notus.data.sources import open_source, read_rows


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TEXT = {"prompt": "q", "chosen": "good", "rejected": "bad"}
CHAT = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
WHOLE = {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}
TALK = {"messages": [user("q"), assistant("good")]}
ANSWERS = ([assistant("good")], [assistant("bad")])
PAIR = Record([user("q")], ANSWERS)


# --- Alpaca


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add."}, [user("Add.")]),
        ({"instruction": "Add.", "input": "1, 2"}, [user("Add.\n1, 2")]),
        ({"instruction": "Add.", "input": ""}, [user("Add.")]),
        ({"instruction": "", "input": "1, 2"}, [user("1, 2")]),
        ({"instruction": "Add.", "input": None, "history": None}, [user("Add.")]),
        ({"instruction": "Add.", "history": []}, [user("Add.")]),
        (
            {"instruction": "And?", "history": [["Hi", "Hello"], ("How?", "So.")], "input": "x", "system": "s"},
            [system("s"), user("Hi"), assistant("Hello"), user("How?"), assistant("So."), user("And?\nx")],
        ),
        ({"instruction": "And?", "history": '[["Hi", "Hello"]]'}, [user("Hi"), assistant("Hello"), user("And?")]),
    ],
)
def test_alpaca(row: dict[str, Any], prompt: list[Any]) -> None:
    assert normalize({**row, "output": "good"}, "sft") == Record(prompt, ANSWERS[:1])
    assert normalize({**row, "chosen": "good", "rejected": "bad"}, "dpo") == Record(prompt, ANSWERS)
    assert normalize({**row, "chosen_response": "good", "rejected_response": "bad"}, "dpo") == Record(prompt, ANSWERS)


@pytest.mark.parametrize("text", [json.dumps([user("p")]), "\n\nHuman: p\n\nAssistant: x", str([user("p")])])
def test_strings_of_alpaca_and_argilla_are_what_they_are(text: str) -> None:
    answers = ([assistant(text)], [assistant("b")])
    row = {"instruction": text, "chosen_response": text, "rejected_response": "b"}
    assert normalize(row, "dpo") == Record([user(text)], answers)
    assert normalize({"instruction": text, "output": text}, "sft") == Record([user(text)], answers[:1])
    whole = {"chosen": [user(text), assistant("good")], "rejected": [user(text), assistant("bad")]}
    assert normalize({"instruction": text, **whole}, "dpo") == Record([user(text)], ANSWERS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"instruction": ["Add."]}, r"key 'instruction' is of type list, but must be a string"),
        ({"input": 3}, r"key 'input' is of type int"),
        ({"history": 3}, r"key 'history' is of type int, but must be a list of \[user, assistant\]"),
        ({"history": "Hi"}, r"key 'history' is no JSON"),
        ({"history": [["Hi"]]}, r"key 'history', entry 1 is no pair"),
        ({"history": ["Hi"]}, r"key 'history', entry 1 is no pair"),
        ({"history": [["Hi", None]]}, r"key 'history', entry 1, assistant is null"),
        ({"output": "\ud800"}, r"key 'output' holds half of a surrogate pair"),
    ],
)
def test_refused_alpaca(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize({"instruction": "q", "output": "a", **changed}, "sft")


# --- system, tools, template arguments


@pytest.mark.parametrize("row", [TEXT, CHAT, WHOLE, {**CHAT, "prompt": "q"}])
def test_the_system_column_becomes_the_system_turn(row: dict[str, Any]) -> None:
    assert normalize({**row, "system": "s"}, "dpo") == Record([system("s"), user("q")], ANSWERS)
    assert normalize({**row, "system": ""}, "dpo") == PAIR


def test_strings_beside_an_empty_system_are_turns_as_in_the_rows_with_one() -> None:
    assert normalize({**TEXT, "system": ""}, "dpo") == PAIR
    assert normalize({**TEXT, "system": None}, "dpo") == Record("q", ("good", "bad"))
    assert normalize({"prompt": "q", "completion": "a", "system": "s"}, "sft") == Record(
        [system("s"), user("q")], ([assistant("a")],)
    )


def test_rows_of_a_csv_file(tmp_path: Path) -> None:
    """Empty fields of optional columns are absent; a system column makes every row of the file turns."""
    empty = {
        "input": "",
        "tools": "",
        "history": "",
        "chat_template_kwargs": "",
        "images": "",
        "weight": "",
        "label": "",
    }
    rows = [{**TEXT, **empty}, {**TEXT, **empty, "weight": "1.0", "chosen-rating": "4.5", "source": "flan"}]
    stored = _through_csv(tmp_path, rows)
    assert all(isinstance(value, str) for row in stored for value in row.values())
    assert [normalize(row, "dpo") for row in stored] == [Record("q", ("good", "bad"))] * 2
    assert [unknown_columns(row, "dpo") for row in stored] == [[], []]
    assert [read_provenance(row) for row in stored] == [(None, None, None), ("flan", 4.5, None)]
    stored = _through_csv(tmp_path, [{**TEXT, "system": "s"}, TEXT])
    assert [normalize(row, "dpo") for row in stored] == [Record([system("s"), user("q")], ANSWERS), PAIR]
    (alpaca,) = _through_csv(tmp_path, [{"instruction": "q", **empty, "output": "good", "system": ""}])
    assert normalize(alpaca, "sft") == Record([user("q")], ANSWERS[:1])
    stored = _through_csv(tmp_path, [TEXT, {"q": "r", "chosen": "good", "rejected": "bad"}])
    assert [normalize(row, "dpo", {"q": "prompt"}).prompt for row in stored] == ["q", "r"]
    with pytest.raises(ValueError, match="column 'weight'"):
        normalize({**TEXT, "weight": "0.5"}, "dpo")


def _through_csv(folder: Path, rows: list[dict[str, Any]]) -> list[Any]:
    path = folder / "rows.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    source = open_source(str(path))
    return [row for _, row in read_rows(source, source.rows[:], range(len(rows)))]


def test_a_system_turn_that_is_there_already() -> None:
    row = {"system": "s", "messages": [system("s"), user("q"), assistant("a")]}
    assert normalize(row, "sft") == Record([system("s"), user("q")], ([assistant("a")],))
    with pytest.raises(ValueError, match=r"key 'system' is 'other', but the conversation has the system turn 's'"):
        normalize({**row, "system": "other"}, "sft")
    with pytest.raises(ValueError, match=r"key 'system' is of type int"):
        normalize({**row, "system": 3}, "sft")


@pytest.mark.parametrize("tools", [[ADD], json.dumps([ADD]), [json.dumps(ADD)]])
def test_tools(tools: Any) -> None:
    assert normalize({**CHAT, "tools": tools}, "dpo") == PAIR._replace(tools=[ADD])


def test_tools_of_a_system_turn() -> None:
    talk = [{**system("s"), "tools": json.dumps([ADD])}, user("q"), assistant("good")]
    expected = Record([system("s"), user("q")], ANSWERS[:1], [ADD])
    assert normalize({"messages": talk}, "sft") == expected
    assert normalize({"messages": talk, "tools": [ADD]}, "sft") == expected
    with pytest.raises(ValueError, match=r"tools twice, .* they differ"):
        normalize({"messages": talk, "tools": [{"name": "other"}]}, "sft")


@pytest.mark.parametrize("value", [{"enable_thinking": False, "x": None}, '{"enable_thinking": false}'])
def test_template_arguments(value: Any) -> None:
    record = normalize({**TALK, "chat_template_kwargs": value}, "sft")
    assert record.template_kwargs == {"enable_thinking": False}


def test_an_empty_string_is_an_argument() -> None:
    record = normalize(
        {**TALK, "chat_template_kwargs": {"custom_instructions": "", "tools_in_user_message": None}}, "sft"
    )
    assert record.template_kwargs == {"custom_instructions": ""}


def test_no_row_sets_what_the_call_sets() -> None:
    known = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    known -= {"self", "kwargs", "documents"}
    for name in [*known, *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES]:
        with pytest.raises(ValueError, match=f"sets '{name}', which is not for a row to set"):
            normalize({**TALK, "chat_template_kwargs": {name: "x"}}, "sft")


def test_documents_are_for_the_template_to_read() -> None:
    template = (
        "{% for text in documents %}[{{ text.title }}]{% endfor %}"
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = {**TALK, "chat_template_kwargs": {"documents": [{"title": "d"}]}}
    record = normalize(row, "sft")
    assert record.template_kwargs == {"documents": [{"title": "d"}]}
    encoder = ChatEncoder(toy_tokenizer(chat_template=template))
    rendered = encoder.render(record.prompt, record.completions[0], template_kwargs=record.template_kwargs)
    assert rendered.text == "[d]user: q</s>assistant: good</s>"


@pytest.mark.parametrize("value", [None, "", " ", {}, "{}", "null", {"x": None}])
def test_no_template_arguments(value: Any) -> None:
    assert normalize({**TEXT, "chat_template_kwargs": value}, "dpo").template_kwargs == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chat_template_kwargs": "enable_thinking"}, r"key 'chat_template_kwargs' is no JSON"),
        ({"chat_template_kwargs": [1]}, r"key 'chat_template_kwargs' is of type list, but must be an object"),
        # a file must not bring code that is run
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, r"sets 'chat_template', which is not for a row"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"sets 'tokenize'"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, r"sets 'eos_token'"),
        ({"chat_template_kwargs": {"x": "\ud800"}}, r"half of a surrogate pair"),
        ({"tools": {"name": "add"}}, r"key 'tools' is of type dict, but must be a list"),
    ],
)
def test_refused_template_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize({**CHAT, **changed}, "dpo")


@pytest.mark.parametrize("changed", [{"tools": [ADD]}, {"chat_template_kwargs": {"x": 1}}])
def test_plain_text_has_no_template(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is for the chat template, but the row is plain text; give messages"):
        normalize({**TEXT, **changed}, "dpo")


# --- which turns are learned


def test_marks_stay_where_they_count() -> None:
    talk = [user("q"), {**assistant("a"), "weight": 0}, user("r"), {**assistant("b"), "weight": 1}]
    record = normalize({"messages": talk}, "sft")
    assert record == Record([user("q")], ([{**assistant("a"), "learn": False}, user("r"), assistant("b")],))


def test_shared_turns_do_not_depend_on_the_marks() -> None:
    chosen = [user("q"), {**assistant("a"), "weight": 0}, user("r"), assistant("good")]
    rejected = [user("q"), assistant("a"), user("r"), assistant("bad")]
    expected = Record([user("q"), assistant("a"), user("r")], ANSWERS)
    assert normalize({"chosen": chosen, "rejected": rejected}, "dpo") == expected
    assert normalize({"prompt": chosen[:3], "chosen": chosen, "rejected": rejected}, "dpo") == expected


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [user("q"), {**assistant("a"), "weight": 0}]}, "messages"),
        ({"prompt": "q", "completion": [{**assistant("a"), "train": False}]}, "completion"),
        ({**CHAT, "chosen": [{**assistant("a"), "weight": 0}]}, "chosen"),
    ],
)
def test_nothing_to_learn_is_an_error(row: dict[str, Any], column: str) -> None:
    with pytest.raises(ValueError, match=f"key '{column}' has no assistant turn to learn"):
        normalize(row, "sft")


def test_the_side_that_has_nothing_to_learn_is_named() -> None:
    with pytest.raises(ValueError, match="key 'rejected' has no assistant turn to learn"):
        normalize({**CHAT, "rejected": [{**assistant("a"), "weight": 0}]}, "dpo")


def test_a_completion_may_begin_with_what_a_function_returned() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = {"prompt": [user("q"), call], "completion": [{"role": "tool", "content": "3"}, assistant("3.")]}
    assert normalize(row, "sft") == Record([user("q"), call], ([{"role": "tool", "content": "3"}, assistant("3.")],))


# --- what cannot be learned


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": True}, r"column 'label'.*as with dpo.loss_type=kto.*data.columns: \{label: unused"),
        ({"label": False}, r"column 'label'"),
        ({"label": 0}, r"column 'label'"),
        ({"kto_tag": True}, r"column 'kto_tag'.*dpo.loss_type=kto"),
        ({"images": ["a.png"]}, r"column 'images'.*only text can be learned"),
        ({"image": {"bytes": b"x", "path": None}}, r"column 'image'"),
        ({"videos": "a.mp4"}, r"column 'videos'"),
        ({"audios": [{"path": "a.wav"}]}, r"column 'audios'"),
        ({"functions": [ADD]}, r"column 'functions'.*give these in a column 'tools'"),
        ({"weight": 0.5}, r"column 'weight'.*weigh whole files"),
    ],
)
def test_unsupported_columns(changed: dict[str, Any], message: str) -> None:
    for row, task in (({"prompt": "q", "completion": "a"}, "sft"), (TEXT, "dpo"), (TALK, "sft")):
        with pytest.raises(ValueError, match=message):
            normalize({**row, **changed}, task)  # type: ignore[arg-type]
    (column,) = changed
    assert normalize({**TEXT, **changed}, "dpo", {column: "unused"}) == Record("q", ("good", "bad"))


@pytest.mark.parametrize(
    "changed",
    [
        {"images": []},
        {"images": None},
        {"images": [None]},
        {"image": {"bytes": None, "path": None}},
        {"audios": ""},
        {"label": None},
        {"weight": 1.0},
        {"weight": True},
        {"weight": "1"},
    ],
)
def test_columns_that_say_nothing(changed: dict[str, Any]) -> None:
    assert normalize({**CHAT, **changed}, "dpo") == PAIR


def test_unpaired_rows_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no known dpo form.*dpo.loss_type=kto; for others pair"):
        normalize({"prompt": "q", "completion": "a", "label": True}, "dpo")


# --- columns that must agree


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({**WHOLE, "prompt": "q"}, "dpo"),
        ({**WHOLE, "prompt": " q\n"}, "dpo"),
        # HuggingFaceH4/ultrafeedback_binarized
        ({**WHOLE, "prompt": "q", "messages": WHOLE["chosen"]}, "dpo"),
        ({**WHOLE, "prompt": "q", "messages": WHOLE["chosen"]}, "sft"),
        ({**WHOLE, "messages": WHOLE["chosen"]}, "dpo"),
        ({**WHOLE, "messages": [user("q")]}, "dpo"),
        ({**CHAT, "instruction": "q"}, "dpo"),
        ({**CHAT, "output": "good", "input": ""}, "dpo"),
        ({**CHAT, "completion": [assistant("good")]}, "dpo"),
        ({**TALK, "prompt": "q"}, "sft"),
        ({**TALK, "prompt": "q", "chosen": "good", "rejected": "bad"}, "sft"),
        ({"messages": [user("q")], "chosen": "good", "rejected": "bad"}, "dpo"),
        ({"messages": [user("q")], "chosen": "good", "rejected": "bad"}, "sft"),
    ],
)
def test_copies_agree(row: dict[str, Any], task: Any) -> None:
    assert normalize(row, task) == (PAIR if task == "dpo" else Record(PAIR.prompt, ANSWERS[:1]))


def test_the_prompt_may_be_any_question_of_the_shared_turns() -> None:
    start = [system("s"), user("q"), assistant("a"), user("r")]
    row = {"chosen": [*start, assistant("good")], "rejected": [*start, assistant("bad")]}
    for prompt in ("q", "r", "s", ""):
        assert normalize({**row, "prompt": prompt}, "dpo") == Record(start, ANSWERS)
    for prompt in ("a", "other"):
        with pytest.raises(
            ValueError, match=r"key 'prompt' is '.*', but no turn that the conversations of key 'chosen'"
        ):
            normalize({**row, "prompt": prompt}, "dpo")


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({**WHOLE, "prompt": "other"}, "dpo", r"key 'prompt' is 'other', but no turn .* 'chosen' share says so"),
        (
            {**CHAT, "prompt": [user("q"), assistant("good")]},
            "dpo",
            r"'prompt' ends with an assistant turn, and key 'ch",
        ),
        ({"conversations": WHOLE["chosen"], "chosen": "a", "rejected": "b"}, "dpo", r"ends with an assistant turn"),
        ({**WHOLE, "prompt": [user("other")]}, "dpo", r"'chosen' begins with a user turn, but not with the prompt's"),
        ({**TALK, "prompt": "other"}, "sft", r"read by messages, but its key 'prompt' says something else"),
        ({**TALK, "chosen": "other", "rejected": "bad"}, "sft", r"key 'chosen' says something else"),
        ({**WHOLE, "instruction": "q", "history": [["a", "b"]]}, "dpo", r"not with the prompt's turns"),
        ({**WHOLE, "instruction": "q", "input": "x"}, "dpo", r"key 'instruction' is 'q.nx', but no turn"),
        ({**TALK, "history": [["a", "b"]]}, "sft", r"key 'history' says something else"),
        ({**TALK, "input": "more"}, "sft", r"key 'input' says something else.*data.columns: \{input: unused\}"),
        ({**TALK, "output": 3}, "sft", r"key 'output' says something else"),
        ({**TEXT, "input": "more"}, "dpo", r"key 'input' says something else"),
        ({**TEXT, "messages": [user("q"), assistant("x")]}, "dpo", r"key 'messages' says something else"),
        ({**WHOLE, "messages": [user("q"), assistant("x")]}, "dpo", r"'chosen' begins with a user turn"),
        ({**WHOLE, "prompt": "q", "messages": [system("s"), *WHOLE["chosen"]]}, "dpo", r"key 'messages' says"),
        ({"conversations": [user("q")], **TEXT, "prompt": "p"}, "dpo", r"key 'prompt' says something else"),
        ({"instruction": "q", "chosen_response": "a", "rejected_response": "b", "chosen": "c"}, "dpo", r"key 'chosen'"),
    ],
)
def test_contradictions(row: dict[str, Any], task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize(row, task)


# --- strings

QUESTION = "What is the capital of France?"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # both repeat a prompt that is too long for chance
        (
            {"prompt": QUESTION, "chosen": f"{QUESTION} Paris.", "rejected": f"{QUESTION} Lyon."},
            Record(QUESTION, (" Paris.", " Lyon.")),
        ),
        # one alone quotes it
        (
            {"prompt": QUESTION, "chosen": "Paris.", "rejected": f"{QUESTION} Lyon."},
            Record(QUESTION, ("Paris.", f"{QUESTION} Lyon.")),
        ),
        # two greetings
        ({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi!"}, Record("Hi", ("Hi there", "Hi!"))),
        # without a prompt: TRL's example, and one where a word would be split
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, Record("The sky is", (" blue.", " green."))),
        ({"chosen": "It is Paris.", "rejected": "It is Parma."}, Record("It is", (" Paris.", " Parma."))),
        ({"chosen": "It is late", "rejected": "It is later"}, Record("It is", (" late", " later"))),
        ({"chosen": "Q: x\nA:\nyes", "rejected": "Q: x\nA:\nno"}, Record("Q: x\nA:\n", ("yes", "no"))),
        ({"chosen": "天空是蓝色", "rejected": "天空是绿色"}, Record("天空是", ("蓝色", "绿色"))),
        ({"chosen": "Same.", "rejected": "Same."}, Record("", ("Same.", "Same."))),
        ({"chosen": "One. Two.", "rejected": "One."}, Record("One.", (" Two.", ""))),
        # the JSON of messages
        ({key: json.dumps(value) for key, value in WHOLE.items()}, PAIR),
        ({key: json.dumps(value) for key, value in CHAT.items()}, PAIR),
        ({**TEXT, "prompt": json.dumps([user("q")])}, PAIR),
    ],
)
def test_strings(row: dict[str, Any], expected: Record) -> None:
    assert normalize(row, "dpo") == expected


REPEATED = {"chosen": f"{QUESTION} Paris.", "rejected": f"{QUESTION}\nLyon."}
CITIES = ([assistant("Paris.")], [assistant("Lyon.")])


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({**REPEATED, "prompt": QUESTION, "system": ""}, [user(QUESTION)]),
        ({**REPEATED, "prompt": QUESTION, "system": "s"}, [system("s"), user(QUESTION)]),
        ({**REPEATED, "instruction": QUESTION}, [user(QUESTION)]),
        (
            {"instruction": QUESTION, "chosen_response": REPEATED["chosen"], "rejected_response": f"{QUESTION}Lyon."},
            [user(QUESTION)],
        ),
        # the user's turn is instruction, newline, input
        ({**REPEATED, "instruction": "What is the capital", "input": "of France?"}, None),
        (
            {
                "instruction": "What is the capital",
                "input": "of France?",
                "chosen": "What is the capital\nof France?\n\nParis.",
                "rejected": "What is the capital\nof France? Lyon.",
            },
            [user("What is the capital\nof France?")],
        ),
        (
            {**REPEATED, "messages": [user("q"), assistant("a"), user(QUESTION)]},
            [user("q"), assistant("a"), user(QUESTION)],
        ),
        ({**REPEATED, "prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:"}, [user(QUESTION)]),
        # one alone quotes it; 19 characters may be chance; messages say what each turn is
        ({**REPEATED, "rejected": "Lyon.", "instruction": QUESTION}, None),
        ({"instruction": "x" * 19, "chosen": "x" * 19 + "a", "rejected": "x" * 19 + "b"}, None),
        ({"instruction": "x" * 20, "chosen": "x" * 20 + "Paris.", "rejected": "x" * 20 + "Lyon."}, [user("x" * 20)]),
        ({"prompt": [user(QUESTION)], **{key: [assistant(text)] for key, text in REPEATED.items()}}, None),
    ],
)
def test_strings_that_are_turns_do_not_repeat_the_prompt_either(row: dict[str, Any], prompt: Any) -> None:
    record = normalize(row, "dpo")
    assert normalize(row, "sft") == record._replace(completions=record.completions[:1])
    if prompt is not None:
        assert record == Record(prompt, CITIES)
        return
    given = [row["chosen"], row["rejected"]]
    said = [value if isinstance(value, str) else value[0]["content"] for value in given]
    assert [turns[0]["content"] for turns in record.completions] == said  # type: ignore[index]


@pytest.mark.parametrize("changed", [{}, {"system": ""}])
def test_the_answer_of_a_demonstration_may_begin_with_its_prompt(changed: dict[str, Any]) -> None:
    answer = REPEATED["chosen"]
    (text,) = normalize({"prompt": QUESTION, "completion": answer, **changed}, "sft").completions
    assert text in (answer, [assistant(answer)])
    assert normalize({"instruction": QUESTION, "output": answer}, "sft").completions == ([assistant(answer)],)


def test_messages_as_json() -> None:
    assert normalize({"messages": json.dumps(TALK["messages"])}, "sft") == Record([user("q")], ANSWERS[:1])
    with pytest.raises(ValueError, match="key 'messages' is a string, but must be a list of messages"):
        normalize({"messages": "q"}, "sft")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, r"strings that do not begin alike, so there is no prompt; add a key 'prompt'"),
        ({"question": "q"}, r"strings without a prompt, but there is a column 'question'.*\{question: prompt\}"),
        ({"system": "s"}, r"strings without a prompt, but there is a column 'system'"),
        ({"system": 3}, r"strings without a prompt, but there is a column 'system'"),
        ({"system": "", "context": "c", "input": "q"}, r"there is a column 'input'.*\{input: prompt\}"),
        ({"text": "t", "query": "q"}, r"there is a column 'query'.*\{query: prompt\}"),
    ],
)
def test_refused_strings_without_a_prompt(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize({"chosen": "Yes, sir", "rejected": "No, sir", **changed}, "dpo")


@pytest.mark.parametrize("text", ["s", ""])
def test_a_system_text_is_never_taken_for_the_prompt(text: str) -> None:
    orca = {"system": text, "question": "q", "chosen": "good", "rejected": "bad"}  # Intel/orca_dpo_pairs
    with pytest.raises(ValueError, match=r"there is a column 'question'.*\{question: prompt\}"):
        normalize(orca, "dpo")
    expected = [system("s"), user("q")] if text else [user("q")]
    assert normalize(orca, "dpo", {"question": "prompt"}) == Record(expected, ANSWERS)
    assert normalize(orca, "sft", {"question": "prompt"}) == Record(expected, ANSWERS[:1])
    del orca["question"]
    with pytest.raises(ValueError, match=r"column 'system'") as error:
        normalize(orca, "dpo")
    assert "system: prompt" not in str(error.value)


def test_equal_strings_have_no_prompt_to_leave_out_of_sft() -> None:
    same = "Q: a?\nA: b"
    row = {"chosen": same, "rejected": same}
    assert normalize(row, "dpo") == Record("", (same, same))  # dropped as identical
    with pytest.raises(ValueError, match=r"'chosen' and 'rejected' are the same string.*add a key 'prompt'"):
        normalize(row, "sft")
    # "Q: a?\nA:" is what both share, in whole words
    assert normalize({**row, "rejected": "Q: a?\nA: c"}, "sft") == Record("Q: a?\nA:", (" b",))
    assert normalize({**row, "prompt": "Q: a?\nA:", "chosen": " b", "rejected": " b"}, "sft") == Record(
        "Q: a?\nA:", (" b",)
    )


HUMAN = "\n\nHuman: q\n\nAssistant:"
LONGER = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Anthropic's hh-rlhf
        ({"chosen": HUMAN + " good", "rejected": HUMAN + " bad"}, PAIR),
        (
            {"chosen": LONGER + " good", "rejected": LONGER + " bad"},
            Record([user("q"), assistant("a"), user("r")], ANSWERS),
        ),
        # with the prompt apart, and with the prompt repeated
        ({"prompt": HUMAN, "chosen": " good", "rejected": " bad"}, PAIR),
        ({"prompt": HUMAN, "chosen": HUMAN + " good", "rejected": HUMAN + " bad"}, PAIR),
        ({"prompt": HUMAN, "chosen": HUMAN + " good", "rejected": "bad"}, PAIR),
        ({"prompt": "\n\nHuman: q", "chosen": "\n\nAssistant: good", "rejected": "\n\nAssistant: bad"}, PAIR),
        ({"prompt": "\n\nHuman: q", "chosen": "good", "rejected": "bad"}, PAIR),
        ({"prompt": HUMAN, "chosen": [assistant("good")], "rejected": [assistant("bad")]}, PAIR),
        ({"prompt": "q", "chosen": HUMAN + " good", "rejected": HUMAN + " bad"}, PAIR),
        (
            {"prompt": HUMAN, "chosen": " a\n\nHuman: r\n\nAssistant: good", "rejected": "bad"},
            Record([user("q")], ([assistant("a"), user("r"), assistant("good")], [assistant("bad")])),
        ),
    ],
)
def test_conversations_of_human_and_assistant(row: dict[str, Any], expected: Record) -> None:
    assert normalize(row, "dpo") == expected


def test_demonstrations_of_human_and_assistant() -> None:
    expected = Record([user("q")], ([assistant("good")],))
    assert normalize({"prompt": HUMAN, "completion": " good"}, "sft") == expected
    assert normalize({"messages": HUMAN + " good"}, "sft") == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": HUMAN + " Well,", "chosen": " yes", "rejected": " no"}, r"'prompt' ends within an answer"),
        ({"prompt": HUMAN, "chosen": "a\n\nAssistant: b", "rejected": "c"}, r"key 'chosen', turn 2 is of 'Assistant:'"),
        ({"prompt": HUMAN, "chosen": LONGER.replace("q", "p"), "rejected": "c"}, r"not with the prompt's turns"),
        ({"prompt": "p", "chosen": HUMAN + " a", "rejected": HUMAN + " b"}, r"key 'prompt' is 'p', but no turn"),
        ({"chosen": HUMAN + " a", "rejected": "b"}, r"key 'rejected' is a string, so there is no prompt"),
    ],
)
def test_refused_conversations_of_human_and_assistant(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize(row, "dpo")


# --- names


def test_columns_are_renamed() -> None:
    row = {"sys": "s", "question": "q", "yes": "good", "no": "bad", "score": 3, "y": 5.0}
    columns = {"sys": "system", "question": "prompt", "yes": "chosen", "no": "rejected", "y": "chosen-rating"}
    assert normalize(row, "dpo", columns) == Record([system("s"), user("q")], ANSWERS)
    assert read_provenance(row, columns) == (None, 5.0, None)
    assert unknown_columns(row, "dpo", columns) == ["score"]
    assert guess_task(row, columns) == "dpo"


def test_columns_may_swap_their_names() -> None:
    row = {"prompt": "q", "chosen": "bad", "rejected": "good"}
    assert normalize(row, "dpo", {"chosen": "rejected", "rejected": "chosen"}) == Record("q", ("good", "bad"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"other": "prompt"}, r"columns 'prompt' and 'other' are both read as 'prompt' .*but differ"),
        ({"other": "promt"}, r"data.columns maps 'other' to 'promt', .*did you mean 'prompt'\?"),
        ({"other": "zzzz"}, r"data.columns maps 'other' to 'zzzz', which is no column that is read; see"),
        ({"other": "system", "more": "system"}, r"columns 'other' and 'more' are both read as 'system' .*but differ"),
        ({"absent": "promt"}, r"data.columns maps 'absent' to 'promt'"),
    ],
)
def test_refused_names(columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize({**TEXT, "other": "x", "more": "y"}, "dpo", columns)


SOURCES = {"q": "prompt", "question": "prompt", "sys": "system", "yes": "chosen", "score": "chosen-rating"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # each source of a mixture has its own name of the prompt, or ours
        ({"q": "x", "chosen": "a", "rejected": "b"}, Record("x", ("a", "b"))),
        ({"question": "x", "yes": "a", "rejected": "b"}, Record("x", ("a", "b"))),
        ({"prompt": "x", "yes": "a", "rejected": "b"}, Record("x", ("a", "b"))),
        # both names: the same, or one of them null
        ({"prompt": "x", "q": "x", "chosen": "a", "rejected": "b"}, Record("x", ("a", "b"))),
        ({"prompt": None, "q": "x", "chosen": "a", "rejected": "b"}, Record("x", ("a", "b"))),
        ({"prompt": "x", "q": None, "question": None, "chosen": "a", "rejected": "b"}, Record("x", ("a", "b"))),
        # conversations hold their prompt
        (WHOLE, PAIR),
        ({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, PAIR),
        ({**WHOLE, "sys": "s"}, Record([system("s"), user("q")], ANSWERS)),
    ],
)
def test_rows_without_a_mapped_column(row: dict[str, Any], expected: Record) -> None:
    assert normalize(row, "dpo", SOURCES) == expected
    assert unknown_columns(row, "dpo", SOURCES) == []
    assert guess_task(row, SOURCES) == "dpo"
    pruned = {name: row[name] for name in used_columns(list(row), "dpo", SOURCES)}
    assert normalize(pruned, "dpo", SOURCES) == expected


def test_ratings_under_either_name() -> None:
    columns = {"score": "chosen-rating"}
    assert read_provenance({"score": 4}, columns) == (None, 4.0, None)
    assert read_provenance({"chosen-rating": 3}, columns) == (None, 3.0, None)
    assert read_provenance({"score": 4, "chosen-rating": None}, columns) == (None, 4.0, None)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": "x"}, {"qestion": "prompt"}, r"columns text are of no known dpo form .* data.columns.*lacks qestion"),
        ({"prompt": "x", "no": "b"}, {"nein": "rejected", "ja": "chosen"}, r"no known dpo form .*lacks nein, ja;"),
        # the answers begin alike, but that is no prompt where one was named
        (
            {"frage": "x", "chosen": "The sky is blue.", "rejected": "The sky is green."},
            {"farge": "prompt"},
            r"maps 'farge' to 'prompt', but the row has neither",
        ),
    ],
)
def test_rows_that_need_a_column_that_they_lack(row: dict[str, Any], columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize(row, "dpo", columns)


THREE = ("a", "b", "c")


@pytest.mark.parametrize(
    "table",
    [
        {name: {str(at): text for at, text in enumerate(THREE)} for name in ("prompt", "chosen", "rejected")},
        {name: {str(at): [{"role": "user", "content": text}] for at, text in enumerate(THREE)} for name in ("x", "y")},
        {name: list(THREE) for name in ("prompt", "chosen", "rejected")},
        {"question": list(THREE), "chosen": list(THREE), "rejected": list(THREE), "score": [1, None, 3]},
        {"chosen": [[{"role": "user", "content": text}] for text in THREE], "rejected": [[]] * 3, "n": [1, 2, 3]},
    ],
)
def test_a_table_in_place_of_a_row(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"column-wise JSON, .* orient='records', lines=True"):
        readings(table, "dpo", {"question": "prompt"})


@pytest.mark.parametrize(
    ("row", "message"),
    [  # lists of as many messages, single messages, lists of two lengths
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "x", "content": "b"}]}, "unknown role"),
        ({"prompt": {"role": "x"}, "chosen": {"role": "x"}, "rejected": {"role": "x"}}, "has the keys role"),
        ({"prompt": ["a", "b"], "chosen": ["a"], "rejected": ["b"]}, "turn 1 is of type str"),
    ],
)
def test_a_faulty_row_is_no_table(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        readings(row, "dpo")


@pytest.mark.parametrize(
    "row",
    [
        {str(at): "x" for at in range(60_000)},
        {"prompt": {str(at): 1 for at in range(5, 60_000)}, "chosen": "a", "rejected": "b"},
    ],
)
def test_many_keys_are_cut_in_errors(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\.\.\. \((60,000|59,995) in all\)") as caught:
        readings(row, "dpo")
    assert len(str(caught.value)) < 1000


def test_a_mistyped_name_of_an_optional_column_leaves_it_unknown() -> None:
    row = {**TEXT, "sys": "s"}
    assert normalize(row, "dpo", {"syst": "system"}) == Record("q", ("good", "bad"))
    assert unknown_columns(row, "dpo", {"syst": "system"}) == ["sys"]


def test_several_columns_may_be_left_out() -> None:
    row = {**TEXT, "label": 1, "images": ["x"]}
    columns = {"label": "unused", "images": "unused"}
    assert normalize(row, "dpo", columns) == Record("q", ("good", "bad"))
    assert unknown_columns(row, "dpo", columns) == []
    pruned = {name: row[name] for name in used_columns(list(row), "dpo", columns)}
    assert normalize(pruned, "dpo", columns) == Record("q", ("good", "bad"))


def test_unknown_columns_and_keys_of_messages() -> None:
    turns = [{**user("q"), "id": 3, "seen": None}, {**assistant("good"), "model": "m", "weight": 1}]
    row = {"talk": turns, "source": "s", "score_chosen": 3, "chosen-model": "m", "nothing": None, "prompt": "q"}
    columns = {"talk": "messages"}
    assert unknown_columns(row, "sft", columns) == ["chosen-model", "talk[].id", "talk[].model"]
    assert unknown_columns({"messages": json.dumps(turns)}, "sft") == ["messages[].id", "messages[].model"]
    row = {"conversations": "q", "chosen": {**assistant("a"), "model": "m"}, "rejected": "b"}
    assert unknown_columns(row, "dpo") == ["chosen[].model"]


def test_used_columns() -> None:
    names = ["id", "question", "picture", "chosen", "rejected", "images", "source", "text", "chosen-rating", "tools"]
    columns = {"question": "prompt", "images": "unused"}
    assert used_columns(names, "dpo", columns) == ["question", "chosen", "rejected", "source", "chosen-rating", "tools"]
    # what may hold the prompt is read where there is none, for the error
    assert used_columns(["id", "question", "chosen", "rejected"], "dpo") == ["question", "chosen", "rejected"]
    # so are all columns of no known form
    assert used_columns(["id", "text"], "sft") == ["id", "text"]


def test_used_columns_are_enough() -> None:
    row = {**WHOLE, "prompt": "q", "messages": WHOLE["chosen"], "id": 1, "tools": [ADD], "source": "s"}
    pruned = {name: row[name] for name in used_columns(list(row), "dpo")}
    assert "id" not in pruned
    assert normalize(pruned, "dpo") == normalize(row, "dpo") == PAIR._replace(tools=[ADD])


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (TEXT, "dpo"),
        (WHOLE, "dpo"),
        ({**WHOLE, **TALK}, "dpo"),
        (TALK, "sft"),
        ({"instruction": "q", "output": "a"}, "sft"),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, "dpo"),
        ({"conversations": [user("q")], "chosen": None, "rejected": None}, "sft"),
    ],
)
def test_a_row_says_its_task(row: dict[str, Any], task: str) -> None:
    assert guess_task(row) == task


def test_a_row_of_no_form_has_no_task() -> None:
    with pytest.raises(ValueError, match="no known sft form"):
        guess_task({"text": "x"})
    with pytest.raises(ValueError, match="notus curate"):
        guess_task({"instruction": "q", "completions": []})


# --- Arrow


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


STORED: list[list[dict[str, Any]]] = [
    [
        TALK,
        {"messages": [user("q"), call("f", a=1), {"role": "tool", "content": "1", "name": "f"}, assistant("1")]},
        {"messages": [user("q"), call("g", b={"c": 2}), {"role": "tool", "content": "2"}, assistant("2")]},
        {"messages": [user("q"), call("h"), {"role": "tool", "content": "2"}, {**assistant("2"), "thinking": "t"}]},
        {"messages": [user("q"), {**assistant("a"), "weight": 0}, user("r"), assistant("b")]},
        {"messages": [user("q"), assistant("a")], "tools": [ADD, {"name": "f", "parameters": {"x": {"y": "z"}}}]},
        {"messages": [user("q"), assistant("a")], "chat_template_kwargs": {"x": 1}},
        {"messages": [user("q"), assistant("a")], "chat_template_kwargs": {"y": "z"}, "system": "s"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "x", "history": [["a", "b"]], "output": "a"},
    ],
    [TEXT, {"chosen": "The sky is blue.", "rejected": "The sky is green."}, {**TEXT, "system": "s"}],
    [CHAT, WHOLE, {**CHAT, "tools": [ADD]}],
    [
        {"messages": [user("q"), {**assistant("a"), "weight": 0}, {**assistant("b"), "weight": 1, "train": True}]},
        {"messages": [{**system("s"), "tools": [ADD]}, user("q"), {**assistant("a"), "function_call": None}]},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    ],
    [
        {"messages": [user([{"type": "text", "text": "q"}]), assistant([{"type": "text", "text": "a"}])]},
        {
            "messages": [
                user([]),
                assistant([{"type": "text", "text": "a"}, {"type": "text", "text": "b", "url": None}]),
            ]
        },
    ],
]


@pytest.mark.parametrize("rows", STORED)
def test_rows_that_arrow_stored_say_the_same(rows: list[dict[str, Any]]) -> None:
    task = guess_task(rows[0])
    names = sorted({name for row in rows for name in row})
    stored = datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    for row, read in zip(rows, stored, strict=True):
        assert normalize(read, task) == normalize(row, task)
        assert unknown_columns(read, task) == unknown_columns(row, task) == []
