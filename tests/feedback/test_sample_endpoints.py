"""`notus sample` from endpoints that answer, and from those that refuse, stall, drip, lie or run out."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from judges import Reply, completion, serving
from ranks import free_port

from notus.__main__ import main
from notus.curation.ultrafeedback import parse_record
from notus.evaluation import endpoint
from notus.feedback.records import kept_folder, summary_file

KEY = "sk-very-secret-1234"
PROMPTS = [{"prompt": "the sea", "id": 7}, {"prompt": "a dog", "source": "mine"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not wait, and no proxy of this machine stands between client and server."""
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def sample(prompts: Path, url: str, *options: object, model: str = "big") -> int:
    words = ["sample", prompts, prompts.parent / "out.jsonl", "--models", f"{model}@{url}", *options]
    return main([str(word) for word in words])


def records(prompts: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prompts.parent / "out.jsonl").read_text().splitlines()]


def summary(prompts: Path) -> dict[str, Any]:
    return json.loads(summary_file(prompts.parent / "out.jsonl").read_text())


def said(text: str, *, reason: str = "stop", tokens: int | None = 3) -> Reply:
    body = completion(text)
    body["choices"][0]["finish_reason"] = reason
    return Reply({**body, "usage": {"prompt_tokens": 5, "completion_tokens": tokens}} if tokens else body)


def asked(request: dict[str, Any]) -> tuple[str, int]:
    return request["messages"][-1]["content"], request["seed"]


def test_records_have_ultrafeedbacks_form(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def respond(request: dict[str, Any], number: int) -> Reply:
        text, seed = asked(request)
        return said(f"{text} {seed}", reason="length" if text == "a dog" else "stop")

    with serving(respond) as served:
        options = ["--n", 2, "--seed", 7, "--top-p", 0.9, "--top-k", 40, "--max-new-tokens", 5, "--parallel", 3]
        assert sample(prompts, served.url, *options) == 0
    sent = {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "max_tokens": 5, "model": "big"}
    assert all(sent.items() <= request.items() for request in served.requests)
    seeds = {text: [each["settings"]["seed"] for each in record["completions"]] for text, record in zip(
        ("the sea", "a dog"), records(prompts), strict=True)}  # fmt: skip
    assert sorted(map(asked, served.requests)) == sorted((text, seed) for text in seeds for seed in seeds[text])
    assert len({seed for of_prompt in seeds.values() for seed in of_prompt}) == 4, "no two draws have one seed"

    settings = {"max_new_tokens": 5, "temperature": 1.0, "top_p": 0.9, "top_k": 40}
    assert records(prompts) == [
        {
            "source": source,
            "instruction": text,
            **own,
            "models": ["big"],
            "completions": [
                {
                    "model": "big",
                    "response": f"{text} {seed}",
                    "settings": {**settings, "seed": seed, "sample": number},
                    "finish_reason": reason,
                    "tokens": 3,
                }
                for number, seed in enumerate(seeds[text])
            ],
        }
        for text, source, reason, own in (
            ("the sea", "prompts.jsonl", "stop", {"id": 7}),
            ("a dog", "mine", "length", {}),
        )
    ]
    for record in records(prompts):
        parse_record(record)
    figures = summary(prompts)["models"]["big"]
    assert figures.pop("tokens_per_second") > 0
    wanted = {"completions": 4, "empty": 0, "cut": 2, "failed": 0, "tokens": 12, "requests": 4}
    assert figures == wanted
    assert "big: 50% of its completions are cut at their most tokens" in capsys.readouterr().out

    assert sample(prompts, served.url, *options) == 0  # the server is gone
    assert "is finished already" in capsys.readouterr().out
    assert not kept_folder(prompts.parent / "out.jsonl").exists()


def test_conversations_tools_and_template_settings_are_sent_and_kept(tmp_path: Path) -> None:
    call = {"function": {"name": "look", "arguments": {"at": 1}}}
    turns = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **call}]},
        {"role": "tool", "content": "seen"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = {"messages": turns, "tools": tools, "chat_template_kwargs": {"thinking": False}, "id": 3}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "hello"}))
    with serving(lambda request, number: "yes") as served:
        assert sample(prompts, served.url, "--n", 1, "--system", "be brief", "--parallel", 1) == 0
    first, second = served.requests
    assert [turn["role"] for turn in first["messages"]] == ["system", "user", "assistant", "tool"]
    assert first["messages"][2]["tool_calls"][0]["function"]["arguments"] == '{"at": 1}'
    assert (first["tools"], first["chat_template_kwargs"]) == (tools, {"thinking": False})
    assert "seed" not in first, "a greedy completion draws nothing"
    assert second["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    one, other = records(prompts)
    assert [turn["role"] for turn in one["messages"]] == ["system", "user", "assistant", "tool"]
    assert (one["tools"], one["chat_template_kwargs"], one["id"]) == (tools, {"thinking": False}, 3)
    assert one["instruction"].startswith("system: be brief\n\nuser: look")
    assert other["messages"] == second["messages"]
    assert "prompt" not in other


def test_a_rejected_key_is_one_clear_error(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda request, number: Reply({"error": {"message": f"bad key {KEY}"}}, 401)) as served:
        assert sample(prompts, served.url, "--api-key-env", "MY_KEY", "--parallel", 1) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the key is rejected: set the environment variable that --api-key-env names" in error
    assert KEY not in error
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert not any(KEY in path.read_text() for path in prompts.parent.rglob("*") if path.is_file())
    assert not (prompts.parent / "out.jsonl").exists()


def test_what_may_pass_is_asked_again(prompts: Path) -> None:
    def drip(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(8):
            time.sleep(0.1)
            handler.wfile.write(b" ")
            handler.wfile.flush()

    wrong: dict[int, Reply] = {
        0: Reply(status=429, headers={"Retry-After": "0"}),
        1: Reply(status=503),
        2: Reply("not JSON"),
        3: Reply({"choices": [{"message": {"content": 7}}]}),
        4: Reply(b"x" * (20 << 20)),
        5: Reply(conduct=drip),
    }
    with serving(lambda request, number: wrong.get(number) or said("fine")) as served:
        assert sample(prompts, served.url, "--n", 2, "--parallel", 2, "--timeout", 0.5) == 0
    assert [len(record["completions"]) for record in records(prompts)] == [2, 2]
    assert summary(prompts)["models"]["big"]["requests"] == len(served.requests) == 4 + len(wrong)


def test_failures_are_counted_left_out_and_asked_for_again(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = True

    def respond(request: dict[str, Any], number: int) -> Reply:
        if request["messages"][-1]["content"] == "a dog" and broken:
            return Reply({"error": {"message": "too long"}}, 400)
        return said("fine")

    with serving(respond) as served:
        assert sample(prompts, served.url, "--n", 2, "--parallel", 1) == 1
        assert "big: 2 completions failed, the first: " in capsys.readouterr().out
        assert [len(record["completions"]) for record in records(prompts)] == [2, 0]
        assert summary(prompts)["models"]["big"]["failed"] == 2
        before, broken = len(served.requests), False
        assert sample(prompts, served.url, "--n", 2, "--parallel", 1) == 0
    assert len(served.requests) - before == 2
    assert [len(record["completions"]) for record in records(prompts)] == [2, 2]


def test_a_server_that_answers_nothing_is_an_error(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(prompts, f"http://127.0.0.1:{free_port()}/v1", "--n", 2) == 1
    assert "big: not one completion came (" in capsys.readouterr().err
    assert not (prompts.parent / "out.jsonl").exists()


def test_the_budget_stops_and_a_larger_one_resumes(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda request, number: said(" ".join(map(str, asked(request))))) as served:
        assert sample(prompts, served.url, "--n", 3, "--max-requests", 4, "--parallel", 2) == 1
        assert len(served.requests) == 4
        assert "--max-requests 4 is used up, and 2 completions are missing" in capsys.readouterr().out
        assert not (prompts.parent / "out.jsonl").exists()
        assert sample(prompts, served.url, "--n", 3, "--max-requests", 4) == 1
        assert len(served.requests) == 4
        assert sample(prompts, served.url, "--n", 3, "--max-requests", 6) == 0
    assert len(served.requests) == 6
    assert len(set(map(asked, served.requests))) == 6
    assert summary(prompts)["models"]["big"]["requests"] == 6


def test_requests_of_a_stopped_command_count(prompts: Path) -> None:
    """Also those that were on their way. What was not asked for is not noted: that can be much."""
    release = threading.Event()

    def respond(request: dict[str, Any], number: int) -> Reply:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            release.wait(5)
        return said(str(number))

    with serving(respond) as served:
        options = ("--n", 50, "--max-requests", 5, "--parallel", 1)
        assert sample(prompts, served.url, *options) == 75
        release.set()
        assert sample(prompts, served.url, *options) == 1
    assert len(served.requests) == 5
    lines = (kept_folder(prompts.parent / "out.jsonl") / "model-1.jsonl").read_text().splitlines()
    assert [json.loads(line)["requests"] for line in lines] == [1, 2, 3, 4, 5]


def test_parameters_that_a_server_rejects_are_left_out(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def respond(request: dict[str, Any], number: int) -> Reply:
        for name, message in (
            ("max_tokens", "Unsupported parameter: use 'max_completion_tokens' instead"),
            ("top_k", "Unrecognized request argument supplied: top_k"),
            ("seed", "extra fields not permitted"),
        ):
            if name in request:
                return Reply({"error": {"message": message}}, 400)
        return said("fine")

    with serving(respond) as served:
        assert sample(prompts, served.url, "--n", 2, "--top-k", 5, "--max-new-tokens", 9, "--parallel", 1) == 0
    assert len(served.requests) == 4 + 3
    assert records(prompts)[1]["completions"][1]["settings"] == {"max_new_tokens": 9, "temperature": 1.0, "sample": 1}
    out = capsys.readouterr().out
    assert out.count("the server rejects seed and top_k, which are left out") == 1
    assert "warning: big: all completions of 100% of the prompts are the same" in out


def test_empty_answers_are_completions(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda request, number: said("" if number == 0 else "fine", tokens=None)) as served:
        assert sample(prompts, served.url, "--n", 2, "--parallel", 1) == 0
    assert len(served.requests) == 4
    assert records(prompts)[0]["completions"][0]["response"] == ""
    assert records(prompts)[0]["completions"][0]["tokens"] is None
    assert summary(prompts)["models"]["big"] == {
        "completions": 4, "empty": 1, "cut": 0, "failed": 0, "tokens": None, "tokens_per_second": None, "requests": 4,
    }  # fmt: skip
    assert "warning: big: 25% of its completions are empty" in capsys.readouterr().out


def test_repeated_prompts_draw_anew_and_duplicates_are_dropped(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na dog\n")
    with serving(lambda request, number: said(f"answer {number % 3 // 2}\ud800")) as served:
        assert sample(prompts, served.url, "--n", 3, "--seed", 0, "--drop-duplicates", "--parallel", 1) == 0
    assert len({request["seed"] for request in served.requests}) == 6
    kept = [[each["settings"]["sample"] for each in record["completions"]] for record in records(prompts)]
    assert kept == [[0, 2], [0, 2]], "the first of each text stays"
    assert records(prompts)[0]["completions"][0]["response"] == "answer 0\ufffd"
    assert summary(prompts)["dropped_duplicates"] == 2


def test_two_servers_of_one_model_have_two_names(prompts: Path) -> None:
    with serving(lambda request, number: said("one")) as first, serving(lambda request, number: said("two")) as second:
        assert sample(prompts, first.url, f"big@{second.url}", "--n", 1) == 0
    hosts = [served.url.removeprefix("http://").removesuffix("/v1") for served in (first, second)]
    assert records(prompts)[0]["models"] == [f"big@{host}" for host in hosts]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--raw"], "--raw has no effect on a model behind an endpoint"),
        (["--precision", "bf16"], "--precision has no effect on models behind endpoints"),
        (["--batch-size", 2], "--batch-size has no effect on models behind endpoints"),
        (["--temperature", 0], "--n above 1 would repeat a greedy completion"),
    ],
)
def test_options_without_effect(
    prompts: Path, capsys: pytest.CaptureFixture[str], options: list[object], message: str
) -> None:
    assert sample(prompts, "http://127.0.0.1:9/v1", *options) == 1
    assert message in capsys.readouterr().err


def test_a_password_in_an_address_is_not_shown(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("big", "x=big"):
        assert sample(prompts, f"http://me:{KEY}@127.0.0.1:9/v1", model=model) == 1
        captured = capsys.readouterr()
        assert "holds a password" in captured.err
        assert KEY not in captured.out + captured.err
