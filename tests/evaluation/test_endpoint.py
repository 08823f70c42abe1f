"""The judge's client against a real server on loopback that refuses, stalls and lies."""

import argparse
import asyncio
import contextlib
import email.utils
import gzip
import json
import os
import pickle
import signal
import threading
import time
import traceback
import tracemalloc
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from judges import Reply, completion, serving
from ranks import free_port

from notus.evaluation.arguments import add_judge_arguments
from notus.evaluation.endpoint import Endpoint, EndpointError, ask_all, collect_verdicts, judge_endpoint

QUESTION = [{"role": "user", "content": "How good is this?"}]
KEY = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of this machine stands between client and server."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def waits() -> list[float]:
    return []


def endpoint(url: str, waits: list[float], **options: Any) -> Endpoint:
    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    return Endpoint(url, "judge", sleep=sleep, **{"timeout": 10.0, "retries": 2, **options})


def ask(url: str, waits: list[float], **options: Any) -> str:
    return asyncio.run(endpoint(url, waits, **options).ask(QUESTION))


def once(reply: Reply) -> Callable[[dict[str, Any], int], Reply | str]:
    """The first request gets `reply`, later ones a proper answer."""
    return lambda request, number: reply if number == 0 else "fine"


def test_the_request_is_a_chat_completions_one(waits: list[float]) -> None:
    with serving(lambda request, number: "Rating: [[8]] 你好") as served:
        answer = ask(served.url + "/", waits, api_key=KEY, max_tokens=7, temperature=0.5)
    assert answer == "Rating: [[8]] 你好"
    assert served.requests == [
        {"model": "judge", "messages": QUESTION, "max_tokens": 7, "temperature": 0.5, "path": "/v1/chat/completions"}
    ]
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert waits == []


def test_without_a_key_none_is_sent(waits: list[float]) -> None:
    with serving(lambda request, number: "yes") as served:
        ask(served.url, waits)
    assert "Authorization" not in served.headers[0]


def test_half_a_surrogate_pair_can_be_sent(waits: list[float]) -> None:
    with serving(lambda request, number: "yes") as served:
        asyncio.run(endpoint(served.url, waits).ask([{"role": "user", "content": "\ud83d"}]))
    assert served.requests[0]["messages"][0]["content"] == "\ud83d"


def test_a_server_that_sends_bytes_forever_meets_the_timeout_of_the_whole_request(waits: list[float]) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not served.closing.wait(0.02):
            handler.wfile.write(b"x")

    with serving(once(Reply(conduct=drip))) as served:
        started = time.monotonic()
        assert ask(served.url, waits, timeout=1.0) == "fine"
        took = time.monotonic() - started
        served.closing.set()
    assert 1.0 <= took < 30
    assert len(waits) == 1


def test_a_server_that_stalls_is_an_error_after_all_retries(waits: list[float]) -> None:
    with serving(lambda request, number: Reply(conduct=lambda handler: served.closing.wait())) as served:
        with pytest.raises(EndpointError, match=r"in 0\.5 s \(3 requests\)"):
            ask(served.url, waits, timeout=0.5)
        served.closing.set()
    assert len(served.requests) == 3


def test_a_name_that_is_looked_up_forever_meets_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    release, outcomes = threading.Event(), Outcomes()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: release.wait(20) and [])
    asked = Endpoint("http://localhost:9/v1", "judge", timeout=0.3, retries=0)
    started = time.monotonic()
    ask_all(lambda item: asked.ask(QUESTION), [0], parallel=1, on_done=outcomes)
    took = time.monotonic() - started
    release.set()
    assert "no whole answer in 0.3 s" in str(outcomes[0])
    assert took < 10


@pytest.mark.parametrize(
    ("value", "shortest", "longest"),
    [
        ("7", 7, 8),
        (3600, 600, 601),
        ("86400", 600, 601),
        (-3600, 0, 1),
        *((nonsense, 0.5, 1.5) for nonsense in ("soon", "-3", "nan", "inf", "Thu, 01 Foo 2020", "")),
    ],
)
def test_429_waits_as_the_server_says(value: str | int, shortest: float, longest: float, waits: list[float]) -> None:
    if isinstance(value, int):  # a date, so many seconds from now
        value = email.utils.formatdate(time.time() + value, usegmt=True)
    with serving(once(Reply("slow down", 429, {"Retry-After": value}))) as served:
        assert ask(served.url, waits) == "fine"
    assert len(waits) == 1
    assert shortest <= waits[0] <= longest


def test_a_long_wait_is_logged(waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with serving(once(Reply("", 429, {"Retry-After": "300"}))) as served:
        ask(served.url, waits)
    assert "the server answers 429; asked again in 30" in capsys.readouterr().out


def test_errors_of_the_server_are_retried_with_growing_waits(waits: list[float]) -> None:
    reply = Reply({"error": {"message": "over\nloaded \x1b[31m"}}, 500)
    with (
        serving(lambda request, number: reply) as served,
        pytest.raises(EndpointError, match=r"answers 500 \(over loaded \[31m\) \(9 requests\)"),
    ):
        ask(served.url, waits, retries=8)
    assert len(served.requests) == 9
    for attempt, wait in enumerate(waits):
        assert 0.5 * min(2**attempt, 60) <= wait <= 1.5 * min(2**attempt, 60)


def test_nobody_listens(waits: list[float]) -> None:
    with pytest.raises(EndpointError, match=r"ConnectError.* \(3 requests\)"):
        ask(f"http://127.0.0.1:{free_port()}/v1", waits)
    assert len(waits) == 2


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')


def nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    with contextlib.suppress(ConnectionError):  # the client closes the connection
        while True:
            handler.wfile.write(b"x" * 2**20)


@pytest.mark.parametrize(
    "flood",
    [Reply(conduct=endless), Reply(gzip.compress(bytes(17 * 2**20)), headers={"Content-Encoding": "gzip"})],
    ids=["endless", "gzip"],
)
def test_an_answer_is_read_up_to_16_mib(flood: Reply, waits: list[float]) -> None:
    with serving(lambda request, number: flood) as served, pytest.raises(EndpointError, match="more than 16 MiB"):
        ask(served.url, waits, timeout=60.0, retries=1)
    assert len(served.requests) == 2


BROKEN = {
    "cut in the middle": Reply(conduct=cut),
    "not HTTP": Reply(conduct=nonsense),
    "no reply": Reply(conduct=lambda handler: None),
    "garbage": Reply("<html>hello</html>"),
    "not UTF-8": Reply(b"\xff\xfe\x00"),
    "deep JSON": Reply("[" * 200_000),
    "a list": Reply("[]"),
    "no choices": Reply({"choices": []}),
    "choices of text": Reply({"choices": "no"}),
    "null message": Reply({"choices": [{"message": None}]}),
    "content of parts": Reply({"choices": [{"message": {"content": [{"text": "8"}]}}]}),
    "null content": Reply(completion(None)),
    "blank content": Reply(completion(" \n")),
    "a gzip that is none": Reply("plain", headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_costs_a_retry(name: str, waits: list[float]) -> None:
    with serving(once(BROKEN[name])) as served:
        assert ask(served.url, waits) == "fine"
    assert len(served.requests) == 2
    assert len(waits) == 1


def flood(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        handler.wfile.write(b" " * (1 << 20))


@pytest.mark.parametrize(
    "reply",
    [Reply(conduct=flood), Reply(gzip.compress(b" " * (17 << 20)), headers={"Content-Encoding": "gzip"})],
    ids=["without end", "compressed"],
)
def test_an_answer_without_end_is_cut_off(reply: Reply, waits: list[float]) -> None:
    with (
        serving(lambda request, number: reply) as served,
        pytest.raises(EndpointError, match="an answer of more than 16 MiB"),
    ):
        ask(served.url, waits, timeout=60.0, retries=0)


def drip_body(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.02)


def drip_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(10**9):
        handler.wfile.write(f"X-{number}: y\r\n".encode())
        time.sleep(0.02)


def endless_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-Long: " + b"y" * 2**16 + b"\r\n")


MISCONDUCT = {
    "stalls": Reply(conduct=lambda handler: time.sleep(5)),
    "drips its body": Reply(conduct=drip_body),
    "drips its headers": Reply(conduct=drip_headers),
    "has headers without end": Reply(conduct=endless_headers),
    "has a body without end": Reply(conduct=endless),
    "sends garbage": Reply(b"\x00\xff" * 1000),
    "is not HTTP": Reply(conduct=nonsense),
    # two layers of gzip: a hundred bytes for each megabyte, and a hundredth of that again
    "packs gigabytes": Reply(
        gzip.compress(gzip.compress(bytes(2**27), 1), 1), headers={"Content-Encoding": "gzip, gzip"}
    ),
}


@pytest.mark.parametrize("name", MISCONDUCT)
def test_every_misconduct_costs_a_retry_then_a_counted_failure_in_bounded_time_and_memory(
    name: str, tmp_path: Path, waits: list[float]
) -> None:
    with serving(lambda request, number: MISCONDUCT[name]) as served:
        judge = endpoint(served.url, waits, timeout=0.5, retries=1)
        tracemalloc.start()
        began = time.monotonic()
        failures = collect_verdicts(
            lambda item: judge.ask(QUESTION), [1, 2], lambda item, outcome: None, parallel=2, kept=tmp_path / "kept"
        )
        took, (_, peak) = time.monotonic() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(failures) == 2
    assert all("(2 requests)" in failure for failure in failures)
    assert len(served.requests) == 4
    assert len(waits) == 2
    assert took < 20  # two requests of half a second, on a machine that may be busy
    assert peak < 4 * 2 * (16 << 20)
    assert not (tmp_path / "kept").exists()


def test_a_packed_answer_is_read(waits: list[float]) -> None:
    body = json.dumps(completion("[[8]]")).encode()
    packed = {"gzip": gzip.compress(body), "deflate": zlib.compress(body), "identity": body}
    replies = [Reply(content, headers={"Content-Encoding": name}) for name, content in packed.items()]
    with serving(lambda request, number: replies[number]) as served:
        assert [ask(served.url, waits) for _ in replies] == ["[[8]]"] * 3
    assert served.headers[0]["Accept-Encoding"] == "identity"
    assert waits == []


def test_content_that_is_no_string_is_no_chat_completion(waits: list[float]) -> None:
    reply = BROKEN["content of parts"]
    with serving(lambda *_: reply) as served, pytest.raises(EndpointError, match="its content is no string"):
        ask(served.url, waits, retries=0)


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_key_is_an_error_at_once_and_never_shown(status: int, waits: list[float]) -> None:
    reply = Reply({"error": {"message": f"Incorrect API key provided: {KEY}"}}, status)
    with serving(lambda request, number: reply) as served:
        with pytest.raises(ValueError, match=r"key provided: \*\*\*.*--api-key-env") as caught:
            ask(served.url, waits, api_key=KEY)
        with pytest.raises(ValueError, match="no key was sent"):
            ask(served.url, waits)
    assert len(served.requests) == 2
    assert KEY not in str(caught.value)
    assert KEY not in repr(endpoint(served.url, waits, api_key=KEY))


@pytest.mark.parametrize("status", [301, 307, 404, 405])
def test_a_wrong_address_is_an_error_at_once(status: int, waits: list[float]) -> None:
    reply = Reply("", status, {"Location": "http://127.0.0.1:9/"})
    with serving(lambda *_: reply) as served, pytest.raises(ValueError, match=r"check the address.*'judge'"):
        ask(served.url, waits)
    assert len(served.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_rejected_question_is_not_asked_again(status: int, waits: list[float]) -> None:
    reply = Reply({"error": {"message": "too long"}}, status)
    with serving(lambda *_: reply) as served, pytest.raises(EndpointError, match=rf"{status} \(too long\)"):
        ask(served.url, waits)
    assert len(served.requests) == 1


@pytest.mark.parametrize("url", ["", "judge", "ftp://host/v1", "http://", "http://h:port/v1", "localhost:8000/v1"])
def test_what_is_no_address_is_an_error_before_the_work(url: str) -> None:
    with pytest.raises(ValueError, match=r"http://host:8000/v1"):
        Endpoint(url, "judge")


@pytest.mark.parametrize(
    "url", ["https://me:hunter2@host/v1", "me:hunter2@host:port/v1", "https://host/v1?key=hunter2"]
)
def test_a_password_or_key_in_the_address_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"holds a (password|\? or #)") as caught:
        Endpoint(url, "judge")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-秘密", "sk-secret ", "sk secret", "sk-secret\n", ""])
def test_a_key_that_no_header_can_hold_is_not_repeated(key: str) -> None:
    with pytest.raises(ValueError, match="set its environment variable again") as caught:
        Endpoint("http://host/v1", "judge", api_key=key)
    assert not any(part in str(caught.value) for part in ("秘密", "secret"))


def bad_header(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(f"HTTP/1.1 200 OK\r\n{handler.headers['Authorization']} {'x' * 5000}\r\n\r\n".encode())


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"choices": [{"message": {"content": ""}, "finish_reason": f"{KEY}\n" * 10_000}]}),
        Reply(conduct=bad_header),
        Reply({"error": {"message": f"{KEY}\n" * 10_000}}, 400),
        Reply({"error": {"message": f"{KEY}\n" * 10_000}}, 503),
    ],
    ids=["finish_reason", "header", "rejection", "fault"],
)
def test_a_server_that_repeats_the_key_is_quoted_in_one_short_line_without_it(reply: Reply, waits: list[float]) -> None:
    with serving(lambda request, number: reply) as served, pytest.raises(EndpointError) as caught:
        ask(served.url, waits, api_key=KEY, retries=0)
    message = str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert "***" in message
    assert len(message) < 500
    assert message.isprintable()


def test_the_judge_on_the_command_line_has_its_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*options: str) -> Endpoint:
        parser = argparse.ArgumentParser()
        add_judge_arguments(parser)
        return judge_endpoint(parser.parse_args(["--judge-model", "gpt-4", *options]))

    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    monkeypatch.setenv("BLANK", " ")
    assert judge() == Endpoint("https://api.openai.com/v1", "gpt-4", api_key="sk-openai")
    own = judge("--judge-url", "http://host/v1", "--judge-timeout", "7", "--api-key-env", "MY_KEY")
    assert own == Endpoint("http://host/v1", "gpt-4", api_key=KEY, timeout=7.0)
    assert judge("--api-key-env", "BLANK").api_key is None
    assert judge("--api-key-env", "NO_SUCH_KEY_AT_ALL").api_key is None


class Outcomes(dict[int, Any]):
    """Collects what is handed over, each item once."""

    def __call__(self, item: int, outcome: Any) -> None:
        assert item not in self
        self[item] = outcome


def test_every_item_is_asked_once_a_bounded_number_at_a_time() -> None:
    outcomes, now, most = Outcomes(), 0, 0

    async def call(item: int) -> int:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.001)
        now -= 1
        return item * item

    ask_all(call, range(20), parallel=3, on_done=outcomes)
    assert outcomes == {item: item * item for item in range(20)}
    assert most == 3
    ask_all(call, [], parallel=3, on_done=outcomes)


def test_an_answer_is_handed_over_while_others_are_still_asked() -> None:
    handed_over: list[int] = []

    async def call(item: int) -> int:
        while item and not handed_over:  # the second item is answered only after the first was handed over
            await asyncio.sleep(0.001)
        return item

    ask_all(call, range(2), parallel=2, on_done=lambda item, answer: handed_over.append(item))
    assert handed_over == [0, 1]


def test_an_item_that_fails_leaves_the_others() -> None:
    outcomes = Outcomes()

    async def call(item: int) -> int:
        if item % 3 == 1:
            raise EndpointError("no answer")
        return item

    ask_all(call, range(9), parallel=2, on_done=outcomes, patience=5)
    assert {item for item, answer in outcomes.items() if isinstance(answer, EndpointError)} == {1, 4, 7}
    assert {item for item, answer in outcomes.items() if item == answer} == {0, 2, 3, 5, 6, 8}


def test_a_dead_endpoint_is_not_asked_forever() -> None:
    outcomes, asked = Outcomes(), []

    async def call(item: int) -> int:
        asked.append(item)
        raise EndpointError("refused")

    ask_all(call, range(100), parallel=1, on_done=outcomes, patience=4)
    assert len(asked) == 4
    assert len(outcomes) == 100
    assert "4 in a row failed: refused" in str(outcomes[99])


def test_a_mistake_of_the_user_is_raised_at_once_but_not_once_answers_came() -> None:
    outcomes = Outcomes()

    async def call(item: int) -> int:
        if item:
            raise ValueError("the key is rejected")
        return item

    with pytest.raises(ValueError, match="the key is rejected"):
        ask_all(call, range(1, 50), parallel=2, on_done=outcomes)
    assert outcomes == {}
    ask_all(call, range(50), parallel=1, on_done=outcomes, patience=3)
    assert outcomes.pop(0) == 0
    assert len(outcomes) == 49
    assert all(isinstance(answer, Exception) for answer in outcomes.values())


def test_an_error_of_ours_is_raised() -> None:
    async def call(item: int) -> float:
        return 1 / item

    with pytest.raises(ZeroDivisionError):
        ask_all(call, [1, 0, 1], parallel=1, on_done=Outcomes())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_asking_and_loses_no_answer(number: signal.Signals) -> None:
    outcomes, release = Outcomes(), threading.Event()

    def handler(number: int, frame: object) -> None:
        raise AssertionError("the handler from before is set again only after the asking")

    async def call(item: int) -> int:
        if item == 2:
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            await asyncio.to_thread(release.wait, 20)  # hangs; nobody waits for it
        return item

    before = {each: signal.signal(each, handler) for each in (signal.SIGINT, signal.SIGTERM)}
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            ask_all(call, range(50), parallel=1, on_done=outcomes)
        took = time.monotonic() - started
        assert [signal.getsignal(each) for each in before] == [handler, handler]
    finally:
        release.set()
        for each, handler_before in before.items():
            signal.signal(each, handler_before)
    assert outcomes == {0: 0, 1: 1}
    assert took < 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_even_what_is_done_with_an_answer(number: signal.Signals) -> None:
    async def call(item: int) -> int:
        return item

    def on_done(item: int, outcome: object) -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        raise AssertionError("went on")

    with pytest.raises(KeyboardInterrupt):
        ask_all(call, range(3), parallel=1, on_done=on_done)


def test_a_thread_other_than_the_main_one_can_ask() -> None:
    async def call(item: int) -> int:
        return item

    outcomes = Outcomes()
    thread = threading.Thread(target=lambda: ask_all(call, range(5), parallel=2, on_done=outcomes))
    thread.start()
    thread.join(10)
    assert outcomes == {item: item for item in range(5)}


@pytest.mark.parametrize("error", [KeyError, StopIteration])
def test_what_a_function_in_a_thread_raises_arrives(error: type[Exception]) -> None:
    def function() -> None:
        raise error("no idea")

    with pytest.raises((KeyError, RuntimeError), match=r"no idea"):
        ask_all(lambda item: asyncio.to_thread(function), [0], parallel=1, on_done=Outcomes())


def test_many_questions_at_a_time_to_one_endpoint(waits: list[float]) -> None:
    def respond(request: dict[str, Any], number: int) -> Reply | str:
        return Reply("", 429, {"Retry-After": "1"}) if number % 3 == 0 else request["messages"][0]["content"]

    outcomes = Outcomes()
    with serving(respond) as served:
        asked = endpoint(served.url, waits, retries=20)
        ask_all(
            lambda item: asked.ask([{"role": "user", "content": str(item)}]), range(30), parallel=8, on_done=outcomes
        )
    assert outcomes == {item: str(item) for item in range(30)}


def test_an_answer_that_repeats_the_key_holds_it_no_more() -> None:
    """Answers are written to files."""
    with serving(lambda request, number: "You sent sk-secret to me.") as served:
        endpoint = Endpoint(served.url, "judge", api_key="sk-secret")
        reply = asyncio.run(endpoint.complete({"messages": [{"role": "user", "content": "hello"}]}))
    assert reply.text == "You sent *** to me."


def test_an_endpoint_can_be_sent_to_other_ranks() -> None:
    endpoint = Endpoint("http://host:8000/v1", "judge", api_key="sk-secret")
    assert pickle.loads(pickle.dumps(endpoint)) == endpoint
