"""The endpoint's client against a real server on loopback that refuses, stalls and lies."""

import argparse
import email.utils
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from judges import Reply, Served, completion, serving
from ranks import free_port

from notus.evaluation.arguments import add_judge_arguments
from notus.evaluation.endpoint import Endpoint, EndpointError, ask_all, judge_endpoint

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


def endpoint(served: Served, waits: list[float], **options: Any) -> Endpoint:
    return Endpoint(served.url, "judge", sleep=waits.append, **{"timeout": 10.0, "retries": 2, **options})


def once(reply: Reply) -> Callable[[dict[str, Any], int], Reply | str]:
    """The first request gets `reply`, later ones a proper answer."""
    return lambda request, number: reply if number == 0 else "fine"


def test_the_request_is_a_chat_completions_one(waits: list[float]) -> None:
    with serving(lambda request, number: "Rating: [[8]] 你好") as served:
        answer = endpoint(served, waits, api_key=KEY, max_tokens=7, temperature=0.5).ask(QUESTION)
    assert answer == "Rating: [[8]] 你好"
    assert served.requests == [
        {"model": "judge", "messages": QUESTION, "max_tokens": 7, "temperature": 0.5, "path": "/v1/chat/completions"}
    ]
    assert served.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert waits == []


def test_without_a_key_none_is_sent_and_a_slash_at_the_end_is_the_same_address(waits: list[float]) -> None:
    with serving(lambda request, number: "yes") as served:
        assert Endpoint(served.url + "/", "judge").ask(QUESTION) == "yes"
    assert "Authorization" not in served.headers[0]
    assert served.requests[0]["path"] == "/v1/chat/completions"


def test_half_a_surrogate_pair_can_be_sent(waits: list[float]) -> None:
    with serving(lambda request, number: "yes") as served:
        endpoint(served, waits).ask([{"role": "user", "content": "\ud83d"}])
    assert served.requests[0]["messages"][0]["content"] == "\ud83d"


def drip(served_closing: threading.Event, head: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    """Sends `head`, then a byte every few milliseconds for ever."""

    def conduct(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(head)
        while not served_closing.wait(0.02):
            handler.wfile.write(b"x")

    return conduct


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: "]
)
def test_a_server_that_drips_for_ever_meets_the_deadline_of_the_whole_request(head: bytes, waits: list[float]) -> None:
    closing = threading.Event()
    with serving(once(Reply(conduct=drip(closing, head)))) as served:
        started = time.monotonic()
        assert endpoint(served, waits, timeout=1.5).ask(QUESTION) == "fine"
        took = time.monotonic() - started
        closing.set()
    assert 1.5 <= took < 30
    assert len(waits) == 1


def test_a_server_that_says_nothing_at_all(waits: list[float]) -> None:
    with serving(lambda request, number: Reply(conduct=lambda handler: served.closing.wait())) as served:
        with pytest.raises(EndpointError, match=r"no whole answer in 1 s \(3 requests\)"):
            endpoint(served, waits, timeout=1.0).ask(QUESTION)
        served.closing.set()
    assert len(served.requests) == 3


def test_a_name_that_is_looked_up_for_ever_meets_the_deadline(
    waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up, asked = threading.Event(), Endpoint("http://localhost:9/v1", "judge", timeout=0.3, retries=0)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: looked_up.wait(20) and [])
    started = time.monotonic()
    with pytest.raises(EndpointError, match=r"no whole answer in 0\.3 s"):
        asked.ask(QUESTION)
    took = time.monotonic() - started
    looked_up.set()
    assert took < 15


def test_429_waits_as_long_as_the_server_says_in_seconds(waits: list[float]) -> None:
    with serving(once(Reply("slow down", 429, {"Retry-After": "7"}))) as served:
        assert endpoint(served, waits).ask(QUESTION) == "fine"
    assert len(waits) == 1
    assert 7 <= waits[0] <= 8


def test_429_waits_as_long_as_the_server_says_by_date(waits: list[float]) -> None:
    at = email.utils.formatdate(time.time() + 30, usegmt=True)
    with serving(once(Reply("", 429, {"Retry-After": at}))) as served:
        endpoint(served, waits).ask(QUESTION)
    assert 20 < waits[0] <= 31


@pytest.mark.parametrize("value", ["soon", "-3", "nan", "inf", "Thu, 01 Foo 2020", ""])
def test_a_retry_after_that_means_nothing_is_left_aside(value: str, waits: list[float]) -> None:
    with serving(once(Reply("", 503, {"Retry-After": value}))) as served:
        endpoint(served, waits).ask(QUESTION)
    assert 0.5 <= waits[0] <= 1.5


def test_a_retry_after_of_a_day_is_cut_short_and_told_and_one_in_the_past_is_now(
    waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    past = email.utils.formatdate(time.time() - 3600, usegmt=True)
    values = ["86400", past]
    with serving(
        lambda request, number: Reply("", 429, {"Retry-After": values[number]}) if number < 2 else "fine"
    ) as served:
        endpoint(served, waits).ask(QUESTION)
    assert 600 <= waits[0] <= 601
    assert 0 <= waits[1] <= 1
    (told,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"note: http.*/v1: the server answers 429; asked again in 60[01] s", told)


def test_errors_of_the_server_are_retried_with_growing_waits_and_then_told(waits: list[float]) -> None:
    reply = Reply({"error": {"message": "over\nloaded \x1b[31m"}}, 500)
    told = r"the server answers 500 \(over loaded \[31m\) \(5 requests\)"
    with serving(lambda request, number: reply) as served, pytest.raises(EndpointError, match=told):
        endpoint(served, waits, retries=4).ask(QUESTION)
    assert len(served.requests) == 5
    for attempt, wait in enumerate(waits):
        assert 0.5 * 2**attempt <= wait <= 1.5 * 2**attempt


def test_the_longest_wait_is_a_minute_and_a_half(waits: list[float]) -> None:
    with serving(lambda request, number: Reply("", 502)) as served, pytest.raises(EndpointError):
        endpoint(served, waits, retries=9).ask(QUESTION)
    assert len(waits) == 9
    assert max(waits) <= 90


def test_nobody_listens(waits: list[float]) -> None:
    dead = Endpoint(f"http://127.0.0.1:{free_port()}/v1", "judge", retries=2, sleep=waits.append)
    with pytest.raises(EndpointError, match=r"ConnectError.* \(3 requests\)"):
        dead.ask(QUESTION)
    assert len(waits) == 2


def cut(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')


def nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    pass


BROKEN = {
    "cut in the middle": Reply(conduct=cut),
    "not HTTP": Reply(conduct=nonsense),
    "no reply": Reply(conduct=hang_up),
    "garbage": Reply("<html>hello</html>"),
    "not UTF-8": Reply(b"\xff\xfe\x00"),
    "half JSON": Reply('{"choices": [{"message"'),
    "deep JSON": Reply("[" * 200_000),
    "a list": Reply("[]"),
    "a number": Reply("3"),
    "no choices": Reply({"choices": []}),
    "choices of text": Reply({"choices": "no"}),
    "no message": Reply({"choices": [{}]}),
    "null message": Reply({"choices": [{"message": None}]}),
    "content of parts": Reply({"choices": [{"message": {"content": [{"text": "8"}]}}]}),
    "null content": Reply(completion(None)),
    "empty content": Reply(completion("")),
    "blank content": Reply(completion(" \n")),
    "a gzip that is none": Reply("plain", headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_costs_a_retry(name: str, waits: list[float]) -> None:
    with serving(once(BROKEN[name])) as served:
        assert endpoint(served, waits).ask(QUESTION) == "fine"
    assert len(served.requests) == 2
    assert len(waits) == 1


@pytest.mark.parametrize("name", ["cut in the middle", "garbage", "no choices", "empty content"])
def test_broken_answers_only_are_an_error(name: str, waits: list[float]) -> None:
    with serving(lambda request, number: BROKEN[name]) as served, pytest.raises(EndpointError, match="3 requests"):
        endpoint(served, waits).ask(QUESTION)
    assert len(served.requests) == 3


def test_an_answer_without_end_is_cut_off(waits: list[float]) -> None:
    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            handler.wfile.write(b" " * (1 << 20))

    with serving(once(Reply(conduct=flood))) as served:
        assert endpoint(served, waits, timeout=60.0).ask(QUESTION) == "fine"
    assert len(waits) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_told_at_once_and_never_shown(status: int, waits: list[float]) -> None:
    reply = Reply({"error": {"message": f"Incorrect API key provided: {KEY}"}}, status)
    with serving(lambda request, number: reply) as served:
        asked = endpoint(served, waits, api_key=KEY)
        with pytest.raises(ValueError, match=r"key provided: \*\*\*\); the key is refused: .* --api-key-env") as caught:
            asked.ask(QUESTION)
    assert len(served.requests) == 1
    assert KEY not in str(caught.value)
    assert KEY not in repr(asked)


def test_a_missing_key_is_told_as_such(waits: list[float]) -> None:
    with serving(lambda request, number: Reply("", 401)) as served, pytest.raises(ValueError, match="no key was sent"):
        endpoint(served, waits).ask(QUESTION)


@pytest.mark.parametrize("status", [301, 307, 404, 405])
def test_a_wrong_address_is_told_at_once(status: int, waits: list[float]) -> None:
    reply = Reply("", status, {"Location": "http://127.0.0.1:9/"})
    with serving(lambda *_: reply) as served, pytest.raises(ValueError, match=r"check the address.*'judge'"):
        endpoint(served, waits).ask(QUESTION)
    assert len(served.requests) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_question_is_not_asked_again(status: int, waits: list[float]) -> None:
    reply, told = Reply({"error": {"message": "too long"}}, status), rf"answers {status} \(too long\)"
    with serving(lambda *_: reply) as served, pytest.raises(EndpointError, match=told):
        endpoint(served, waits).ask(QUESTION)
    assert len(served.requests) == 1


@pytest.mark.parametrize("url", ["", "judge", "ftp://host/v1", "http://", "http://h:port/v1", "localhost:8000/v1"])
def test_what_is_no_address_is_told_before_the_work(url: str) -> None:
    with pytest.raises(ValueError, match=r"http://host:8000/v1"):
        Endpoint(url, "judge")


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/v1",
        "https://me:hunter2@host:port/v1",
        "me:hunter2@host/v1",
        "https://host/v1?key=hunter2",
        "host:port/v1#hunter2",
    ],
)
def test_a_password_or_key_in_the_address_is_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"holds a (password|\? or #)") as caught:
        Endpoint(url, "judge")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-秘密", "sk-秘密 ", "sk-secret ", " sk-secret", "sk secret", "sk-secret\n", ""])
def test_a_key_that_no_header_can_hold_is_not_repeated(key: str) -> None:
    with pytest.raises(ValueError, match="set its environment variable anew") as caught:
        Endpoint("http://host/v1", "judge", api_key=key)
    assert "秘密" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


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
    ids=["finish_reason", "header", "refusal", "fault"],
)
def test_a_server_that_repeats_the_key_at_length_is_told_in_one_short_line(reply: Reply, waits: list[float]) -> None:
    with serving(lambda request, number: reply) as served, pytest.raises(EndpointError) as caught:
        endpoint(served, waits, api_key=KEY, retries=0).ask(QUESTION)
    told = str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert "***" in told
    assert len(told) < 500
    assert told.isprintable()


def judge(*options: str) -> Endpoint:
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser)
    return judge_endpoint(parser.parse_args(["--judge-model", "gpt-4", *options]))


def test_the_judge_on_the_command_line_has_its_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    monkeypatch.setenv("BLANK", " ")
    assert judge() == Endpoint("https://api.openai.com/v1", "gpt-4", api_key="sk-openai")
    own = judge("--judge-url", "http://host/v1", "--judge-timeout", "7", "--api-key-env", "MY_KEY")
    assert own == Endpoint("http://host/v1", "gpt-4", api_key=KEY, timeout=7.0)
    assert judge("--api-key-env", "BLANK").api_key is None
    assert judge("--api-key-env", "NO_SUCH_KEY_AT_ALL").api_key is None


class Outcomes:
    """Collects what is handed over, and in which thread."""

    def __init__(self) -> None:
        self.answers: dict[int, Any] = {}
        self.threads: set[threading.Thread] = set()

    def __call__(self, item: int, answer: Any) -> None:
        assert item not in self.answers
        self.answers[item] = answer
        self.threads.add(threading.current_thread())


@pytest.fixture
def outcomes() -> Outcomes:
    return Outcomes()


def test_every_item_is_asked_once_a_bounded_number_at_a_time(outcomes: Outcomes) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def call(item: int) -> int:
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.01)
        with lock:
            now -= 1
        return item * item

    ask_all(call, range(20), parallel=3, on_done=outcomes)
    assert outcomes.answers == {item: item * item for item in range(20)}
    assert most == 3
    assert outcomes.threads == {threading.current_thread()}


def test_an_answer_is_handed_over_while_others_are_still_asked() -> None:
    first_came = threading.Event()

    def call(item: int) -> int:
        # The second item is answered only after the first was handed over.
        assert item == 0 or first_came.wait(10)
        return item

    ask_all(call, range(2), parallel=2, on_done=lambda item, answer: first_came.set())


def test_nothing_to_ask(outcomes: Outcomes) -> None:
    ask_all(lambda item: item, [], parallel=4, on_done=outcomes)
    assert outcomes.answers == {}


def test_an_item_that_fails_leaves_the_others(outcomes: Outcomes) -> None:
    def call(item: int) -> int:
        if item % 3 == 1:
            raise EndpointError("no answer")
        return item

    ask_all(call, range(9), parallel=2, on_done=outcomes, patience=5)
    assert {item for item, answer in outcomes.answers.items() if isinstance(answer, EndpointError)} == {1, 4, 7}
    assert {item for item, answer in outcomes.answers.items() if item == answer} == {0, 2, 3, 5, 6, 8}


def test_a_dead_endpoint_is_not_asked_for_ever(outcomes: Outcomes) -> None:
    asked = []

    def call(item: int) -> int:
        asked.append(item)
        time.sleep(0.02)
        raise EndpointError("refused")

    ask_all(call, range(100), parallel=1, on_done=outcomes, patience=4)
    assert 4 <= len(asked) < 100  # the thread may run ahead of the counting
    assert len(outcomes.answers) == 100
    assert "not asked, because 4 in a row failed: refused" in str(outcomes.answers[99])


def test_a_mistake_of_the_user_is_raised_at_once(outcomes: Outcomes) -> None:
    def call(item: int) -> int:
        raise ValueError("the key is refused")

    with pytest.raises(ValueError, match="the key is refused"):
        ask_all(call, range(50), parallel=2, on_done=outcomes)
    assert outcomes.answers == {}


def test_a_key_that_ends_in_the_middle_is_a_failure_like_others(outcomes: Outcomes) -> None:
    def call(item: int) -> int:
        if item:
            raise ValueError("the key is refused")
        return item

    ask_all(call, range(50), parallel=1, on_done=outcomes, patience=3)
    assert outcomes.answers[0] == 0
    assert sum(isinstance(answer, Exception) for answer in outcomes.answers.values()) == 49


def test_an_error_of_ours_is_raised(outcomes: Outcomes) -> None:
    with pytest.raises(ZeroDivisionError):
        ask_all(lambda item: 1 // item, [1, 0, 1], parallel=1, on_done=outcomes)


def handled(numbers: tuple[signal.Signals, ...]) -> Iterator[Any]:
    return (signal.getsignal(number) for number in numbers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_asking_and_loses_no_answer(number: signal.Signals, outcomes: Outcomes) -> None:
    release = threading.Event()
    before = list(handled((signal.SIGINT, signal.SIGTERM)))

    def call(item: int) -> int:
        if item == 2:
            os.kill(os.getpid(), number)
            assert release.wait(20)  # hangs; nobody waits for it
        return item

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask_all(call, range(50), parallel=1, on_done=outcomes)
    assert time.monotonic() - started < 10
    release.set()
    assert outcomes.answers == {0: 0, 1: 1}
    assert list(handled((signal.SIGINT, signal.SIGTERM))) == before


def test_a_thread_other_than_the_main_one_can_ask(outcomes: Outcomes) -> None:
    thread = threading.Thread(target=lambda: ask_all(lambda item: item, range(5), parallel=2, on_done=outcomes))
    thread.start()
    thread.join(10)
    assert outcomes.answers == {item: item for item in range(5)}


def test_many_threads_ask_one_endpoint(waits: list[float], outcomes: Outcomes) -> None:
    def respond(request: dict[str, Any], number: int) -> Reply | str:
        return Reply("", 429, {"Retry-After": "1"}) if number % 3 == 0 else request["messages"][0]["content"]

    with serving(respond) as served:
        asked = endpoint(served, waits, retries=20)
        ask_all(
            lambda item: asked.ask([{"role": "user", "content": str(item)}]), range(30), parallel=8, on_done=outcomes
        )
    assert outcomes.answers == {item: str(item) for item in range(30)}
