"""A judge behind an OpenAI-compatible endpoint: one question with retries, or many questions at a time."""

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import email.utils
import functools
import json
import os
import random
import re
import signal
import ssl
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

try:
    import httpx2 as httpx  # huggingface_hub 2 brings it
except ModuleNotFoundError:
    import httpx  # type: ignore[no-redef]  # huggingface_hub 1 brings this one

from notus.evaluation.budget import Budget, Charge, Tally
from notus.evaluation.budget import OverBudget as OverBudget
from notus.evaluation.results import append_records
from notus.runtime.process import tell

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")

FIRST_WAIT, LONGEST_WAIT, LONGEST_RETRY_AFTER = 1.0, 60.0, 600.0  # seconds
LOGGED_WAIT = 100.0  # a longer wait is logged, because it would look like a hang
MAX_BYTES = 16 << 20  # of one answer, decompressed
MESSAGE = 300  # characters of a server's message that are shown


class EndpointError(Exception):
    """A question got no usable answer, after all retries or because the server rejected this question."""


class RejectedError(EndpointError):
    """The server rejected this question: it is too long, say, or has a parameter that the server does not know."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A chat completion as an endpoint sent it."""

    text: str  # empty where the message has none
    finish_reason: str | None  # "stop", "length", ...; None: the server does not say
    # None: the server does not say
    prompt_tokens: int | None
    completion_tokens: int | None
    requests: int  # that were sent for it, those that failed included
    tool_calls: bool = False  # whether the model called tools


class _Transient(Exception):
    """A failure that may pass. `retry_after`: the seconds that the server asks to wait."""

    def __init__(self, message: str, retry_after: float | None = None, *, is_status: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.is_status = is_status  # the server turned the request down, and computed no answer


def _nothing() -> None:
    """Do nothing; a function with a name, because endpoints are sent to other ranks."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A chat model behind an OpenAI-compatible endpoint."""

    base_url: str  # the address without `/chat/completions`, as "https://api.openai.com/v1"
    model: str  # the model's name there
    _: dataclasses.KW_ONLY
    # sent as a bearer token, never shown; None: none is sent.
    api_key: str | None = dataclasses.field(default=None, repr=False)
    timeout: float = 120.0  # seconds for one whole request
    retries: int = 5  # requests after the first one, for failures that may pass
    max_tokens: int = 2048  # most tokens of an answer
    temperature: float = 0.0  # 0 is greedy
    # how to wait, given seconds.
    sleep: Callable[[float], Awaitable[None]] = dataclasses.field(default=asyncio.sleep, repr=False)
    # called before each request; raises OverBudget to send none.
    on_request: Callable[[], None] = dataclasses.field(default=_nothing, repr=False)
    # what `complete` counts its requests in, and asks before each one; None: no limit.
    budget: Budget | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Checked before anything else can fail: a message must not repeat a password, or the key in a query.
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
            raise ValueError("the API key holds characters that no key has; set its environment variable again")

    async def ask(self, messages: Sequence[dict[str, str]]) -> str:
        """Return the model's answer to a conversation (`role`, `content`); it is not empty.

        Raises EndpointError if no answer came in `retries` + 1 requests, or the server rejected this conversation;
        ValueError if the server rejects every request (key, address, model's name), saying what to change.
        """
        sampling = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        body = {"model": self.model, "messages": list(messages), **sampling}

        async def request(_: int) -> str:
            return self._content(await self._post(body))

        return await self._until_answered(request)

    async def complete(self, body: Mapping[str, Any], tally: Tally | None = None) -> Reply:
        """Return what the model says to a chat completion's request, whose `model` is added. It may be empty.

        What it took is added to `tally`, request by request, whatever comes of them. Raises as `ask`, RejectedError if
        the server rejects this request, what `on_request` raises, and OverBudget if `budget` is used up.
        """
        whole = {"model": self.model, **body}

        async def request(sent: int) -> Reply:
            if self.budget is None:
                return self._reply(await self._post(whole), sent)
            most = int(body.get("max_tokens", self.max_tokens))
            async with self.budget.request(len(json.dumps(whole)), most, tally) as charge:
                return await self._charged(charge, whole, sent)

        return await self._until_answered(request)

    async def _charged(self, charge: Charge, body: Mapping[str, Any], sent: int) -> Reply:
        """Return the answer to one request, and charge what it took."""
        try:
            reply = self._reply(await self._post(body), sent)
        except (RejectedError, ValueError):
            charge.nothing()
            raise
        except _Transient as failure:
            if failure.is_status:
                charge.nothing()
            raise
        charge.tokens(reply.prompt_tokens, reply.completion_tokens)
        return reply

    async def _until_answered(self, request: Callable[[int], Awaitable[Answer]]) -> Answer:
        """Await `request(number)`, from 1 on, again and again while it fails with what may pass."""
        for attempt in range(self.retries + 1):
            try:
                self.on_request()
                return await request(attempt + 1)
            except _Transient as failure:
                if attempt == self.retries:
                    raise EndpointError(f"{self.base_url}: {failure} ({attempt + 1} requests)") from failure
                wait = _wait(attempt, failure.retry_after)
                if wait > LOGGED_WAIT:
                    tell(f"note: {self.base_url}: {failure}; asked again in {wait:.0f} s")
            await self.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _post(self, body: Mapping[str, Any]) -> bytes:
        url = self.base_url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            # httpx's own timeouts are for each read: a server that sends a byte now and then would never meet them.
            client = httpx.AsyncClient(timeout=None, verify=_certificates())
            # ASCII, because strings may hold halves of surrogate pairs, which have no UTF-8
            request = client.stream("POST", url, content=json.dumps(body), headers=headers)
            async with asyncio.timeout(self.timeout), client, request as response:
                content = await self._read(response)
        except TimeoutError:
            raise _Transient(f"no whole answer in {self.timeout:g} s") from None
        except httpx.RequestError as error:  # may quote what the server sent, at any length
            raise _Transient(f"{type(error).__name__}: {self._clean(str(error))}".rstrip(": ")) from None
        if not response.is_success:
            self._fail(response.status_code, content, response.headers.get("Retry-After"))
        return content

    async def _read(self, response: "httpx.Response") -> bytes:
        """Return the whole body, decompressed; a server that sends too much is not read to the end.

        httpx would decompress each part whole, and as often as the server says: a few kilobytes can become gigabytes.
        """
        too_much = _Transient(f"an answer of more than {MAX_BYTES >> 20} MiB")
        content = bytearray()
        async for part in response.aiter_raw():
            content += part
            if len(content) > MAX_BYTES:
                raise too_much
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding in ("", "identity"):
            return bytes(content)
        if encoding not in ("gzip", "deflate"):
            raise _Transient(f"an answer in an encoding that was not asked for ({self._clean(encoding)})")
        try:
            unpacked = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(content, MAX_BYTES + 1)
        except zlib.error as error:
            raise _Transient(f"an answer that is no {encoding} ({error})") from None
        if len(unpacked) > MAX_BYTES:
            raise too_much
        return unpacked

    def _fail(self, status: int, content: bytes, retry_after: str | None) -> NoReturn:
        """Raise what a status that is not 2xx means."""
        text = content.decode(errors="replace")
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            text = str(json.loads(content)["error"]["message"])
        text = self._clean(text)
        answer = f"the server answers {status}" + (f" ({text})" if text else "")
        if status in (401, 403):
            reason = "the key is rejected" if self.api_key else "no key was sent"
            raise ValueError(
                f"{self.base_url}: {answer}; {reason}: set the environment variable that --api-key-env names"
            )
        if status in (404, 405) or 300 <= status < 400:
            check = f"the address, which ends before /chat/completions, and the model's name, {self.model!r}"
            raise ValueError(f"{self.base_url}: {answer}; check {check}")
        if status in (408, 409, 425, 429) or status >= 500:
            raise _Transient(answer, _retry_after(retry_after), is_status=True)
        raise RejectedError(f"{self.base_url}: {answer}")  # 400, 413, 422: too long, or an unknown parameter

    def _content(self, content: bytes) -> str:
        """Return the text of the first choice, which is not empty."""
        reply = self._reply(content, 1)
        if not reply.text.strip():
            raise _Transient(f"an empty answer (finish_reason {self._clean(str(reply.finish_reason))})")
        return reply.text

    def _reply(self, content: bytes, requests: int) -> Reply:
        """Return the first choice, and what the server says of its cost."""
        try:
            answer = json.loads(content)
            choice = answer["choices"][0]
            message = choice["message"]
            text = message["content"]
            reason, calls, usage = choice.get("finish_reason"), message.get("tool_calls"), answer.get("usage")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise _Transient(f"an answer that is no chat completion ({type(error).__name__})") from error
        if text is not None and not isinstance(text, str):
            raise _Transient("an answer that is no chat completion (its content is no string)")
        return Reply(
            text=text.replace(self.api_key, "***") if text and self.api_key else text or "",  # it is written to files
            finish_reason=reason if isinstance(reason, str) else None,
            prompt_tokens=_tokens(usage, "prompt_tokens"),
            completion_tokens=_tokens(usage, "completion_tokens"),
            requests=requests,
            tool_calls=bool(calls),
        )

    def _clean(self, text: str) -> str:
        """Return a server's words as one short line, without the key if they repeat it."""
        if self.api_key:
            text = text.replace(self.api_key, "***")
        letters = (letter if letter.isprintable() else " " for letter in text[: 10 * MESSAGE])
        return " ".join("".join(letters).split())[:MESSAGE]


def _tokens(usage: Any, key: str) -> int | None:
    """Return a count of tokens; None where a server does not say, or says something else."""
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else None


def judge_endpoint(args: argparse.Namespace) -> Endpoint:
    """Return the endpoint of `add_judge_arguments`; no key where its variable is unset, as for a local server."""
    key = os.environ.get(args.api_key_env, "").strip() or None
    return Endpoint(args.judge_url, args.judge_model, api_key=key, timeout=args.judge_timeout)


def ask_all(
    ask: Callable[[Item], Awaitable[Answer]],
    items: Sequence[Item],
    *,
    parallel: int,
    on_done: Callable[[Item, Answer | Exception], None],
    patience: int = 10,
) -> None:
    """Await `ask(item)` for every item, `parallel` at a time, and call `on_done(item, outcome)` as each one is done.

    An outcome is an answer, an EndpointError, or a ValueError that came after a first answer. Other errors are raised.
    After `patience` failures in a row, the items that are left fail without being asked. What `ask` runs in the
    loop's default executor, as `asyncio.to_thread` does, keeps neither this call nor the process waiting.

    Raises:
        ValueError: `ask` raised it before any item was answered.
        KeyboardInterrupt: SIGINT or SIGTERM came, where this is the main thread; requests in flight are cancelled.
    """
    pending, answered, failures = iter(items), False, 0

    async def work() -> None:
        nonlocal answered, failures
        for item in pending:
            outcome: Answer | Exception
            try:
                outcome = await ask(item)
                answered, failures = True, 0
            except (EndpointError, ValueError) as error:
                if isinstance(error, ValueError) and not answered:
                    raise
                outcome, failures = error, failures + 1
            on_done(item, outcome)
            if failures >= patience:
                for left in pending:
                    on_done(left, EndpointError(f"not asked, because {failures} in a row failed: {outcome}"))

    async def work_in_parallel() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        loop.set_default_executor(_DaemonThreads())
        with _first_signal_calls(functools.partial(loop.call_soon_threadsafe, task.cancel)):
            await asyncio.gather(*(work() for _ in range(min(parallel, len(items)))))

    try:
        asyncio.run(work_in_parallel())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


class _DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """A thread for each call, which nobody joins: neither the loop nor the interpreter at their ends.

    A name's lookup and a user's judge function know of no deadline and cannot be cancelled.
    """

    def submit(
        self, fn: Callable[Arguments, Answer], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> concurrent.futures.Future[Answer]:
        future = concurrent.futures.Future[Answer]()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except StopIteration as error:  # which a coroutine cannot raise: whoever awaits it would wait forever
                future.set_exception(RuntimeError(f"StopIteration: {error}"))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the threads alone."""


@contextlib.contextmanager
def _first_signal_calls(stop: Callable[[], object]) -> Iterator[None]:
    """Have the first SIGINT or SIGTERM call `stop`, and a second one raise KeyboardInterrupt wherever it comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_first(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.default_int_handler)
        stop()

    before = {number: signal.signal(number, on_first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def collect_verdicts(
    ask: Callable[[Item], Awaitable[Answer]],
    items: Sequence[Item],
    record: Callable[[Item, Answer | Exception], dict[str, Any] | None],
    *,
    parallel: int,
    kept: Path,
) -> list[str]:
    """Call `ask_all`, append each outcome's `record` to the file `kept` as it comes, and return the failures' messages.

    Raises ValueError and KeyboardInterrupt as `ask_all`, OSError if the disk fails.
    """
    failures = []

    def on_done(item: Item, outcome: Answer | Exception) -> None:
        if isinstance(outcome, Exception):
            failures.append(str(outcome))
        if (line := record(item, outcome)) is not None:
            append_records(kept, [line])

    ask_all(ask, items, parallel=parallel, on_done=on_done)
    return failures


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Return the trusted certificates. Reading them takes longer than a request, so they are read once."""
    return httpx.create_ssl_context()


def _wait(attempt: int, retry_after: float | None) -> float:
    """Return the seconds before the next request: as the server says, else doubling, with jitter."""
    if retry_after is not None:
        return min(retry_after, LONGEST_RETRY_AFTER) + random.uniform(0, 0.5)
    return min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.5)


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header names, as a number or as a date; None if it names none."""
    with contextlib.suppress(ValueError, TypeError):
        seconds = float(value or "")
        return seconds if 0 <= seconds < float("inf") else None
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value or "").timestamp() - time.time())
    return None
