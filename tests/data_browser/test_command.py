"""`notus data`: what it prints, as text and as JSON, and what it says to mistakes."""

import json
import shutil
import sys

import pytest
from rows_of_data import PAIR, write_config, write_rows
from toys import toy_tokenizer

from notus import __main__ as entry

ZEPHYR = "</s>\n<|assistant|>\n"


def show(capsys, *words):
    """The lines on stdout and stderr of a command that succeeds."""
    capsys.readouterr()
    assert entry.main(["data", *map(str, words)]) == 0
    found = capsys.readouterr()
    return found.out, found.err


def encode(text):
    return toy_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_pair_is_shown_as_the_model_sees_it(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder, [PAIR])
    out, _ = show(capsys, config)
    prompt, chosen, rejected = (len(encode(text)) for text in ("<s>The sea is", " blue.</s>", " red.</s>"))
    assert (
        f"--- prompt, {prompt} tokens\n<s>The sea is\n"
        f"--- chosen, {chosen} tokens, {chosen} learned\n⟦ blue.</s>⟧\n"
        f"--- rejected, {rejected} tokens, {rejected} learned\n⟦ red.</s>⟧\n"
    ) in out
    assert "rows: 1 read, 1 kept, 0 dropped" in out
    assert "train: 1 row, 0 repeat an earlier one, no other split" in out
    assert "plain text: 100.0%" in out
    assert "\x1b" not in out


def test_a_conversation_is_shown_with_its_template(tmp_path, model_folder, capsys):
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
    config = write_config(tmp_path, model_folder, [row], data__add_empty_system=True)
    out, _ = show(capsys, config)
    assert f"<s><|system|>\n</s>\n<|user|>\nHi{ZEPHYR}\n" in out
    assert "⟦Yes.</s>⟧" in out
    assert "(sft)" in out
    assert "chat template: zephyr (the tokenizer has none), sha256 " in out
    assert "  data.add_empty_system: true" in out
    assert "plain text: 0.0%" in out


def test_json_is_an_object_per_row_and_nothing_else(tmp_path, model_folder, capsys):
    rows = [{**PAIR, "source": "mine", "chosen-rating": 4.2, "rejected-rating": 4.5}, {**PAIR, "prompt": "It is"}]
    config = write_config(tmp_path, model_folder, rows)
    out, err = show(capsys, config, "--json")
    first, second = map(json.loads, out.splitlines())
    trunk, chosen, rejected = encode("<s>The sea is"), encode(" blue.</s>"), encode(" red.</s>")
    assert first["trunk"] == trunk
    assert first["branches"] == [
        {"ids": chosen, "mask": [1] * len(chosen), "text": " blue.</s>"},
        {"ids": rejected, "mask": [1] * len(rejected), "text": " red.</s>"},
    ]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["source"] == "mine"
    assert second["source"] is None
    assert first["ratings"] == [4.2, 4.5]  # not 4.199999809
    assert "reversed ratings" in first["flags"]
    assert first["cut"] == {"prompt": 0, "completions": [0, 0]}
    assert first["margin"] is None
    assert len({first["id"], second["id"]}) == 2
    assert all(len(row["id"]) == 16 and int(row["id"], 16) >= 0 for row in (first, second))
    assert "rows: 2 read" in err


def test_the_number_of_rows(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder, [{**PAIR, "prompt": f"Sea {number}"} for number in range(9)])
    for words, count in (([], 3), (["-n", "5"], 5), (["-n", "0"], 9), (["-n", "100"], 9)):
        assert len(show(capsys, config, "--json", *words)[0].splitlines()) == count


def test_options_may_stand_among_overrides(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder, [{**PAIR, "prompt": f"Sea {number}"} for number in range(9)])
    out, _ = show(capsys, config, "--data.eval_size=2", "--split", "eval", "--json", "--data.max_length=60", "-n", "0")
    assert len(out.splitlines()) == 2


def test_the_rows_decide_the_task_unless_the_user_does(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder, [PAIR])
    assert "--- rejected" in show(capsys, config)[0]
    out, _ = show(capsys, config, "--task", "sft")
    assert "--- completion" in out
    assert " red." not in out
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])
    assert "--- completion" in show(capsys, config)[0]


def test_ids_on_demand(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder, [PAIR])
    assert "ids:" not in show(capsys, config)[0]
    out, _ = show(capsys, config, "--ids")
    learned = " ".join(map(str, encode(" blue.</s>")))
    assert f"ids: {' '.join(map(str, encode('<s>The sea is')))}\n" in out
    assert f"ids: ⟦{learned}⟧\n" in out


def test_colour_on_a_terminal_unless_the_user_wants_none(tmp_path, model_folder, capsys, monkeypatch):
    config = write_config(tmp_path, model_folder, [PAIR])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out, _ = show(capsys, config)
    assert "\x1b[32m blue.\x1b[0m\x1b[32m\x1b[2m</s>\x1b[0m" in out
    assert "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    out, _ = show(capsys, config)
    assert "\x1b" not in out
    assert "⟦ blue.</s>⟧" in out


def test_a_row_cannot_write_to_the_terminal(tmp_path, model_folder, capsys):
    evil = "\x1b]0;x\x07\x1b[2J"
    row = {"prompt": evil, "chosen": f" {evil}a", "rejected": " b", "source": evil}
    out, err = show(capsys, write_config(tmp_path, model_folder, [row]))
    assert "\x1b" not in out + err
    assert "\\x1b]0;x\\x07\\x1b[2J" in out


def test_no_weights_are_needed(tmp_path, model_folder, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model").mkdir(exist_ok=True)
        shutil.copy(model_folder / name, tmp_path / "model")
    out, _ = show(capsys, write_config(tmp_path, tmp_path / "model", [PAIR]))
    assert "⟦ blue.</s>⟧" in out


def test_what_training_would_refuse_is_an_error_that_names_it(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder, [PAIR])
    (tmp_path / "notes.html").write_text("mine")
    cases = [
        (["--split", "eval"], "no evaluation rows: set data.eval or data.eval_size"),
        (["--data.train=none.jsonl"], "none.jsonl"),
        (["--data.trian=x"], "data.trian"),
        (["--model.name_or_path=./none"], "none"),
        (["--json", "--ids"], "--ids has no effect with --json"),
        (["--html", str(tmp_path / "a.html"), "--ids"], "--ids has no effect with --html"),
        (["--html", str(tmp_path / "a.html"), "--json"], "choose one"),
        (["--html", str(config)], "would replace the input"),
        (
            ["--html", str(tmp_path / "rows.jsonl")],
            "rows.jsonl: the result is HTML; choose a name",
        ),
        (["--html", str(tmp_path / "notes.html")], "no page of rows"),
        (["--run", str(tmp_path)], str(tmp_path)),
        (["--run", str(model_folder)], "no DPO run"),
        (["--task", "sft", "--run", str(model_folder)], "no margin"),
    ]
    for words, message in cases:
        capsys.readouterr()
        assert entry.main(["data", str(config), *words]) == 1, words
        found = capsys.readouterr()
        (line,) = [line for line in found.err.splitlines() if line.startswith("error: ")]
        assert message in line
        assert found.out == ""


def test_a_row_that_cannot_be_read_names_its_line(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder, [PAIR, {"prompt": "a", "chosen": 3, "rejected": "b"}])
    assert entry.main(["data", str(config)]) == 1
    assert "rows.jsonl, line 2" in capsys.readouterr().err
    write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])
    assert entry.main(["data", str(config)]) == 1
    message = capsys.readouterr().err
    assert "rows.jsonl, line 1" in message
    assert "question, answer are of no known dpo form" in message


def test_a_setting_that_sft_does_not_have_is_an_error(tmp_path, model_folder, capsys):
    config = write_config(tmp_path, model_folder, [{"prompt": "a", "completion": " b"}], dpo__beta=0.3)
    assert entry.main(["data", str(config)]) == 1
    assert "has a section `dpo`, which is of DPO" in capsys.readouterr().err


TURN = {"role": "user", "content": "Hi"}
SIDES = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "Yes."), ("rejected", "No."))}
FORMS = {
    "strings": {"prompt": "The sea is", "chosen": " Yes.", "rejected": " No."},
    "messages": {"prompt": [TURN], **SIDES},
    "whole conversations": {side: [TURN, *turns] for side, turns in SIDES.items()},
    "implicit prompt": {"chosen": "The sea is Yes.", "rejected": "The sea is No."},
    "argilla": {"instruction": "Hi", "chosen_response": "Yes.", "rejected_response": "No."},
    "cleaned": {"prompt": "Hi", **{side: [TURN, *turns] for side, turns in SIDES.items()}, "chosen-rating": 4},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}],
                 **{side: {"from": "gpt", "value": text} for side, text in (("chosen", "Yes."), ("rejected", "No."))}},
    "alpaca pair": {"instruction": "Hi", "input": "there", "chosen": "Yes.", "rejected": "No."},
    "human and assistant": {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.",
                            "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
    "json in strings": {side: json.dumps([TURN, *turns]) for side, turns in SIDES.items()},
    "sft messages": {"messages": [TURN, *SIDES["chosen"]]},
    "sft strings": {"prompt": "The sea is", "completion": " Yes."},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Yes.", "system": "Be kind.", "history": [["Hey", "Hello"]]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_docs_is_shown(tmp_path, model_folder, capsys, form):
    row, other = FORMS[form], json.loads(json.dumps(FORMS[form]).replace("No.", "Never."))
    out, _ = show(capsys, write_config(tmp_path, model_folder, [row, other]), "--json")
    shown = json.loads(out.splitlines()[0])
    learned = [
        toy_tokenizer().decode([token for token, on in zip(branch["ids"], branch["mask"], strict=True) if on])
        for branch in shown["branches"]
    ]
    answers = ["Yes.</s>"] if "sft" in form or form == "alpaca" else ["Yes.</s>", "No.</s>"]
    assert [text.strip() for text in learned] == answers
