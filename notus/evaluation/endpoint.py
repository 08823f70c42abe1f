"""A model behind an OpenAI-compatible endpoint: asked with a deadline, patience and bounds, many questions at a time.

What a server does wrong costs a retry and then a counted failure; what the user can put right is a ValueError at once.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import json
import os
import queue
import random
import re
import signal
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

try:
    import httpx2 as httpx  # huggingface_hub 2 brings it
except ModuleNotFoundError:
    import httpx  # type: ignore[no-redef]  # huggingface_hub 1 brings this one

from notus.runtime.process import tell

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MAX_BYTES = 16 << 20
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_LONGEST_RETRY_AFTER = 600.0
_UNTOLD = 100.0  # seconds of waiting of which nothing is said
_TOLD = 300  # characters of a server's message


class EndpointError(Exception):
    """A question that got no usable answer: after all retries, or because the server refused that question."""


class _Passing(Exception):
    """A failure that may pass. `retry_after`: seconds that the server asks to wait."""

    def __init__(self, told: str, retry_after: float | None = None) -> None:
        super().__init__(told)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A chat model behind an OpenAI-compatible endpoint; may be asked from several threads.

    Attributes:
        base_url: up to and without `/chat/completions`, as "https://api.openai.com/v1".
        model: its name there.
        api_key: sent as a bearer token; None: none is sent. Never shown.
        timeout: seconds for one whole request, from the name's look-up to the last byte.
        retries: requests after the first, for failures that may pass.
        max_tokens: most tokens of an answer.
        temperature: of the draws; 0 is greedy.
        sleep: how to wait, given seconds.
    """

    base_url: str
    model: str
    _: dataclasses.KW_ONLY
    api_key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 120.0
    retries: int = 5
    max_tokens: int = 2048
    temperature: float = 0.0
    sleep: Callable[[float], None] = dataclasses.field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        # Looked for before anything can fail: a message must not repeat the password, or the key of a query.
        if "@" in self.base_url:
            raise ValueError("the endpoint's address holds a password; give it as a key, by --api-key-env")
        if "?" in self.base_url or "#" in self.base_url:
            raise ValueError("the endpoint's address holds a ? or #; give what stands before /chat/completions")
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"{self.base_url!r}: no address ({error}); give one as http://host:8000/v1") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{self.base_url!r}: not an endpoint's address; give one as http://host:8000/v1")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise ValueError("the API key holds characters that no key has; set its environment variable anew")

    def ask(self, messages: Sequence[dict[str, str]]) -> str:
        """The model's answer to a conversation (`role`, `content`), which is not empty.

        Raises:
            EndpointError: none came in `retries` + 1 requests, or the server refused this conversation.
            ValueError: the server refuses every request (key, address, model's name); says what to change.
        """
        for attempt in range(self.retries + 1):
            try:
                return _run(self._request(messages))
            except _Passing as failure:
                if attempt == self.retries:
                    raise EndpointError(f"{self.base_url}: {failure} ({attempt + 1} requests)") from failure
                pause = _pause(attempt, failure.retry_after)
                if pause > _UNTOLD:  # hours of it would else look like a hang
                    tell(f"note: {self.base_url}: {failure}; asked again in {pause:.0f} s")
                self.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _request(self, messages: Sequence[dict[str, str]]) -> str:
        try:
            tls = _certificates()
            async with asyncio.timeout(self.timeout), httpx.AsyncClient(timeout=None, verify=tls) as client:
                response, body = await self._post(client, messages)
        except TimeoutError:
            raise _Passing(f"no whole answer in {self.timeout:g} s") from None
        except httpx.RequestError as error:  # which may quote what the server sent, at any length
            raise _Passing(f"{type(error).__name__}: {self._clean(str(error))}".rstrip(": ")) from None
        if not response.is_success:
            self._refuse(response, body)
        return self._content(body)

    async def _post(
        self, client: "httpx.AsyncClient", messages: Sequence[dict[str, str]]
    ) -> tuple["httpx.Response", bytes]:
        body = {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        # ASCII, because texts may hold halves of surrogate pairs, which have no UTF-8
        async with client.stream("POST", url, content=json.dumps(body), headers=headers) as response:
            return response, await _read(response)

    def _refuse(self, response: "httpx.Response", body: bytes) -> None:
        """Raise what a status that is not 2xx means."""
        status, at = response.status_code, f"{self.base_url}: the server answers {response.status_code}"
        told = self._told(body)
        if status in (401, 403):
            remedy = "the key is refused" if self.api_key else "no key was sent"
            raise ValueError(f"{at}{told}; {remedy}: set the environment variable that --api-key-env names")
        if status in (404, 405) or 300 <= status < 400:
            where = "the address, which ends before /chat/completions"
            raise ValueError(f"{at}{told}; check {where}, and the model's name, {self.model!r}")
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Passing(f"the server answers {status}{told}", _retry_after(response.headers.get("Retry-After")))
        raise EndpointError(f"{at}{told}")  # 400 and its like: too long, or a parameter that the model does not take

    def _told(self, body: bytes) -> str:
        """The server's own words, in one line, without the key if it repeats that."""
        text = body.decode("utf-8", "replace")
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            text = str(json.loads(text)["error"]["message"])
        text = self._clean(text)
        return f" ({text})" if text else ""

    def _clean(self, text: str) -> str:
        """A server's words fit to be shown: one short line, without the key."""
        if self.api_key:
            text = text.replace(self.api_key, "***")
        letters = (letter if letter.isprintable() else " " for letter in text[: 10 * _TOLD])
        return " ".join("".join(letters).split())[:_TOLD]

    def _content(self, body: bytes) -> str:
        """The text of the first choice. Raises _Passing if there is none."""
        try:
            choice = json.loads(body)["choices"][0]
            content = choice["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise _Passing(f"an answer that is no chat completion ({type(error).__name__})") from error
        if content is not None and not isinstance(content, str):
            raise _Passing("an answer that is no chat completion (its content is no text)")
        if not content or not content.strip():
            raise _Passing(f"an empty answer (finish_reason {self._clean(str(choice.get('finish_reason')))})")
        return content


def judge_endpoint(args: argparse.Namespace) -> Endpoint:
    """The endpoint that `add_judge_arguments` describes; no key where its variable is unset, as for a local server.

    Raises ValueError for what is no address.
    """
    key = os.environ.get(args.api_key_env, "").strip() or None
    return Endpoint(args.judge_url, args.judge_model, api_key=key, timeout=args.judge_timeout)


def ask_all(
    endpoint_call: Callable[[Item], Answer],
    items: Sequence[Item],
    *,
    parallel: int,
    on_done: Callable[[Item, Answer | Exception], None],
    patience: int = 10,
) -> None:
    """Call `endpoint_call(item)` for every item, `parallel` at a time, and hand over each outcome as it comes.

    `on_done(item, answer or error)` runs in the calling thread alone, in the order in which the answers come. Errors
    that are handed over are EndpointError, and ValueError once an item has succeeded; another error is raised. After
    `patience` failures in a row nothing more is asked: the items left come with an EndpointError that says so.

    SIGINT and SIGTERM, where this is the main thread, end the asking: what has come is handed over first. Requests in
    flight are let go.

    Raises:
        ValueError: `endpoint_call` raised it before any item succeeded.
        KeyboardInterrupt: SIGINT or SIGTERM came.
    """
    outcomes: queue.SimpleQueue[tuple[Item, Answer | BaseException] | None] = queue.SimpleQueue()
    stop, answered = threading.Event(), threading.Event()
    waiting = queue.SimpleQueue[Item]()
    for item in items:
        waiting.put(item)

    def work() -> None:
        while not stop.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answer = endpoint_call(item)
            except BaseException as error:
                outcomes.put((item, error))
                if _ends_all(error, answered.is_set()):
                    return  # rather than ask on until the caller has raised it
            else:
                answered.set()  # before the answer is put: a later error is then judged here as by the caller
                outcomes.put((item, answer))

    try:
        with _signals_to(lambda: outcomes.put(None)):
            # Daemons: a request that hangs must not keep a process that was told to stop.
            for _ in range(min(parallel, len(items))):
                threading.Thread(target=work, daemon=True).start()
            _hand_over(outcomes, waiting, len(items), on_done, patience)
    finally:
        stop.set()


def _hand_over(
    outcomes: "queue.SimpleQueue[Any]",
    waiting: "queue.SimpleQueue[Any]",
    left: int,
    on_done: Callable[[Any, Any], None],
    patience: int,
) -> None:
    succeeded, failed_in_a_row = False, 0
    while left:
        outcome = outcomes.get()
        if outcome is None:
            raise KeyboardInterrupt
        item, answer = outcome
        failed = isinstance(answer, BaseException)
        if failed and _ends_all(answer, succeeded):
            raise answer
        succeeded, failed_in_a_row = succeeded or not failed, failed_in_a_row + 1 if failed else 0
        on_done(item, answer)
        left -= 1
        if failed_in_a_row >= patience:
            left -= _give_up(waiting, on_done, f"not asked, because {failed_in_a_row} in a row failed: {answer}")


def _ends_all(error: BaseException, succeeded: bool) -> bool:
    """Whether an error is of the asking itself, not of the item: see `ask_all`."""
    return not (isinstance(error, EndpointError) or (succeeded and isinstance(error, ValueError)))


def _give_up(waiting: "queue.SimpleQueue[Any]", on_done: Callable[[Any, Any], None], reason: str) -> int:
    """Hand over what nobody has taken up yet as failed; returns how many that were."""
    count = 0
    with contextlib.suppress(queue.Empty):
        while True:
            on_done(waiting.get_nowait(), EndpointError(reason))
            count += 1
    return count


@contextlib.contextmanager
def _signals_to(notice: Callable[[], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls `notice`; a second one raises KeyboardInterrupt wherever it comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.default_int_handler)
        notice()

    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(request: Coroutine[Any, Any, str]) -> str:
    """Run a request in a loop, and with a deadline, of its own.

    `asyncio.run` would wait at the end for the thread that looks the name up, which knows of no deadline.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(request)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Who is trusted; read once, as it takes longer than a request to a server nearby."""
    return httpx.create_ssl_context()


async def _read(response: "httpx.Response") -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_BYTES:
            raise _Passing(f"an answer of more than {MAX_BYTES >> 20} MiB")
    return bytes(body)


def _pause(attempt: int, retry_after: float | None) -> float:
    """Seconds before the next request: as the server says, else doubling, with jitter so that threads part."""
    if retry_after is not None:
        return min(retry_after, _LONGEST_RETRY_AFTER) + random.uniform(0, 0.5)
    return min(_FIRST_WAIT * 2.0**attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.5)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header names, as a number or as a date; None if it names none."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else None
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None
