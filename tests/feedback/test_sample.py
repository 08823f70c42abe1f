"""`notus sample` from local models: the records, resuming, names, and what is refused."""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from judges import Reply, serving
from toys import toy_model_folder, toy_tokenizer

from notus.__main__ import main
from notus.curation.ultrafeedback import parse_record
from notus.data.chat import ChatEncoder
from notus.data.tokenize import load_pairs
from notus.evaluation import decoding
from notus.evaluation.prompts import Prompt
from notus.feedback import local_sampling
from notus.feedback.records import kept_folder, summary_file
from notus.feedback.sampled_models import parse_models
from notus.model.export import load_causal_lm

ROWS = [
    {"prompt": "a long prompt about the sea and the dog", "id": 1},
    {"prompt": "dog", "source": "mine", "models": ["old"]},
    {"messages": [{"role": "user", "content": "héllo"}], "correct_answers": ["x"]},
]
TEXTS = ["a long prompt about the sea and the dog", "dog", "héllo"]
QUICK = ["--precision", "fp32", "--max-new-tokens", "6"]
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy_model_folder(tmp_path_factory.mktemp("models") / "chat", seed=1)
    toy_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model_folder(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words(prompts: Path, *options: object, out: str = "out.jsonl") -> list[str]:
    return [str(word) for word in ["sample", prompts, prompts.parent / out, *QUICK, "--models", *options]]


def read(prompts: Path, out: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prompts.parent / out).read_text().splitlines()]


def generated(folder: Path, prompts: list[Any], **options: Any) -> list[list[decoding.Completion]]:
    model, tokenizer = load_causal_lm(folder, dtype=torch.float32, device="cpu")
    given = [Prompt("here", turns) for turns in prompts]
    wanted = decoding.Decoding(max_new_tokens=6, **options)
    return decoding.generate_completions(model, ChatEncoder(tokenizer), given, wanted).completions


def test_records_of_a_chat_model_and_of_a_plain_one(
    prompts: Path, chat_model: Path, plain_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    drawn = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 7}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in drawn.items()]
    assert main(words(prompts, chat_model, f"raw={plain_model}", "--n", 2, "--batch-size", 4, *options)) == 0
    turns = [[{"role": "user", "content": text}] for text in TEXTS[:2]]
    ours = generated(chat_model, turns, samples=2, batch_size=4, **drawn)
    theirs = generated(plain_model, TEXTS[:2], samples=2, batch_size=4, **drawn | {"seed": 8})
    assert read(prompts) == [
        {
            "source": source,
            "instruction": text,
            **own,
            "models": ["chat", "raw"],
            "completions": [
                {
                    "model": name,
                    "response": found.text,
                    "settings": {"max_new_tokens": 6, **drawn, "seed": seed, "sample": number},
                    "finish_reason": found.finish_reason,
                    "tokens": found.tokens,
                }
                for name, seed, group in (("chat", 7, ours[place]), ("raw", 8, theirs[place]))
                for number, found in enumerate(group)
            ],
        }
        for place, (text, source, own) in enumerate(
            zip(TEXTS[:2], ["prompts.jsonl", "mine"], [{"id": 1}, {}], strict=True)
        )
    ]
    found = json.loads(summary_file(prompts.parent / "out.jsonl").read_text())
    everything = [each for group in ours for each in group]
    assert found["models"]["chat"] | {"tokens_per_second": None} == {
        "completions": 4,
        "empty": sum(not each.text.strip() for each in everything),
        "cut": sum(each.finish_reason == "length" for each in everything),
        "failed": 0,
        "tokens": sum(each.tokens for each in everything),
        "tokens_per_second": None,
        "requests": 0,
    }
    assert found["models"]["chat"]["tokens_per_second"] > 0
    assert (found["prompts"], found["completions"], found["dropped_duplicates"]) == (2, 8, 0)
    for record in read(prompts):
        parse_record(record)
    assert "wrote 8 completions of 2 prompts" in capsys.readouterr().out


def test_rated_records_become_pairs_and_models_leave_one_after_the_other(
    prompts: Path, chat_model: Path, plain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = local_sampling.ModelSource.load

    def watched(source: Any, *arguments: Any) -> Any:
        assert all(model() is None for model in loaded), "the model before is still there"
        found = load(source, *arguments)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(local_sampling.ModelSource, "load", watched)
    assert main(words(prompts, chat_model, plain_model, "--n", 2)) == 0
    assert len(loaded) == 2
    rated = read(prompts)
    for record in rated:
        for rating, completion in enumerate(record["completions"], start=1):
            completion["annotations"] = {"helpfulness": {"Rating": str(rating), "Rationale": ""}}
    path = prompts.parent / "rated.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in rated))
    assert main(["curate", str(path), str(prompts.parent / "pairs.jsonl")]) == 0
    pairs = read(prompts, "pairs.jsonl")
    assert [pair["chosen_response"] for pair in pairs] == [record["completions"][3]["response"] for record in rated]
    assert {pair["chosen_model"] for pair in pairs} == {"plain"}


def test_a_finished_output_is_kept_and_a_changed_setting_is_named(
    prompts: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = tmp_path / "moving"
    toy_model_folder(moving)
    toy_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(moving)
    command = words(prompts, moving, "--n", 2)
    assert main(command) == 0
    before = (prompts.parent / "out.jsonl").read_bytes()
    assert not kept_folder(prompts.parent / "out.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr(local_sampling, "generate_completions", None)  # no model is loaded or asked
        assert main(command) == 0
        assert "is finished already" in capsys.readouterr().out
        assert main([*command, "--seed", "3"]) == 1
        assert "made with other settings (seed: 42 there, 3 here)" in capsys.readouterr().err
        toy_model_folder(moving, seed=5)
        toy_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(moving)
        assert main(command) == 1
        assert "made with other settings (models 1.weights: " in capsys.readouterr().err
        prompts.write_text(prompts.read_text() + '{"prompt": "more"}\n')
        assert main(command) == 1
        assert "prompts_sha256: " in capsys.readouterr().err
    assert (prompts.parent / "out.jsonl").read_bytes() == before
    assert not kept_folder(prompts.parent / "out.jsonl").exists()
    assert main([*command, "--overwrite"]) == 0
    assert len(read(prompts)) == 4

    (prompts.parent / "out.jsonl").write_text("{}\n")  # somebody edits it
    assert main(command) == 1
    assert "exists already, and is not what this command wrote" in capsys.readouterr().err


def test_a_killed_command_resumes_to_the_same_records(
    prompts: Path, chat_model: Path, plain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before every second batch, and so also between the models."""
    prompts.write_text("".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in TEXTS))
    options = ["--n", 2, "--batch-size", 3]
    with serving(lambda request, number: f"{request['messages'][0]['content']} {request['seed']}") as served:
        models = [chat_model, f"x@{served.url}", plain_model]
        assert main(words(prompts, *models, *options, out="whole.jsonl")) == 0
        complete, kills = decoding._complete, 0
        loads: list[str] = []

        def once_more(*arguments: Any, **named: Any) -> Any:
            nonlocal kills
            if left:
                left.pop()
                return complete(*arguments, **named)
            kills += 1
            raise MemoryError("killed")

        load = local_sampling.ModelSource.load
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_complete", once_more)
            patch.setattr(
                local_sampling.ModelSource, "load", lambda self, *more: (loads.append(self.name), load(self, *more))[1]
            )
            for attempt in range(10):
                left = [1]
                try:
                    assert main(words(prompts, *models, *options)) == 0
                    break
                except MemoryError:
                    assert not (prompts.parent / "out.jsonl").exists(), attempt
        assert kills >= 4
        assert loads.count(str(chat_model)) <= kills / 2 + 1, "a finished model is not loaded again"
        assert read(prompts) == read(prompts, "whole.jsonl")


def test_another_models_completions_come_behind_those_of_earlier_records(
    prompts: Path, chat_model: Path, plain_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(lambda request, number: f"yes {request['seed']}") as served:
        command = ["sample", str(prompts), str(prompts.parent / "earlier.jsonl"), "--n", "2"]
        assert main([*command, "--models", f"x@{served.url}"]) == 0
    earlier = read(prompts, "earlier.jsonl")
    rated = [{**record, "rated": {"judge": "j"}} for record in earlier[::-1]]
    for record in rated:
        record["completions"][0] |= {"annotations": {}, "fine-grained_score": 3.0}
    path = prompts.parent / "earlier.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in rated))
    assert main(words(prompts, chat_model, "--n", 1, "--with", path, "--drop-duplicates")) == 0
    for before, record in zip(read(prompts), earlier, strict=True):
        assert before["models"] == ["x", "chat"]
        assert before["completions"][:-1] == [
            {k: v for k, v in each.items() if k not in ("annotations", "fine-grained_score")}
            for each in record["completions"]
        ]
        assert "rated" not in before

    path.write_text("".join(json.dumps(record) + "\n" for record in earlier[1:]))
    assert main(words(prompts, chat_model, "--with", path, out="other.jsonl")) == 1
    assert f"no record of the prompt of {prompts}, line 1; both need the same prompts" in capsys.readouterr().err
    path.write_text("".join(json.dumps({**record, "instruction": "more"}) + "\n" for record in earlier[:1]))
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in earlier)
    assert main(words(prompts, chat_model, "--with", path, out="other.jsonl")) == 1
    assert f"{path}, line 1: its prompt is not among the prompts" in capsys.readouterr().err
    path.write_text('{"source": "s", "instruction": "i"}\n')
    assert main(words(prompts, chat_model, "--with", path, out="other.jsonl")) == 1
    assert f"{path}, line 1: completions is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-key-env", "X"], "--api-key-env has no effect on local models"),
        (["--max-requests", "3"], "--max-requests has no effect on local models"),
        (["--system", "be brief"], "--system has no effect on plain, for which string prompts are plain text"),
        (["--no-raw"], "--no-raw has no effect on plain"),
        (["--raw"], "line 3: holds messages, which --raw does not take"),
        (["--raw", "--chat-template", "zephyr"], "--raw uses no chat template"),
        (["--n", "1", "--seed", "1"], "--seed has no effect on greedy completions"),
    ],
)
def test_options_without_effect(
    prompts: Path, plain_model: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(words(prompts, plain_model, *options)) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in prompts.parent.iterdir()) == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completions": []}, "has a key 'completions', which the result would replace"),
        ({"prompt": "a", "source": 3}, "key 'source' must be a string, not int"),
        ({"question": "a"}, "holds no prompt"),
    ],
)
def test_rows_that_are_no_prompts(
    prompts: Path, chat_model: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any], message: str
) -> None:
    prompts.write_text(json.dumps(row))
    assert main(words(prompts, chat_model)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert f"{prompts}, line 1: " in error


def test_a_prompt_that_a_later_model_cannot_take_is_named_before_the_work(
    prompts: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = toy_model_folder(tmp_path / "short", max_position_embeddings=16)
    assert main(words(prompts, chat_model, short)) == 1
    assert f"short: {prompts}, line 1: the prompt's" in capsys.readouterr().err
    assert not kept_folder(prompts.parent / "out.jsonl").exists(), "so that the prompts can be changed"


def test_a_row_that_json_cannot_hold_is_refused_before_the_work(
    prompts: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prompts.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "when": [datetime.date(2026, 1, 1)]}), path)
    assert main(words(path, chat_model)) == 1
    assert "key 'when' cannot be written as JSON" in capsys.readouterr().err


def test_outputs_that_would_harm(prompts: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, message in (("prompts.jsonl", "would replace the input"), ("out.parquet", "ends with .jsonl")):
        assert main(words(prompts, chat_model, out=out)) == 1
        assert message in capsys.readouterr().err
    (prompts.parent / "out.jsonl").write_text("mine\n")
    assert main(words(prompts, chat_model)) == 1
    assert "exists already, and is not what this command wrote" in capsys.readouterr().err
    assert main(words(prompts, chat_model, "--n", 1, "--overwrite")) == 0
    assert len(read(prompts)) == 3


def test_two_commands_do_not_work_on_one_output(
    prompts: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kept_folder(prompts.parent / "out.jsonl")
    folder.mkdir()
    lock = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{lock}; print(1, flush=True); input()", str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        assert main(words(prompts, chat_model)) == 1
        other.communicate("\n")
    assert "another process is at work on it" in capsys.readouterr().err


def test_unfinished_work_of_other_settings_is_named(
    prompts: Path, chat_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any, kept: decoding.KeptTokens) -> Any:
        kept.add([{"key": "some", "ids": [1], "end": None}])
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(local_sampling, "generate_completions", killed)
        with pytest.raises(MemoryError):
            main(words(prompts, chat_model, "--temperature", "0.7"))
    assert main(words(prompts, chat_model)) == 1
    assert "holds unfinished work of other settings (temperature: 0.7 there, 1.0 here)" in capsys.readouterr().err
    assert main(words(prompts, chat_model, "--overwrite", "--n", 2)) == 0
    assert len(read(prompts)[0]["completions"]) == 2

    with monkeypatch.context() as patch:
        patch.setattr(local_sampling, "generate_completions", killed)
        with pytest.raises(MemoryError):
            main(words(prompts, chat_model, "--overwrite", "--n", 3))
    assert main(words(prompts, chat_model, "--n", 2)) == 0
    assert "is finished already" in capsys.readouterr().out
    assert kept_folder(prompts.parent / "out.jsonl").is_dir(), "the work of the command that was killed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_75(
    prompts: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    codes = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit(code)

    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", leave)
        patch.setattr(local_sampling, "generate_completions", lambda *a, **k: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit):
            main(words(prompts, chat_model))
    assert codes == [75]
    assert f"{signal.Signals(number).name}: stopped; finished work is kept" in capsys.readouterr().err


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("round-1/run/model", "round-2/run/model", "a=b"):
        Path(folder).mkdir(parents=True)
    for run in ("round-1/run", "round-2/run"):
        Path(run, "config.yaml").touch()

    def names(*models: str, taken: tuple[str, ...] = ()) -> list[str]:
        return [model.name for model in parse_models(models, taken)]

    assert names("org/model", "round-1/run/model", "a=b") == ["org/model", "run", "a=b"]
    assert names("round-1/run", "round-2/run/model") == ["round-1/run", "round-2/run"]
    assert names("round-2/run", taken=("run",)) == ["round-2/run"]
    assert names("old=round-1/run", "round-2/run") == ["old", "run"]
    assert names("m@http://one/v1", "m@https://two:8/v1/", "a/b@http://one/v1") == ["m@one", "m@two:8", "a/b"]
    assert names("m@http://one/v1", "m@http://one/v2") == ["m@one/v1", "m@one/v2"]
    assert names(".")[0] == tmp_path.name
    assert names("/models/llama@http://one/v1", "qwen3:8b@http://one/v1") == ["llama", "qwen3:8b"]
    parsed = parse_models(["x=org/model@http://host/v1"])[0]
    assert (parsed.name, parsed.model, parsed.url) == ("x", "org/model", "http://host/v1")
    for models, message in (
        (["round-1/run", "round-1/../round-1/run"], "names round-1/../round-1/run twice"),
        (["round-1/run", "x=round-1/run"], "names round-1/run twice"),
        (["m@http://one/v1", "m@http://one/v1"], "names m at one endpoint twice"),
        (["x=round-1/run", "x=round-2/run"], "x is the name of another of --models as well"),
        (["m@host:8000/v1"], "with its scheme"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_models(models)
    with pytest.raises(ValueError, match="is the name of the completions of --with as well"):
        parse_models(["org/model"], ["org/model"])


def test_what_is_resumed_after_midnight_is_prompted_as_before(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> "Tomorrow":
            return cls.fromordinal(datetime.datetime.now().toordinal() + 1)

    dated = toy_model_folder(tmp_path / "dated")
    toy_tokenizer(chat_template="{{ strftime_now('%d %m') }}" + CHAT_TEMPLATE).save_pretrained(dated)
    command = words(prompts, dated, "--n", 2, "--batch-size", 2)
    assert main([*command[:2], str(tmp_path / "whole.jsonl"), *command[3:]]) == 0
    complete, calls = decoding._complete, []

    def killed(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return complete(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_complete", killed)
        with pytest.raises(MemoryError):
            main(command)
    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert main(command) == 0
    assert read(prompts) == read(prompts, "whole.jsonl")
    assert main(command) == 0
    assert "is finished already" in capsys.readouterr().out
    assert main([*command, "--overwrite"]) == 0
    assert read(prompts) != read(prompts, "whole.jsonl"), "the day counts"


def test_a_wrong_key_shows_before_local_models_work(
    prompts: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_sampling, "generate_completions", None)
    with serving(lambda request, number: Reply(status=401)) as served:
        assert main(words(prompts, chat_model, f"x@{served.url}")) == 1
    assert "no key was sent: set the environment variable" in capsys.readouterr().err
    assert len(served.requests) == 1


def test_plain_text_is_trained_on_as_it_was_sampled(
    prompts: Path, plain_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From prompts to the token ids that DPO learns, leading space included; chats in the same file stay chats."""
    prompts.write_text("".join(json.dumps({**row, "plain_text": "own"}) + "\n" for row in ROWS))
    tokenizer = toy_tokenizer()
    sampled = [tokenizer.encode(text, add_special_tokens=False) for text in (" and the sea", " of a dog\n")]

    def complete(model: Any, batch: Any, *others: Any) -> list[decoding.Row]:
        ends = [decoding.Row(ids, tokenizer.eos_token_id, "stop") for ids in sampled]
        return ends * len(batch.prompts)

    monkeypatch.setattr(decoding, "_complete", complete)
    assert main(words(prompts, plain_model, "--n", 2)) == 0
    found = read(prompts)
    assert [record.get("plain_text") for record in found] == [True, True, None]
    assert [each["response"] for each in found[0]["completions"]] == [" and the sea", " of a dog\n"]

    folder = prompts.parent
    (folder / "judge.py").write_text(
        "def rate(prompt, completions):\n"
        "    print([prompt, *sorted(completions)], file=open('prompts.txt', 'a'))\n"
        "    return [5 if 'sea' in text else 1 for text in completions]\n"
    )
    monkeypatch.chdir(folder)
    assert main(["rate", "out.jsonl", "rated.jsonl", "--judge-function", "judge.py:rate", "--again-share", "0"]) == 0
    shown = Path("prompts.txt").read_text().splitlines()
    assert shown[:2] == [repr([text, " and the sea", " of a dog\n"]) for text in TEXTS[:2]]
    assert main(["curate", "rated.jsonl", "pairs.jsonl"]) == 0
    assert "prompts of plain text need --schema cleaned" in capsys.readouterr().out

    rows, _ = load_pairs("pairs.jsonl", tokenizer, max_length=512, max_prompt_length=256)
    encoder = ChatEncoder(tokenizer)
    chat = encoder.encode_prompt([{"role": "user", "content": "héllo"}])
    asked = [encoder.encode_prompt(text) for text in TEXTS[:2]]
    assert asked[1] == [1, *tokenizer.encode("dog", add_special_tokens=False)]
    for row, before in zip(rows, asked, strict=False):
        learned = [[*row["trunk"], *branch] for branch in row["branches"]]
        assert learned == [[*before, *ids, tokenizer.eos_token_id] for ids in sampled]
    assert [*rows[2]["trunk"], *rows[2]["branches"][0]][: len(chat)] == chat


def test_prompts_that_only_some_models_continue_as_text_are_not_marked(
    prompts: Path, chat_model: Path, plain_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(prompts, chat_model, plain_model, "--n", 1)) == 0
    assert "some models continue 2 of the prompts as plain text" in capsys.readouterr().out
    assert not any("plain_text" in record for record in read(prompts))
    assert main(words(prompts, plain_model, "--n", 1, out="plain.jsonl")) == 0
    assert "some models" not in capsys.readouterr().out
    earlier = prompts.parent / "plain.jsonl"
    assert main(words(prompts, chat_model, "--n", 1, "--with", earlier, out="both.jsonl")) == 0
    assert "some models continue 2 of the prompts as plain text" in capsys.readouterr().out
    assert not any("plain_text" in record for record in read(prompts, "both.jsonl"))
    again = words(prompts, f"other={plain_model}", "--n", 1, "--with", earlier, out="again.jsonl")
    assert main(again) == 0
    assert [record.get("plain_text") for record in read(prompts, "again.jsonl")] == [True, True, None]


def test_a_given_date_is_the_one_that_templates_write(
    prompts: Path, tmp_path: Path, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = toy_model_folder(tmp_path / "written")
    toy_tokenizer(chat_template="31 12" + CHAT_TEMPLATE).save_pretrained(written)
    dated = toy_model_folder(tmp_path / "dated")
    toy_tokenizer(chat_template="{{ strftime_now('%d %m') }}" + CHAT_TEMPLATE).save_pretrained(dated)
    assert main(words(prompts, f"m={written}", "--n", 1, out="written.jsonl")) == 0
    command = words(prompts, f"m={dated}", "--n", 1)
    assert main([*command, "--template-date", "2024-12-31"]) == 0
    assert read(prompts) == read(prompts, "written.jsonl")
    assert "no effect" not in capsys.readouterr().out
    assert main([*command, "--template-date", "2024-12-30"]) == 1
    assert 'date: "2024-12-31" there, "2024-12-30" here' in capsys.readouterr().err
    other = words(prompts, chat_model, "--n", 1, "--template-date", "2024-12-31", out="other.jsonl")
    assert main(other) == 0
    assert "--template-date has no effect" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--template-date", "31.12."])
    assert "31.12. is no date YYYY-MM-DD" in capsys.readouterr().err


def test_special_tokens_in_prompts_are_split_as_in_training(prompts: Path, chat_model: Path) -> None:
    prompts.write_text('{"prompt": "dog </s> sea"}\n')
    assert main(words(prompts, chat_model, "--n", 1)) == 0
    assert main(words(prompts, chat_model, "--n", 1, "--split-special-tokens", out="split.jsonl")) == 0
    model, tokenizer = load_causal_lm(chat_model, dtype=torch.float32, device="cpu")
    given = [Prompt("here", [{"role": "user", "content": "dog </s> sea"}])]
    for out, split in (("out.jsonl", False), ("split.jsonl", True)):
        encoder = ChatEncoder(tokenizer, split_special_tokens=split)
        wanted = decoding.generate_completions(model, encoder, given, decoding.Decoding(max_new_tokens=6)).completions
        assert read(prompts, out)[0]["completions"][0]["response"] == wanted[0][0].text
    assert read(prompts)[0]["completions"] != read(prompts, "split.jsonl")[0]["completions"]
